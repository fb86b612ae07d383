"""Answer: what became of one request, chunk by chunk."""

import dataclasses
from collections.abc import Sequence

from hasten.engine.choices import best_choices
from hasten.engine.draw import TokenLogprob
from hasten.engine.request import Chunk, FinishReason, Request


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One output. ``finish_reason`` is 'stop' (end of text, of a grammar, stop string or stop token), 'length', or 'error', and ``error``
    then says what was wrong with this one; ``choice`` is its place among the outputs of its prompt; log-probabilities where asked for."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None


class Answer:
    """The outputs of one prompt. Give it each `Chunk` of them, in the order in which they come."""

    def __init__(self, outputs: Sequence[Request]) -> None:
        self._prompt, self._params = outputs[0].prompt, outputs[0].params
        self._outputs = [_Output() for _ in outputs]
        self._left = len(outputs)

    @property
    def done(self) -> bool:
        """Have all outputs ended?"""
        return not self._left

    @property
    def compared(self) -> bool:
        """Must all outputs be there before it is known which are returned (``best_of``)?"""
        return self._params.choices > self._params.n

    def take(self, chunk: Chunk) -> list[Chunk]:
        """Note what is new; the chunks that can be told by now. That is this one, but where outputs are compared first, none until the
        last has ended, and then those that are returned, whole."""
        self._outputs[chunk.choice].take(chunk)
        self._left -= chunk.finish_reason is not None
        if not self.compared:
            return [chunk]
        return [_whole(chunk.index, one) for one in self.completions()] if self.done else []

    def completions(self) -> list[Completion]:
        """The outputs that are returned, the likeliest first where they were compared; once `done`."""
        params, outputs = self._params, self._outputs
        chosen = list(range(len(outputs)))
        if self.compared:
            chosen = best_choices(
                [None if one.error is not None else [entry.logprob for entry in one.logprobs] for one in outputs], params.n
            )
        of_prompt = next((one.prompt_logprobs for one in outputs if one.prompt_logprobs is not None), None)
        return [
            Completion(
                self._prompt, tuple(one.token_ids), "".join(one.texts), one.finish_reason or "length", place,
                None if params.logprobs is None else tuple(one.logprobs), of_prompt, one.error,
            )
            for place, one in enumerate(outputs[which] for which in chosen)
        ]  # fmt: skip


class _Output:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None

    def take(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.error = chunk.finish_reason, chunk.error


def _whole(index: int, one: Completion) -> Chunk:
    return Chunk(
        index, one.text, one.token_ids, one.finish_reason, one.choice, one.logprobs or (), one.prompt_logprobs, one.error
    )  # fmt: skip
