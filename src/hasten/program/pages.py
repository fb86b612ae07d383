"""Pages of state, as data: which a sequence has, and what must happen to them before a step. A cache decides, a backend carries out.

A page belongs to a state group, named by its place among the Program's groups. Of keys and values it holds some tokens, of all the
group's layers; of a recurrent group it is one sequence's whole state."""

import dataclasses
from collections.abc import Mapping

from hasten.program.program import Program, RecurrentGroup


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

PageLists = list[list[int]]
"""One sequence's pages, group by group: those of a paged group in the order of positions, of a recurrent group the one. A page that no
later token sees may have gone back, and any number may stand for it."""

MOST_SEQUENCES = 64  # of full length, that pages are made for where memory allows it


def page_counts(program: Program, page: int, memory: int) -> Mapping[str, int]:
    """How many pages of ``page`` tokens each state group has, by name: as many as ``memory`` bytes hold together, no fewer than one
    sequence of full length needs, and no more than 64 do. Of recurrent states, as many again for snapshots."""
    whole = -(-program.context // page)
    sequences = min(MOST_SEQUENCES, max(1.0, memory / max(1, sequence_bytes(program, page))))
    return {group.name: 2 * int(sequences) if isinstance(group, RecurrentGroup) else int(sequences * whole) for group in program.states}


def sequence_bytes(program: Program, page: int) -> int:
    """Bytes of what one sequence of full length keeps, in pages of ``page`` tokens; recurrent states twice, for a snapshot each."""
    whole = -(-program.context // page) * page
    return sum(group.bytes_per_token() * whole + 2 * group.bytes_per_sequence() for group in program.states)
