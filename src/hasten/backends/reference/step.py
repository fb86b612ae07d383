"""Step: what the ops of one play share: the batch as tensors, the weights, and the state read and written."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hasten.backends.reference.state import Entry, State
from hasten.program import Batch, Program, StateRef

TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True, slots=True)
class Cohort:
    """Sequences of one batch that have the same length and start, and so can be computed together.

    ``sequences`` are their indices, ``rows`` their rows in the batch [B · length] or None where the group is the whole batch."""

    sequences: tuple[int, ...]
    length: int
    start: int
    rows: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """x[T, ...] → [B, length, ...]."""
        picked = x if self.rows is None else x[self.rows]
        return picked.reshape(len(self.sequences), self.length, *x.shape[1:])


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank addition to one linear layer (Hu et al. 2021): y += up · (down · x) · scale. down [rank, in], up [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float = 1.0


class Step:
    """One play in progress. ``state`` is what came in; ``kept`` collects what goes out, where it is wanted."""

    def __init__(
        self, program: Program, batch: Batch, weights: Mapping[str, Tensor], state: State | None, adapters: Mapping[str, Adapter],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.weights, self.state, self.adapters, self.device = weights, state, adapters, device
        self.state_groups = {group.name: group for group in program.states}
        self.tokens = torch.as_tensor(batch.tokens, device=device).long()
        self.positions = torch.as_tensor(batch.positions, device=device).long()
        every = np.array_equal(batch.rows, np.arange(len(batch.tokens)))
        self.rows = None if every else torch.as_tensor(batch.rows, device=device).long()
        self.ends = tuple(int(batch.positions[end - 1]) + 1 for end in batch.offsets[1:])
        self.cohorts = _cohorts(batch, device)
        self.contexts: dict[StateRef, list[tuple[Tensor, Tensor]]] = {}  # keys, values [B, C, K, d] of each cohort
        self.kept: dict[StateRef, list[Entry]] = {}
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def weight(self, name: str) -> Tensor:
        """A weight as it is stored for this play."""
        return self.weights[name]

    def optional(self, name: str | None) -> Tensor | None:
        """A weight, or None for None."""
        return None if name is None else self.weights[name]

    def past(self, ref: StateRef, sequence: int) -> Entry | None:
        """What was kept of ``sequence``, None at its beginning."""
        if self.state is None or ref not in self.state.entries:
            return None
        return self.state.entries[ref][sequence] or None

    def keep(self, ref: StateRef, cohort: Cohort, entries: Sequence[Entry]) -> None:
        """Hand on one entry per sequence of the group, if anybody wants a state."""
        if self.state is not None:
            slots = self.kept.setdefault(ref, [()] * self.state.sequences)
            for sequence, entry in zip(cohort.sequences, entries, strict=True):
                slots[sequence] = entry

    def scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """One [B, length, ...] per cohort → [T, ...] in batch order."""
        flat = [part.reshape(-1, *part.shape[2:]) for part in parts]
        if len(flat) == 1:
            return flat[0]
        order = torch.cat([cohort.rows for cohort in self.cohorts if cohort.rows is not None])
        return torch.cat(flat)[torch.argsort(order)]

    def table(self, key: tuple[object, ...], make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Cosines and sines shared by the layers of one play."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def new_state(self) -> State:
        """What this play leaves behind."""
        if self.state is None:
            return State(0)
        return State(self.state.sequences, {ref: tuple(entries) for ref, entries in self.kept.items()}, self.ends)


def _cohorts(batch: Batch, device: torch.device) -> list[Cohort]:
    offsets = batch.offsets.tolist()
    members: dict[tuple[int, int], list[int]] = {}
    for sequence, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        members.setdefault((end - begin, int(batch.positions[begin])), []).append(sequence)
    cohorts = []
    for (length, start), sequences in members.items():
        rows = None
        if len(members) > 1:
            rows = torch.cat([torch.arange(offsets[s], offsets[s] + length, device=device) for s in sequences])
        cohorts.append(Cohort(tuple(sequences), length, start, rows))
    return cohorts
