"""Pages of the native cache, and which sequences hold which.

A page may belong to several sequences, which share what they have in common; the page a sequence writes to is its own."""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence

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
    to it."""

    def __init__(self, groups: Sequence[PagedGroup], page: int) -> None:
        self.length, self._page, self._groups = 0, page, tuple(groups)
        self.pages: tuple[list[int], ...] = tuple([] for _ in groups)
        weakref.finalize(self, _give_back, [group.allocator for group in groups], self.pages)

    def grow(self, length: int) -> None:
        """Hold pages for ``length`` tokens, those from its own length on for itself alone: a shared page it would write to is copied."""
        last, filled = divmod(self.length, self._page)
        for pages, group in zip(self.pages, self._groups):
            if filled and group.allocator.shared(pages[last]):
                own = group.allocator.take()
                group.copy(pages[last], own)
                group.allocator.give_back([pages[last]])
                pages[last] = own
            while len(pages) * self._page < length:
                pages.append(group.allocator.take())

    def forked(self) -> "CachedSequence":
        """Another sequence with the same tokens, in the same pages."""
        other = CachedSequence(self._groups, self._page)
        other.length = self.length
        for mine, its, group in zip(self.pages, other.pages, self._groups):
            held = mine[: -(-self.length // self._page)]
            group.allocator.share(page for page in held if page != GONE)
            its.extend(held)
        return other

    def release(self) -> None:
        """Give back the pages that no token after the newest sees."""
        for pages, group in zip(self.pages, self._groups):
            for index in range(group.oldest(self.length) // self._page - 1, -1, -1):
                if pages[index] == GONE:
                    break
                group.allocator.give_back([pages[index]])
                pages[index] = GONE


def _give_back(allocators: Sequence[PageAllocator], pages: tuple[list[int], ...]) -> None:
    for allocator, held in zip(allocators, pages):
        allocator.give_back([page for page in held if page != GONE])


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
