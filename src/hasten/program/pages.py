"""Pages of state, as data: which a sequence has, and what must happen to them before a step. A cache decides, a backend carries out.

A page belongs to a state group, named by its place among the Program's groups. Of keys and values it holds some tokens, of all the
group's layers; of a recurrent group it is one sequence's whole state."""

import dataclasses
from collections.abc import Mapping
from itertools import accumulate

import numpy as np

from hasten.base.errors import UserError
from hasten.program.batch import Batch
from hasten.program.program import Program, RecurrentGroup, StateGroup, most_seen


@dataclasses.dataclass(frozen=True, slots=True)
class CopyPage:
    """What is in page ``source`` of ``group`` is also to be in page ``target``."""

    group: int
    source: int
    target: int


@dataclasses.dataclass(frozen=True, slots=True)
class SwapOut:
    """What is in page ``source`` of ``group`` goes to ``place``, outside the pool."""

    group: int
    source: int
    place: int


@dataclasses.dataclass(frozen=True, slots=True)
class SwapIn:
    """What is at ``place`` comes back, to page ``target`` of ``group``; the place is free then."""

    group: int
    place: int
    target: int


Move = CopyPage | SwapOut | SwapIn


class StateLostError(RuntimeError):
    """A step failed after it had begun: recurrent states of its sequences may have moved on, so none can go on from its pages."""


PageLists = list[list[int]]
"""One sequence's pages, group by group: those of a paged group in the order of positions, of a recurrent group the one. A page that no
later token sees may have gone back, and any number may stand for it."""

MOST_SEQUENCES = 64  # of full length, that pages are made for where memory allows it


STEP = 512  # tokens of one sequence that a step is counted with, where a window slides over them


def page_counts(program: Program, page: int, memory: int) -> Mapping[str, int]:
    """How many pages of ``page`` tokens each state group has, by name: as many as ``memory`` bytes hold together, and no more than 64
    sequences of full length need; no fewer than a whole one has, for scoring goes through it without giving pages back. Of recurrent
    states, as many again for snapshots."""
    whole = -(-program.context // page)
    sequences = min(MOST_SEQUENCES, max(1.0, (memory - scored_bytes(program, page)) / max(1, sequence_bytes(program, page))))
    return {
        group.name: 2 * int(sequences)
        if isinstance(group, RecurrentGroup)
        else max(whole, int(sequences * _pages_of(group, program.context, page)))
        for group in program.states
    }


def sequence_bytes(program: Program, page: int) -> int:
    """Bytes of what one sequence of full length keeps, in pages of ``page`` tokens: under a window, of the last ones; recurrent states
    twice, for a snapshot each."""
    return sum(
        group.bytes_per_token() * page * _pages_of(group, program.context, page) + 2 * group.bytes_per_sequence()
        for group in program.states
    )


def scored_bytes(program: Program, page: int) -> int:
    """Bytes of what one sequence of full length needs besides where it is scored, which gives no pages back: those that windows let go."""
    whole = -(-program.context // page)
    return sum(
        group.bytes_per_token() * page * max(0, whole - _pages_of(group, program.context, page))
        for group in program.states
        if not isinstance(group, RecurrentGroup)
    )


def pages_held(seen: int | None, length: int, step: int, page: int) -> int:
    """Most pages of ``page`` tokens that a sequence holds on its way to ``length`` tokens, at most ``step`` of them at once, where a token
    sees the last ``seen`` (None: all)."""
    whole = -(-length // page)
    return whole if seen is None else min(whole, (seen + step - 2) // page + 2)


def _pages_of(group: StateGroup, context: int, page: int) -> int:
    """Pages of a group that a sequence of ``context`` tokens holds at most."""
    return 0 if isinstance(group, RecurrentGroup) else pages_held(most_seen(group.visible), context, STEP, page)


def first_pages(program: Program, batch: Batch, page: int, pages: Mapping[str, int]) -> list[PageLists]:
    """Pages for whole sequences that nothing is carried on of: of each group the first ones, each sequence's behind those of the one
    before. Raises UserError where there are fewer, by group ``pages``."""
    needed = (-(-np.diff(batch.offsets) // page)).tolist()
    counts = [[1] * len(needed) if isinstance(group, RecurrentGroup) else needed for group in program.states]
    ends = [list(accumulate(each)) for each in counts]
    for group, stops in zip(program.states, ends):
        if stops[-1] > (most := pages[group.name]):
            raise UserError(f"{stops[-1]} pages are more than the cache's {most}; score fewer or shorter sequences at once")
    return [[list(range(stops[s] - each[s], stops[s])) for each, stops in zip(counts, ends)] for s in range(len(needed))]
