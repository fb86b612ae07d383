"""Outputs: what came of the choices of one HTTP request, whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten.engine import TokenLogprob
from hasten.serve.messages import Piece
from hasten.serve.service import Generation


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


def usage(generation: Generation, output_tokens: int) -> dict[str, int]:
    """As OpenAI counts."""
    prompt = sum(map(len, generation.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": output_tokens, "total_tokens": prompt + output_tokens}
