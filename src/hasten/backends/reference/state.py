"""State between steps, as values: a step takes one and returns another, so that gradients and rollback need nothing special."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.program import Batch, StateRef

Entry = tuple[Tensor, ...]
"""What one layer keeps of one sequence: keys (and values) [kept, heads, dim], or one recurrent array."""


@dataclasses.dataclass(frozen=True)
class State:
    """For each layer's StateRef, one Entry per sequence; a missing ref or an empty Entry means that nothing was kept yet.

    ``lengths`` says how many tokens of each sequence went in (none unless given). A row that left at a cut is owed to the second
    part: hand in its crossing values with those of the next row that goes on, so that every position is there."""

    sequences: int
    entries: Mapping[StateRef, tuple[Entry, ...]] = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.lengths) not in {0, self.sequences}:
            raise ConfigError(f"{len(self.lengths)} lengths for {self.sequences} sequences; one each is needed")

    def length(self, sequence: int) -> int:
        """Tokens of ``sequence`` that went in."""
        return self.lengths[sequence] if self.lengths else 0

    def check(self, batch: Batch) -> None:
        """Raise ConfigError unless ``batch`` goes on where this state ends."""
        if len(batch.offsets) - 1 != self.sequences:
            raise ConfigError(f"a batch of {len(batch.offsets) - 1} sequences does not go on from a state of {self.sequences}")
        for sequence, row in enumerate(batch.offsets[:-1].tolist()):
            if int(batch.positions[row]) != self.length(sequence):
                position, length = int(batch.positions[row]), self.length(sequence)
                raise ConfigError(f"sequence {sequence} goes on at position {position}, but {length} of its tokens went in")

    def select(self, indices: Sequence[int]) -> "State":
        """The state of these sequences, in this order; repeating one forks it."""
        return State(
            len(indices),
            {ref: tuple(entries[i] for i in indices) for ref, entries in self.entries.items()},
            tuple(self.length(i) for i in indices),
        )

    def joined(self, other: "State") -> "State":
        """These sequences, then the other's."""
        refs = {*self.entries, *other.entries}
        nothing: tuple[Entry, ...] = ((),)
        return State(
            self.sequences + other.sequences,
            {ref: self.entries.get(ref, nothing * self.sequences) + other.entries.get(ref, nothing * other.sequences) for ref in refs},
            (*map(self.length, range(self.sequences)), *map(other.length, range(other.sequences))),
        )

    def detached(self) -> "State":
        """The same numbers, cut off from the graph that made them."""
        return State(
            self.sequences,
            {ref: tuple(tuple(t.detach() for t in entry) for entry in entries) for ref, entries in self.entries.items()},
            self.lengths,
        )
