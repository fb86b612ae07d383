"""Draws: rows of logits where a step left them, and which tokens are to be drawn from them there."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Logits(Protocol):
    """Rows of logits float32 [R, vocab] where a step left them. They are there until their session's next step."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def numpy(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """These rows on the host, [len(rows), vocab]; all of them unless given."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class HostLogits:
    """Logits that are on the host already, and stay there."""

    values: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and the vocabulary's ids."""
        return self.values.shape[0], self.values.shape[1]

    def numpy(self, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """These rows; not copied where they lie together, in their order."""
        if rows is None:
            return self.values
        if len(rows) and list(rows) == [*range(rows[0], rows[0] + len(rows))]:
            return self.values[rows[0] : rows[0] + len(rows)]
        return self.values[list(rows)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wanted:
    """How one row's token is drawn; the names and ranges are those of the engine's SamplingParams."""

    key: Hashable = None
    """Whose token it is: a name that comes again with the next draw is the same output, grown by what was drawn. No two of a draw are
    the same, but of those that have no history."""
    seed: int
    choice: int = 0
    position: int
    """The token's place in its sequence, from the prompt's start; below 2³²."""
    purpose: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Sequence[tuple[int, float]] = ()
    """What is added to the logits of these ids."""
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    """As far as it is known: ``position`` is beyond both where tokens drawn for it are not known yet."""
    logprobs: int | None = None
    """How many of the likeliest ids are reported beside the token's own log-probability; None reports none."""
    mask: NDArray[np.uint32] | None = None
    """Ids that may come, uint32 [⌈V / 32⌉], bit i % 32 of word i / 32; None allows all."""


class Drawn(Protocol):
    """Tokens under way."""

    @property
    def left(self) -> Mapping[int, str]:
        """Rows of the draw whose token is not drawn here, by place, each with the reason."""
        ...

    def tokens(self) -> list[int]:
        """One a row, waited for: −1 for one that was left, whose logits held NaN or +inf, or in which no id might come."""
        ...


class Drawer(Protocol):
    """Draws where a session's logits lie. Steps of that session may take for a token −2 − i, which is what row i of the last draw gave."""

    def draw(self, logits: Logits, rows: Sequence[int], wanted: Sequence[Wanted]) -> Drawn:
        """Begin to draw from ``rows`` of what the session's last step left, one token each; nothing is waited for. Keys that are not
        among ``wanted`` are forgotten."""
        ...
