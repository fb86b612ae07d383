"""Outputs: what came of the choices of one HTTP request, whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.engine import TokenLogprob
from hasten.serve.bodies import StreamOptions
from hasten.serve.messages import Piece
from hasten.serve.reply import encoded
from hasten.serve.service import Generation, Service

QUICK = 256
"""Tokens whose log-probabilities are written at once: a few milliseconds."""


@dataclass(slots=True)
class Output:
    """One choice."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop: str | None = None
    """The stop string that ended it."""

    def take(self, piece: Piece) -> None:
        """The next news."""
        self.texts.append(piece.text)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.stop = piece.finish_reason, piece.stop

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


async def collect(generation: Generation) -> list[Output]:
    """All choices, once they have ended."""
    outputs = [Output() for _ in range(len(generation.prompts) * generation.params.n)]
    async for told in generation.pieces():
        for choice, piece in told:
            outputs[choice].take(piece)
    return outputs


async def written(service: Service, outputs: Sequence[Output], made: Callable[[], Any]) -> bytes:
    """What ``made`` gives, as JSON; beside the event loop where log-probabilities make it long. Raises as `Texts.aside`."""
    tokens = sum(len(output.logprobs) + len(output.prompt_logprobs or ()) for output in outputs)
    if tokens <= QUICK:
        return encoded(made())
    return await service.texts.aside(lambda: encoded(made()))


def usage(generation: Generation, output_tokens: int) -> dict[str, int]:
    """As OpenAI counts."""
    prompt = sum(map(len, generation.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": output_tokens, "total_tokens": prompt + output_tokens}


class StreamUsage:
    """How the events of one stream end, and what its last one says of usage: nothing, all at the end, or with each so far."""

    def __init__(self, options: StreamOptions | None, generation: Generation) -> None:
        self._options, self._generation = options or StreamOptions(), generation
        self.tokens = 0
        """Of all outputs, so far."""

    def tail(self) -> bytes:
        """The end of an event of one choice."""
        if not self._options.include_usage:
            return b"}]}\n\n"
        so_far = encoded(usage(self._generation, self.tokens)) if self._options.continuous_usage_stats else b"null"
        return b'}],"usage":' + so_far + b"}\n\n"

    def last(self, head: Mapping[str, Any]) -> bytes:
        """The event after all others, if there is one."""
        if not self._options.include_usage:
            return b""
        return b"data: " + encoded({**head, "choices": [], "usage": usage(self._generation, self.tokens)}) + b"\n\n"
