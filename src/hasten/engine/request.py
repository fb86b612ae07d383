"""Request: one prompt on its way to text. Knows tokens and text; knows no model and no backend."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Literal

from hasten.engine.detokenize import Detokenizer, StopMatcher
from hasten.engine.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """News of one request: text that is settled, the token ids that were drawn, and why it ended, on the last one."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class Request:
    """Known tokens (prompt, then output), how many of them are computed, and the text made of the output so far.

    ``limit`` is the most tokens prompt and output may have together; ``end_ids`` end the output and make no text;
    ``program_context`` is the context of the Program that serves it."""

    def __init__(
        self, index: int, prompt: Sequence[int], params: SamplingParams, *, limit: int, end_ids: frozenset[int],
        detokenizer: Detokenizer | None, program_context: int,
    ) -> None:  # fmt: skip
        self.index, self.params, self.prompt, self.program_context = index, params, tuple(prompt), program_context
        self.output: list[int] = []
        self.computed = 0
        self.finish_reason: FinishReason | None = None
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._most = min(params.max_tokens, limit - len(prompt))
        self._end_ids = (frozenset() if params.ignore_eos else end_ids) | frozenset(params.stop_token_ids)
        self._detokenizer, self._stops = detokenizer, StopMatcher(tuple(params.stop))
        if detokenizer is not None:
            detokenizer.feed(prompt)  # spaces and bytes at the seam depend on what came before
            detokenizer.flush()

    @property
    def pending(self) -> tuple[int, ...]:
        """Known tokens that are not computed yet."""
        return (self.prompt + tuple(self.output))[self.computed :]

    @property
    def forbidden(self) -> frozenset[int]:
        """Ids that may not come next: those that would end the output before ``min_tokens`` are out."""
        return self._end_ids if len(self.output) < self.params.min_tokens else frozenset()

    def take(self, token: int) -> Chunk:
        """Note the next token, and say what became known."""
        self.output.append(token)
        text, ended = "", token in self._end_ids
        if self._detokenizer is not None and not ended:
            text, ended = self._until_stop(self._detokenizer.feed([token]))
        if ended:
            self.finish_reason = "stop"
        elif len(self.output) >= self._most:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._flush()
        return Chunk(self.index, text, (token,), self.finish_reason)

    def _until_stop(self, text: str) -> tuple[str, bool]:
        """What of the next text can be emitted, and whether a stop string ended it; none does in the text of ``min_tokens`` tokens."""
        if len(self.output) <= self.params.min_tokens:
            return self._stops.skip(text), False
        text, stop = self._stops.feed(text)
        return text, stop is not None

    def _flush(self) -> str:
        """Text held back until the end; a stop string may still be found in it."""
        if self._detokenizer is None or self._stops.stopped is not None:
            return ""
        text, stopped = self._until_stop(self._detokenizer.flush())
        if stopped:
            self.finish_reason = "stop"
            return text
        return text + self._stops.flush()
