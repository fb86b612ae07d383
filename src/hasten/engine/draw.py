"""What drawing gives back, in plain data."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """ln softmax of the model's logits at one place: of the token that stands there, and of the likeliest ids, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"token": self.token, "logprob": self.logprob, "top": dict(self.top)}


@dataclass(frozen=True, slots=True)
class Draw:
    """What one sequence got: a token, with ``logprob`` where it was asked for, or the error that ends this sequence and no other."""

    token: int
    logprob: TokenLogprob | None = None
    error: str | None = None
