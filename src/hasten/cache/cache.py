"""Cache: decides which page holds what. It touches no memory; what must be copied it says as moves, for a backend to carry out."""

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Sequence

from hasten.cache.groups import PageGroup, StatePages, TokenPages
from hasten.cache.pool import PagePool
from hasten.cache.tree import NONE, Match, Node, PrefixTree
from hasten.program.pages import CopyPage, Move, PageLists, SwapIn, SwapOut, pages_held

STANDS_IN = 0  # in a list of pages, for one that went back


class SequencePages:
    """One sequence's pages. ``tables`` has them by group, ``gone`` how many of a group's first ones went back, ``length`` how many of the
    sequence's tokens are in them, and ``room`` how many would be. ``places`` has, by group, where those lie that were swapped out."""

    __slots__ = ("gone", "key", "length", "node", "places", "room", "tables")

    def __init__(self, groups: int, key: Hashable | None) -> None:
        self.tables: PageLists = [[] for _ in range(groups)]
        self.gone = [0] * groups
        self.length = self.room = 0
        self.key = key  # of its prefixes; None for a sequence that shares none
        self.node: Node | None = None  # the deepest page of it that the prefix tree has
        self.places: PageLists | None = None

    @property
    def fresh(self) -> bool:
        """Does it hold nothing?"""
        return not self.room and not self.length


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """What does not hold what the cache says: ``pages`` and ``places``, each (group, number)."""

    pages: frozenset[tuple[int, int]]
    places: frozenset[tuple[int, int]]


