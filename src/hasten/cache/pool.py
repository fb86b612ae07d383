"""The pages of one state group: which are free, and how many hold each of the others."""


class PagePool:
    """Counts of holders. The prefix tree is a holder like any other, but one that can be made to let go: a page that it alone holds is
    *idle*. The page that came back last goes first, at first the lowest, so that a short run touches little memory."""

    __slots__ = ("_free", "_in_tree", "holders", "idle", "pages")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.holders = [0] * pages
        self.idle = 0
        """Pages that the prefix tree alone holds."""
        self._free = list(range(pages - 1, -1, -1))
        self._in_tree = bytearray(pages)

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that can be had: nobody holds them, or the prefix tree alone."""
        return len(self._free) + self.idle

    def take(self) -> int:
        """A page nobody holds, now with one holder. Raises IndexError where none is free."""
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holds this page."""
        if self.holders[page] == 1 and self._in_tree[page]:
            self.idle -= 1
        self.holders[page] += 1

    def give_back(self, page: int) -> None:
        """One fewer holds this page. Raises ValueError where nobody but the prefix tree does."""
        left = self.holders[page] - 1
        if left < self._in_tree[page]:
            raise ValueError(f"page {page} is held by nobody")
        self.holders[page] = left
        if not left:
            self._free.append(page)
        elif left == 1 and self._in_tree[page]:
            self.idle += 1

    def keep(self, page: int) -> None:
        """The prefix tree becomes a holder of a page that somebody holds."""
        if self._in_tree[page] or not self.holders[page]:
            raise ValueError(f"page {page} is in the prefix tree already, or held by nobody")
        self._in_tree[page] = 1
        self.holders[page] += 1

    def drop(self, page: int) -> None:
        """The prefix tree lets go of a page."""
        if not self._in_tree[page]:
            raise ValueError(f"page {page} is not in the prefix tree")
        self._in_tree[page] = 0
        self.holders[page] -= 1
        if not self.holders[page]:
            self.idle -= 1
            self._free.append(page)
