"""Moves: what must happen to a backend's pages before a step, as data. A cache decides them, a backend carries them out in their order.

A page belongs to a state group, named by its place among the Program's groups. Of keys and values it holds some tokens, of all the
group's layers; of a recurrent group it is one sequence's whole state."""

import dataclasses


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