class Cache:
    """Pages of ``page`` tokens for the sequences of one Program. ``places`` is how many pages can be swapped out, by group (none unless
    given). With ``prefixes``, what a sequence leaves behind is found again by any that begins with the same tokens.

    Nothing here fails half-way: what cannot be done changes nothing and says so."""

    def __init__(self, groups: Sequence[PageGroup], page: int, places: Sequence[int] = (), prefixes: bool = True) -> None:
        self.groups, self.page = tuple(groups), page
        self.pools = tuple(PagePool(group.pages) for group in groups)
        self.places = tuple(PagePool(count) for count in (places or [0] * len(self.groups)))
        self.tree = PrefixTree(self.groups, self.pools, page) if prefixes else None
        self.snapshots = any(isinstance(group, StatePages) for group in groups)
        """Can a sequence go on only from where a snapshot was taken?"""
        self._moves: list[Move] = []
        self._paged = [index for index, group in enumerate(groups) if isinstance(group, TokenPages)]
        self._windowed = [(index, group) for index, group in enumerate(groups) if isinstance(group, TokenPages) and not group.sees_all]

    def start(self, key: Hashable | None = None) -> SequencePages:
        """A sequence that has seen nothing. Sequences of the same ``key`` share prefixes; one of None shares with none."""
        return SequencePages(len(self.groups), key)

    def take_moves(self) -> tuple[Move, ...]:
        """What is to be carried out before the next step, in order; told once."""
        moves, self._moves = tuple(self._moves), []
        return moves

    def lose(self, moves: Sequence[Move]) -> Lost:
        """``moves`` were not carried out, or not all of them: no prefix is found any more where one was to write."""
        pages = frozenset((move.group, move.target) for move in moves if not isinstance(move, SwapOut))
        if self.tree is not None:
            self.tree.forget(pages)
        return Lost(pages, frozenset((move.group, move.place) for move in moves if isinstance(move, SwapOut)))

    def hurt(self, sequence: SequencePages, lost: Lost) -> bool:
        """Does the sequence have anything of what is ``lost``?"""
        tables = (table[gone:] for table, gone in zip(sequence.tables, sequence.gone))
        return _any_of(tables, lost.pages) or _any_of(sequence.places or (), lost.places)

    # --- room

    def grow(self, sequence: SequencePages, length: int) -> bool:
        """Make room for ``length`` tokens, more than it has; those to come go to pages of its own. False where there are no pages."""
        last, filled = divmod(sequence.length, self.page)
        copied = []
        if filled:
            copied = [index for index in self._paged if self.pools[index].holders[sequence.tables[index][last]] > 1]
        if length <= sequence.room and not copied:
            return True
        more = max(0, -(-(length - sequence.room) // self.page))
        for index, group in enumerate(self.groups):
            needed = more + (index in copied) if isinstance(group, TokenPages) else not sequence.tables[index]
            if self.pools[index].available < needed:
                return False
        for index in copied:
            shared, own = sequence.tables[index][last], self._take(index)
            self._moves.append(CopyPage(index, shared, own))
            self.pools[index].give_back(shared)
            sequence.tables[index][last] = own
        for index, (group, table) in enumerate(zip(self.groups, sequence.tables)):
            if isinstance(group, TokenPages):
                table.extend([self._take(index) for _ in range(more)])
            elif not table:
                table.append(self._take(index))
        sequence.room += more * self.page
        return True

    def _take(self, index: int) -> int:
        pool = self.pools[index]
        if not pool.free and self.tree is not None:
            self.tree.evict(index)
        return pool.take()

    def pages_for(self, index: int, length: int, step: int) -> int:
        """Most pages of a group that a sequence holds on its way to ``length`` tokens, at most ``step`` of them at once."""
        group = self.groups[index]
        return 1 if isinstance(group, StatePages) else pages_held(group.most_seen(), length, step, self.page)

    def held(self, sequence: SequencePages, index: int) -> int:
        """Pages of a group that a sequence holds."""
        return len(sequence.tables[index]) - sequence.gone[index]

    # --- going on

    def advance(self, sequence: SequencePages, tokens: Sequence[int], length: int, snapshot: bool = False) -> None:
        """``length`` of its ``tokens`` are in its pages now: let others find them, and give back what no later token sees.

        A sequence with recurrent state is found only at a ``snapshot``, which is taken where ``length`` ends a page."""
        sequence.length = length
        if self.tree is not None and sequence.key is not None:
            depth = 0 if sequence.node is None else sequence.node.depth
            if self.snapshots:
                if snapshot and length and length % self.page == 0:
                    self._insert(self.tree, sequence, tokens, snapshot=True)
            elif length // self.page > depth:
                self._insert(self.tree, sequence, tokens, snapshot=False)
        for index, group in self._windowed:
            gone, table = group.oldest(length) // self.page, sequence.tables[index]
            while sequence.gone[index] < gone:
                self.pools[index].give_back(table[sequence.gone[index]])
                table[sequence.gone[index]] = STANDS_IN
                sequence.gone[index] += 1

    def _insert(self, tree: PrefixTree, sequence: SequencePages, tokens: Sequence[int], snapshot: bool) -> None:
        """Bring the tree up to the sequence's full pages. Where the tree has a page already, the sequence takes that for its own."""
        full = sequence.length // self.page
        taken = self._snapshot(sequence) if snapshot else [NONE] * len(self.groups)  # first, for it may evict nodes
        if taken is None:
            return
        node = sequence.node
        if node is None or not tree.attached(node):
            node = tree.root(sequence.key)
        for depth in range(node.depth, full):
            pages = [
                NONE if isinstance(group, StatePages) or depth < sequence.gone[index] else sequence.tables[index][depth]
                for index, group in enumerate(self.groups)
            ]
            if depth + 1 == full:
                pages = [page if snapshot == NONE else snapshot for page, snapshot in zip(pages, taken)]
            node = tree.add(node, tuple(tokens[depth * self.page : (depth + 1) * self.page]), pages)
            self._take_over(sequence, node, depth, pages)
        tree.prune(node)  # of one that was swapped out meanwhile all full pages may be gone
        sequence.node = node

    def _snapshot(self, sequence: SequencePages) -> list[int] | None:
        """Copies of its recurrent states, by group; None where there is no room for one of them."""
        kept = [index for index, group in enumerate(self.groups) if isinstance(group, StatePages)]
        if any(not self.pools[index].available for index in kept):
            return None
        pages = [NONE] * len(self.groups)
        for index in kept:
            pages[index] = self._take(index)
            self._moves.append(CopyPage(index, sequence.tables[index][0], pages[index]))
        return pages

    def _take_over(self, sequence: SequencePages, node: Node, depth: int, pages: Sequence[int]) -> None:
        """Hold the node's page instead of an own one of the same tokens."""
        for index, (group, own) in enumerate(zip(self.groups, pages)):
            if own == NONE:
                continue
            if isinstance(group, StatePages):
                self.pools[index].give_back(own)  # the tree has the snapshot, this one or an earlier
            elif node.pages[index] != own:
                self.pools[index].share(node.pages[index])
                self.pools[index].give_back(own)
                sequence.tables[index][depth] = node.pages[index]

    # --- prefixes

    def find(self, sequence: SequencePages, tokens: Sequence[int]) -> Match:
        """What is known of the beginning of ``tokens``. Nothing is changed."""
        if self.tree is None or sequence.key is None:
            return Match(())
        return self.tree.find(sequence.key, tokens)

    def cost(self, match: Match, index: int) -> int:
        """How many pages of a group fewer are to be had once a sequence goes on from ``match``."""
        pool, group = self.pools[index], self.groups[index]
        if isinstance(group, StatePages):
            return 0
        pages = [node.pages[index] for node in match.nodes]
        return sum(page != NONE and pool.holders[page] == 1 for page in pages[self._first(group, len(pages)) :])

    def _first(self, group: TokenPages, depth: int) -> int:
        """The first page that a sequence needs which goes on after ``depth`` of them."""
        return group.oldest(depth * self.page) // self.page

    def adopt(self, sequence: SequencePages, match: Match) -> bool:
        """Let a fresh sequence go on from ``match``; False where there is nothing to go on from, or no page for its recurrent state."""
        if self.tree is None or not match.nodes or not self.tree.attached(match.nodes[-1]):
            return False
        if any(isinstance(group, StatePages) and not pool.available for group, pool in zip(self.groups, self.pools)):
            return False
        node, depth = match.nodes[-1], len(match.nodes)
        self.tree.use(node)
        for index, (group, pool) in enumerate(zip(self.groups, self.pools)):
            if isinstance(group, StatePages):
                source, own = node.pages[index], self._take(index)
                if own != source:  # else the snapshot itself had to make room, for itself
                    self._moves.append(CopyPage(index, source, own))
                sequence.tables[index] = [own]
                continue
            first = self._first(group, depth)
            pages = [each.pages[index] for each in match.nodes[first:]]
            for page in pages:
                pool.share(page)
            sequence.tables[index], sequence.gone[index] = [STANDS_IN] * first + pages, first
        sequence.length = sequence.room = depth * self.page
        sequence.node = node
        return True

    # --- leaving, forking, swapping

    def fork(self, sequence: SequencePages) -> SequencePages:
        """Another sequence with the same tokens in the same pages, which whoever writes first copies.

        A fresh one where a recurrent state would have to be copied and there is no page for it."""
        other = self.start(sequence.key)
        if any(isinstance(group, StatePages) and not pool.available for group, pool in zip(self.groups, self.pools)):
            return other
        held = -(-sequence.length // self.page)
        for index, (group, pool) in enumerate(zip(self.groups, self.pools)):
            if isinstance(group, StatePages):
                other.tables[index] = [self._take(index)]
                self._moves.append(CopyPage(index, sequence.tables[index][0], other.tables[index][0]))
                continue
            other.tables[index], other.gone[index] = sequence.tables[index][:held], sequence.gone[index]
            for page in other.tables[index][other.gone[index] :]:
                pool.share(page)
        other.length, other.room, other.node = sequence.length, held * self.page, sequence.node
        return other

    def free(self, sequence: SequencePages) -> None:
        """Give back all it holds, here and outside; it is fresh then."""
        if self.tree is not None and sequence.node is not None and self.tree.attached(sequence.node):
            self.tree.use(sequence.node)
        for index, pool in enumerate(self.pools):
            for page in reversed(sequence.tables[index][sequence.gone[index] :]):
                pool.give_back(page)
        for index, places in enumerate(sequence.places or ()):
            for place in places:
                self.places[index].give_back(place)
        self._forget(sequence)
        sequence.places, sequence.length = None, 0

    def _forget(self, sequence: SequencePages) -> None:
        sequence.tables, sequence.gone = [[] for _ in self.groups], [0] * len(self.groups)
        sequence.room, sequence.node = 0, None

    def can_swap_out(self, sequence: SequencePages) -> bool:
        """Is there a place outside for each of its pages?"""
        return all(places.free >= self.held(sequence, index) for index, places in enumerate(self.places))

    def swap_out(self, sequence: SequencePages) -> None:
        """Move all its pages outside, but for those of tokens to come; it keeps its length."""
        outside: PageLists = []
        for index, (pool, places) in enumerate(zip(self.pools, self.places)):
            outside.append([])
            table = sequence.tables[index]
            while isinstance(self.groups[index], TokenPages) and (len(table) - 1) * self.page >= sequence.length:
                pool.give_back(table.pop())
            for page in table[sequence.gone[index] :]:
                outside[index].append(places.take())
                self._moves.append(SwapOut(index, page, outside[index][-1]))
                pool.give_back(page)
        gone, sequence.places = sequence.gone, outside
        self._forget(sequence)
        sequence.gone = gone

    def swap_in(self, sequence: SequencePages) -> bool:
        """Bring its pages back into the pools; False where there is no room."""
        outside = sequence.places
        if outside is None or any(pool.available < len(places) for pool, places in zip(self.pools, outside)):
            return False
        for index, places in enumerate(outside):
            table = [STANDS_IN] * sequence.gone[index]
            for place in places:
                table.append(self._take(index))
                self._moves.append(SwapIn(index, place, table[-1]))
                self.places[index].give_back(place)
            sequence.tables[index] = table
        sequence.room, sequence.places = -(-sequence.length // self.page) * self.page, None
        return True

    def empty_share(self, sequences: Sequence[SequencePages]) -> float:
        """Which part of the tokens that the sequences' pages would hold is empty: the waste of paging."""
        room = sum(sequence.room for sequence in sequences)
        return 1 - sum(sequence.length for sequence in sequences) / room if room else 0.0


def _any_of(tables: Iterable[Sequence[int]], lost: Collection[tuple[int, int]]) -> bool:
    return any((group, page) in lost for group, table in enumerate(tables) for page in table)
