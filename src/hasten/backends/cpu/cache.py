"""Pages of the native cache, and which sequences hold which.

A page may belong to several sequences, which share what they have in common; the page a sequence writes to is its own."""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence

from hasten import _native
from hasten.base.errors import UserError

GONE = -1  # stands in a list of pages for one that no later token sees


class PageAllocator:
    """Free pages of one pool, and how many hold each of the others. The page that came back last goes first, at first the lowest, so
    that a short run touches little memory."""

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages

    def take(self) -> int:
        """A page nobody holds. Raises UserError where none is left."""
        if not self._free:
            raise UserError(f"the cache's {len(self._holders)} pages are all in use; run fewer or shorter sequences at once")
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more holds each of these pages."""
        for page in pages:
            self._holders[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One fewer holds each of these pages; those nobody holds are free."""
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is held by nobody")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def shared(self, page: int) -> bool:
        """Do several hold this page?"""
        return self._holders[page] > 1

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)


@dataclasses.dataclass(frozen=True, slots=True)
class PagedGroup:
    """A state group's pages: who holds them, ``copy(from, to)`` of one over another, ``oldest(position)`` that a query there sees."""

    allocator: PageAllocator
    copy: Callable[[int, int], None]
    oldest: Callable[[int], int]


class CachedSequence:
    """One sequence's pages of ``page`` tokens in every group, and how many of its tokens are there. Its pages go back when nobody refers
    to it.

    ``gone`` is, per group, how many of its first pages went back; they stand as page 0 in ``table``, where no token looks."""

    def __init__(self, groups: Sequence[PagedGroup], page: int) -> None:
        self.length, self._room, self._page, self._groups = 0, 0, page, tuple(groups)
        self._shares = False  # is the page it writes to next perhaps another's too?
        self.table, self.gone = _native.PageTable(len(self._groups)), [0] * len(self._groups)
        weakref.finalize(self, _give_back, [group.allocator for group in self._groups], self.table, self.gone)

    def pages(self, group: int) -> list[int]:
        """Its pages, GONE for those that went back."""
        gone = self.gone[group]
        return [GONE] * gone + self.table.pages(group)[gone:]

    def grow(self, length: int) -> None:
        """Hold pages for ``length`` tokens, those from its own length on for itself alone: a shared page it would write to is copied."""
        if self._shares and length > self.length:
            self._own_last()
        while self._room < length:
            for index, group in enumerate(self._groups):
                if len(self.table.pages(index)) * self._page == self._room:  # not yet taken before another pool ran out
                    self.table.append(index, group.allocator.take())
            self._room += self._page

    def _own_last(self) -> None:
        last, filled = divmod(self.length, self._page)
        for index, group in enumerate(self._groups if filled else ()):
            shared = self.table.page(index, last)
            if group.allocator.shared(shared):
                own = group.allocator.take()
                group.copy(shared, own)
                group.allocator.give_back([shared])
                self.table.replace(index, last, own)
        self._shares = False

    def forked(self) -> "CachedSequence":
        """Another sequence with the same tokens, in the same pages."""
        other = CachedSequence(self._groups, self._page)
        held = -(-self.length // self._page)
        other.length, other._room = self.length, held * self._page
        self._shares = other._shares = True
        for index, group in enumerate(self._groups):
            pages, gone = self.table.pages(index)[:held], self.gone[index]
            group.allocator.share(pages[gone:])
            other.gone[index] = gone
            for page in pages:
                other.table.append(index, page)
        return other

    def release(self) -> None:
        """Give back the pages that no token after the newest sees."""
        for index, group in enumerate(self._groups):
            while self.gone[index] < group.oldest(self.length) // self._page:
                group.allocator.give_back([self.table.page(index, self.gone[index])])
                self.table.replace(index, self.gone[index], 0)
                self.gone[index] += 1


def _give_back(allocators: Sequence[PageAllocator], table: _native.PageTable, gone: Sequence[int]) -> None:
    for index, allocator in enumerate(allocators):
        allocator.give_back(table.pages(index)[gone[index] :])


@dataclasses.dataclass(frozen=True, slots=True)
class CpuState:
    """The sequences of a batch. A step appends to them in place: a state is used once, the step's result goes on."""

    sequences: tuple[CachedSequence, ...]

    def select(self, indices: Sequence[int]) -> "CpuState":
        """These sequences, in this order; repeating one forks it, and pages are shared until they are written to."""
        chosen = [self.sequences[index] for index in indices]
        return CpuState(tuple(one.forked() if one in chosen[:place] else one for place, one in enumerate(chosen)))

    def joined(self, other: "CpuState") -> "CpuState":
        """These sequences, then the other's."""
        return CpuState(self.sequences + other.sequences)
