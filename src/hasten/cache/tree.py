"""The prefix tree: pages that outlive their sequence, found again by the exact tokens that made them.

A node is one page of tokens behind its parent's. It holds what is left of that page in each group: the keys and values, and a snapshot of
each recurrent state after its last token where one was taken. Roots are apart by key (model, adapter, cache format, exit policy, tenant),
so nothing is ever found under another key.

What is evicted is the page longest unused, group by group: where every token sees all before it the whole leaf, for without it nothing
behind it is reachable; of a windowed group the page alone, of a recurrent group the snapshot alone, for what stands behind may still do
without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterator, Sequence

from hasten.cache.groups import PageGroup, StatePages, TokenPages
from hasten.cache.pool import PagePool

NONE = -1  # stands for a page that is not there


class Node:
    """``pages`` by group; ``depth`` counts the pages of tokens from the root, this one included."""

    __slots__ = ("children", "depth", "pages", "parent", "tokens")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], pages: list[int]) -> None:
        self.parent, self.tokens, self.pages = parent, tokens, pages
        self.children: dict[tuple[int, ...], Node] = {}
        self.depth: int = 0 if parent is None else parent.depth + 1


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix that a sequence can go on from: its nodes from the first page on; none where there is none."""

    nodes: tuple[Node, ...]


class PrefixTree:
    """Nodes of ``page`` tokens over the groups' ``pools``."""

    def __init__(self, groups: Sequence[PageGroup], pools: Sequence[PagePool], page: int) -> None:
        self._groups, self._pools, self._page = tuple(groups), tuple(pools), page
        self._roots: dict[Hashable, Node] = {}
        self._keys: dict[Node, Hashable] = {}  # of the roots
        # Longest unused first. Of idle nodes, ancestors were used after their descendants, so that the first of them is a leaf.
        self._used: tuple[dict[Node, None], ...] = tuple({} for _ in groups)
        self.evicted = 0
        """Pages and snapshots that were let go for lack of room."""

    def root(self, key: Hashable) -> Node:
        """Where the prefixes under ``key`` begin."""
        if key not in self._roots:
            root = self._roots[key] = Node(None, (), [])
            self._keys[root] = key
        return self._roots[key]

    def find(self, key: Hashable, tokens: Sequence[int]) -> Match:
        """The longest known prefix of ``tokens`` that leaves at least one of them to compute. Nothing is changed."""
        node, path = self._roots.get(key), list[Node]()
        limit = (len(tokens) - 1) // self._page
        while node is not None and len(path) < limit:
            begin = len(path) * self._page
            node = node.children.get(tuple(tokens[begin : begin + self._page]))
            if node is not None:
                path.append(node)
        return Match(tuple(path[: self._resumable(path)]))

    def _resumable(self, path: Sequence[Node]) -> int:
        """How many of these nodes, from the first on, have all that the token behind them needs."""
        best, runs = len(path), [0] * len(self._groups)
        if all(not isinstance(group, StatePages) and group.sees_all for group in self._groups):
            return best
        best = 0
        for depth, node in enumerate(path, start=1):
            enough = True
            for index, group in enumerate(self._groups):
                there = node.pages[index] != NONE
                if isinstance(group, StatePages):
                    enough = enough and there
                else:
                    runs[index] = runs[index] + 1 if there else 0
                    enough = enough and runs[index] >= depth - group.oldest(depth * self._page) // self._page
            best = depth if enough else best
        return best

    def use(self, node: Node) -> None:
        """Note that the prefix which ends with ``node`` is in use now."""
        at: Node | None = node
        while at is not None and at.parent is not None:
            for used, page in zip(self._used, at.pages):
                if page != NONE:
                    used.pop(at, None)
                    used[at] = None
            at = at.parent

    def add(self, parent: Node, tokens: tuple[int, ...], pages: Sequence[int]) -> Node:
        """The node of ``tokens`` behind ``parent``, which shares the caller's ``pages`` (NONE where there is none) that it lacks."""
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(parent, tokens, [NONE] * len(self._groups))
        for index, page in enumerate(pages):
            if page != NONE and node.pages[index] == NONE:
                self._pools[index].keep(page)
                node.pages[index] = page
                self._used[index][node] = None
        return node

    def attached(self, node: Node) -> bool:
        """Is the node still in the tree?"""
        return node.parent is not None or node in self._keys

    def evict(self, group: int) -> bool:
        """Let go of the idle page of ``group`` that was longest unused; False where there is none."""
        pool = self._pools[group]
        if not pool.idle:
            return False
        kind, busy, found = self._groups[group], list[Node](), None
        whole = isinstance(kind, TokenPages) and kind.sees_all
        for node in self._used[group]:
            if pool.holders[node.pages[group]] == 1 and not (whole and node.children):
                found = node
                break
            busy.append(node)
        if found is None:
            return False
        for node in busy:  # they are in use now, in this order
            del self._used[group][node]
            self._used[group][node] = None
        for index in range(len(self._groups)) if whole else (group,):
            self._drop(found, index)
        self.evicted += 1
        self.prune(found)
        return True

    def _drop(self, node: Node, group: int) -> None:
        page = node.pages[group]
        if page != NONE:
            self._pools[group].drop(page)
            node.pages[group] = NONE
            self._used[group].pop(node, None)

    def prune(self, node: Node) -> None:
        """Remove the node if it is a leaf that holds nothing, and then its parent if that is one."""
        while not node.children and all(page == NONE for page in node.pages):
            parent, node.parent = node.parent, None
            if parent is None:
                self._roots.pop(self._keys.pop(node), None)
                return
            del parent.children[node.tokens]
            node = parent

    def forget(self, pages: Collection[tuple[int, int]]) -> None:
        """Remove every node that holds one of ``pages``, (group, page), and all behind it."""
        for node in list(self.nodes()):
            if self.attached(node) and any(each in pages for each in enumerate(node.pages)):
                for behind in reversed(list(self.nodes(node))):
                    for group in range(len(self._groups)):
                        self._drop(behind, group)
                    if self.attached(behind):  # and has not gone with what was behind it
                        self.prune(behind)

    def nodes(self, first: Node | None = None) -> Iterator[Node]:
        """All nodes, or ``first`` and those behind it; parents first."""
        stack = list(self._roots.values()) if first is None else [first]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node
