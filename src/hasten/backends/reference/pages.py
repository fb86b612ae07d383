"""Pages of the reference backend: dictionaries of tensors, made when something is first written to them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from hasten.backends.reference.state import Entry, State
from hasten.program import Batch, CopyPage, Move, PageLists, Program, RecurrentGroup, StateRef, SwapIn, SwapOut

Place = tuple[StateRef, int]
"""A page of one layer."""


class Pages:
    """What a Program's sequences keep, in pages of ``page`` tokens: of keys and values [page, heads, dim], of recurrent states all."""

    def __init__(self, program: Program, page: int) -> None:
        self._page, self._groups = page, program.states
        refs = sorted({ref for op in program.ops for ref in op.state_refs}, key=lambda ref: (ref.group, ref.slot))
        self._refs = {index: [ref for ref in refs if ref.group == group.name] for index, group in enumerate(program.states)}
        self._kept: dict[Place, Entry] = {}
        self._outside: dict[Place, Entry] = {}

    def carry_out(self, moves: Sequence[Move]) -> None:
        """Copy pages, swap them out and in, in this order."""
        for move in moves:
            for ref in self._refs[move.group]:
                match move:
                    case CopyPage():
                        _copy(self._kept, (ref, move.source), self._kept, (ref, move.target))
                    case SwapOut():
                        _copy(self._kept, (ref, move.source), self._outside, (ref, move.place))
                    case SwapIn():
                        _copy(self._outside, (ref, move.place), self._kept, (ref, move.target))
                        self._outside.pop((ref, move.place), None)

    def read(self, batch: Batch, pages: Sequence[PageLists]) -> State:
        """The state that ``batch`` goes on from."""
        starts = batch.positions[batch.offsets[:-1]].tolist()
        entries: dict[StateRef, tuple[Entry, ...]] = {}
        for index, group in enumerate(self._groups):
            read: Callable[[StateRef, Sequence[int], int], Entry] = (
                self._state if isinstance(group, RecurrentGroup) else _Rows(self._kept, self._page, group.oldest_visible)
            )
            for ref in self._refs[index]:
                entries[ref] = tuple(read(ref, table[index], start) if start else () for table, start in zip(pages, starts, strict=True))
        return State(len(starts), entries, tuple(starts))

    def _state(self, ref: StateRef, table: Sequence[int], start: int) -> Entry:
        return self._kept.get((ref, table[0]), ())

    def write(self, after: State, batch: Batch, pages: Sequence[PageLists]) -> None:
        """Keep what the step of ``batch`` left behind."""
        starts = batch.positions[batch.offsets[:-1]].tolist()
        for index, group in enumerate(self._groups):
            for ref in self._refs[index]:
                for sequence, entry in enumerate(after.entries.get(ref, ())):
                    table = pages[sequence][index]
                    if isinstance(group, RecurrentGroup):
                        self._kept[ref, table[0]] = entry
                    elif entry:
                        self._append(ref, table, entry, starts[sequence], after.length(sequence))

    def _append(self, ref: StateRef, table: Sequence[int], entry: Entry, start: int, end: int) -> None:
        """Write the rows of positions ``start`` to ``end``, of which ``entry`` has the last."""
        first = end - entry[0].shape[0]
        begin = max(start, first)
        while begin < end:
            index, at = divmod(begin, self._page)
            stop = min(end, (index + 1) * self._page)
            place = ref, table[index]
            if place not in self._kept:
                self._kept[place] = tuple(x.new_zeros((self._page, *x.shape[1:])) for x in entry)
            for kept, x in zip(self._kept[place], entry, strict=True):
                kept[at : at + stop - begin] = x[begin - first : stop - first]
            begin = stop


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """Reads the rows of one sequence and layer that the token at ``start`` still sees."""

    kept: Mapping[Place, Entry]
    page: int
    oldest: Callable[[int], int]

    def __call__(self, ref: StateRef, table: Sequence[int], start: int) -> Entry:
        begin = self.oldest(start)
        if begin == start:
            return ()
        parts = [self.kept[ref, each] for each in table[begin // self.page : -(-start // self.page)]]
        skipped = begin // self.page * self.page
        return tuple(torch.cat(tensors)[begin - skipped : start - skipped] for tensors in zip(*parts))


def _copy(source: dict[Place, Entry], at: Place, target: dict[Place, Entry], to: Place) -> None:
    """A page that nothing was ever written to has nothing to copy."""
    if at in source:
        target[to] = tuple(x.clone() for x in source[at])
    else:
        target.pop(to, None)
