"""State between steps, as values: a step takes one and returns another, so that gradients and rollback need nothing special."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from hasten.program import StateRef

Entry = tuple[Tensor, ...]
"""What one layer keeps of one sequence: keys (and values) [kept, heads, dim], or one recurrent array."""


@dataclasses.dataclass(frozen=True)
class State:
    """For each layer's StateRef, one Entry per sequence; a missing ref or an empty Entry means that nothing was kept yet."""

    sequences: int
    entries: Mapping[StateRef, tuple[Entry, ...]] = dataclasses.field(default_factory=dict)

    def select(self, indices: Sequence[int]) -> "State":
        """The state of these sequences, in this order; repeating one forks it."""
        return State(len(indices), {ref: tuple(entries[i] for i in indices) for ref, entries in self.entries.items()})

    def joined(self, other: "State") -> "State":
        """These sequences, then the other's."""
        refs = {*self.entries, *other.entries}
        nothing: tuple[Entry, ...] = ((),)
        return State(
            self.sequences + other.sequences,
            {ref: self.entries.get(ref, nothing * self.sequences) + other.entries.get(ref, nothing * other.sequences) for ref in refs},
        )

    def detached(self) -> "State":
        """The same numbers, cut off from the graph that made them."""
        return State(
            self.sequences, {ref: tuple(tuple(t.detach() for t in entry) for entry in entries) for ref, entries in self.entries.items()}
        )
