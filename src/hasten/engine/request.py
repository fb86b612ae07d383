"""Request: one output on its way to text. Knows tokens and text; knows no model and no backend."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hasten.engine.constraint import ConstraintState
from hasten.engine.detokenize import Detokenizer, StopMatcher
from hasten.engine.draw import TokenLogprob
from hasten.engine.sampling import SamplingParams

FinishReason = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """News of one output: text that is settled, the token ids that were drawn, and why it ended, on the last one.

    ``index`` says whose prompt it is, ``choice`` which of its outputs; ``logprobs`` are those of the tokens, where asked for, and
    ``prompt_logprobs`` those of the prompt from its second token on, with the first output's first news; ``error`` says what was wrong;
    ``stop`` is the stop string that ended it, if one did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    stop: str | None = None


class Request:
    """One output: its tokens, and the text made of them so far.

    ``limit`` is the most tokens prompt and output may have together, so that ``most`` may come; ``end_ids`` end the output and make no
    text; ``program_context`` is the context of the Program that serves it; ``choice`` says which output of its prompt this is, all of
    which share ``seed`` (a fresh one if None); ``constraint`` follows the grammar."""

    def __init__(
        self, index: int, prompt: Sequence[int], params: SamplingParams, *, limit: int, end_ids: frozenset[int],
        detokenizer: Detokenizer | None, program_context: int, choice: int = 0, seed: int | None = None,
        constraint: ConstraintState | None = None,
    ) -> None:  # fmt: skip
        self.choice, self.constraint = choice, constraint
        self.index, self.params, self.prompt, self.program_context = index, params, tuple(prompt), program_context
        self.output: list[int] = []
        self.due = 0
        """Tokens that are being drawn: 1 while the next one is planned before this one is known."""
        self.finish_reason: FinishReason | None = None
        chosen = params.seed if seed is None else seed
        self.seed = secrets.randbits(63) if chosen is None else chosen
        self.prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self.most = min(params.max_tokens, limit - len(prompt))
        self.end_ids = (frozenset() if params.ignore_eos else end_ids) | frozenset(params.stop_token_ids)
        self._detokenizer, self._stops = detokenizer, StopMatcher(tuple(params.stop))
        self._lead = ""
        if detokenizer is not None:
            lead = detokenizer.feed(prompt) + detokenizer.flush()  # spaces and bytes at the seam depend on what came before
            self._lead = lead if params.echo else ""

    @property
    def left(self) -> int:
        """How many tokens may still be drawn."""
        return self.most - len(self.output) - self.due

    @property
    def key(self) -> tuple[int, int]:
        """Its name among the engine's outputs."""
        return self.index, self.choice

    @property
    def mask(self) -> NDArray[np.uint32] | None:
        """Ids that the grammar allows next, None without one; none of them as long as it has not said."""
        if self.constraint is None or self.constraint.mask is not None:
            return None if self.constraint is None else self.constraint.mask
        return np.zeros(1, np.uint32)

    @property
    def forbidden(self) -> frozenset[int]:
        """Ids that may not come next: those that would end the output before ``min_tokens`` are out."""
        return self.end_ids if len(self.output) + self.due < self.params.min_tokens else frozenset()

    def take(self, token: int, logprob: TokenLogprob | None = None) -> Chunk:
        """Note the next token, and say what became known."""
        self.due = 0
        self.output.append(token)
        text, ended = "", token in self.end_ids
        if self._detokenizer is not None and not ended:
            text, ended = self._until_stop(self._detokenizer.feed([token]))
        if ended:
            self.finish_reason = "stop"
        elif len(self.output) >= self.most:
            self.finish_reason = "length"
        elif self.constraint is not None:
            self.constraint.advance(token)
        return self._news(text, (token,), () if logprob is None else (logprob,))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of a whole output, given at once."""
        ended = bool(tokens) and tokens[-1] in self.end_ids
        if self._detokenizer is None:
            return ""
        detokenizer = self._detokenizer.fork()
        return self._lead + detokenizer.feed(tokens[:-1] if ended else tokens) + detokenizer.flush()

    def end(self, reason: FinishReason, error: str | None = None) -> Chunk:
        """End the output where it stands, and say what was still held."""
        self.finish_reason = reason
        return self._news("", (), (), error)

    def _news(self, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], error: str | None = None) -> Chunk:
        if self.finish_reason is not None:
            text += self._flush()
            if self.constraint is not None:
                self.constraint.close()
        (text, self._lead), (of_prompt, self.prompt_logprobs) = (self._lead + text, ""), (self.prompt_logprobs, None)
        return Chunk(self.index, text, tokens, self.finish_reason, self.choice, logprobs, of_prompt, error, self._stops.stopped)

    def _until_stop(self, text: str) -> tuple[str, bool]:
        """What of the next text can be emitted, and whether a stop string ended it; none does in the text of ``min_tokens`` tokens."""
        if not self.params.stop:
            return text, False
        if len(self.output) <= self.params.min_tokens:
            return self._stops.skip(text), False
        text, stop = self._stops.feed(text)
        return text, stop is not None

    def _flush(self) -> str:
        """Text held back until the end; a stop string may still be found in it."""
        if self._detokenizer is None or self._stops.stopped is not None:
            return ""
        try:
            text, stopped = self._until_stop(self._detokenizer.flush())
        except Exception:  # where it fails there is nothing more to say, and the output ends all the same
            return self._stops.flush()
        if stopped:
            self.finish_reason = self.finish_reason if self.finish_reason == "error" else "stop"
            return text
        return text + self._stops.flush()
