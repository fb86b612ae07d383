"""Pages of the native cache, and which sequence holds which."""

import dataclasses
import weakref
from collections.abc import Sequence

from hasten import _native
from hasten.base.errors import UserError


class PageAllocator:
    """Free pages of one pool; the lowest free number goes first, so that a short run touches little memory."""

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages - 1, -1, -1))
        self._pages = pages

    def take(self) -> int:
        """A page nobody holds. Raises UserError where none is left."""
        if not self._free:
            raise UserError(f"the cache's {self._pages} pages are all in use; run fewer or shorter sequences at once")
        return self._free.pop()

    def give_back(self, pages: Sequence[int]) -> None:
        """Let others have these pages."""
        self._free.extend(reversed(pages))

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)


class CachedSequence:
    """One sequence's pages in every group, and how many of its tokens are there. Its pages go back when nobody refers to it."""

    def __init__(self, allocators: Sequence[PageAllocator], page: int) -> None:
        self.length, self._room, self._page, self._allocators = 0, 0, page, tuple(allocators)
        self.table = _native.PageTable(len(self._allocators))
        weakref.finalize(self, _give_back, self._allocators, self.table)

    def grow(self, length: int) -> None:
        """Hold pages for ``length`` tokens."""
        while self._room < length:
            for group, allocator in enumerate(self._allocators):
                if len(self.table.pages(group)) * self._page == self._room:  # not yet taken before another pool ran out
                    self.table.append(group, allocator.take())
            self._room += self._page


def _give_back(allocators: tuple[PageAllocator, ...], table: _native.PageTable) -> None:
    for group, allocator in enumerate(allocators):
        allocator.give_back(table.pages(group))


@dataclasses.dataclass(frozen=True, slots=True)
class CpuState:
    """The sequences of a batch. A step appends to them in place: a state is used once, the step's result goes on."""

    sequences: tuple[CachedSequence, ...]

    def select(self, indices: Sequence[int]) -> "CpuState":
        """These sequences, in this order, each at most once."""
        if len(set(indices)) != len(indices):
            raise ValueError("a cached sequence cannot be forked yet; select each index once")
        return CpuState(tuple(self.sequences[index] for index in indices))

    def joined(self, other: "CpuState") -> "CpuState":
        """These sequences, then the other's."""
        return CpuState(self.sequences + other.sequences)
