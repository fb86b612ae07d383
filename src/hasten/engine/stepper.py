"""Stepper: a backend's session stepped by hand, for measurements and tests that say themselves what each step computes."""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, UserError
from hasten.cache import Cache, SequencePages, page_groups
from hasten.engine.session import Session
from hasten.program import Batch, PageLists


class Stepped:
    """One sequence; its pages go back when nobody refers to it."""

    def __init__(self, cache: Cache, pages: SequencePages) -> None:
        self.pages, self._cache = pages, cache
        weakref.finalize(self, cache.free, pages)

    @property
    def length(self) -> int:
        """Tokens that are in its pages."""
        return self.pages.length

    def forked(self) -> "Stepped":
        """Another with the same tokens."""
        return Stepped(self._cache, self._cache.fork(self.pages))


@dataclasses.dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of a batch. A step appends to them in place."""

    sequences: tuple[Stepped, ...]

    def select(self, indices: Sequence[int]) -> "Sequences":
        """These sequences, in this order; repeating one forks it."""
        chosen = [self.sequences[index] for index in indices]
        return Sequences(tuple(one.forked() if one in chosen[:place] else one for place, one in enumerate(chosen)))

    def joined(self, other: "Sequences") -> "Sequences":
        """These sequences, then the other's."""
        return Sequences(self.sequences + other.sequences)


class Stepper:
    """Sequences over a ``session`` that nobody else uses."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.cache = Cache(page_groups(session.program.states, session.page, session.pages), session.page, prefixes=False)

    def start(self, sequences: int) -> Sequences:
        """Sequences that have seen nothing."""
        return Sequences(tuple(Stepped(self.cache, self.cache.start()) for _ in range(sequences)))

    def step(self, batch: Batch, state: Sequences) -> tuple[NDArray[np.float32], Sequences]:
        """Logits float32 [R, vocab] of the rows asked for, and the sequences, which are longer then.

        Raises ConfigError for a batch that does not go on from ``state``, UserError where no page is left; no sequence is longer then."""
        logits = self.session.run(batch, self._prepared(batch, state)).numpy()
        self._advance(batch, state)
        return logits, state

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [R, vocab] of whole sequences; nothing is carried on."""
        return self.step(batch, self.start(len(batch.offsets) - 1))[0]

    def profile(self, batch: Batch, state: Sequences) -> tuple[NDArray[np.float32], Sequences, Any]:
        """A step as ``step`` takes it, and where its time went, on a session that can say so."""
        session: Any = self.session
        logits, profile = session.profile(batch, self._prepared(batch, state))
        self._advance(batch, state)
        return logits, state, profile

    def _prepared(self, batch: Batch, state: Sequences) -> list[PageLists]:
        """Room for the batch."""
        bounds = batch.offsets.tolist()
        if len(bounds) - 1 != len(state.sequences):
            raise ConfigError(f"a batch of {len(bounds) - 1} sequences does not go on from a state of {len(state.sequences)}")
        for index, one in enumerate(state.sequences):
            if (said := int(batch.positions[bounds[index]])) != one.length:
                raise ConfigError(f"sequence {index} goes on at position {said}, but {one.length} of its tokens are cached")
        for one, begin, end in zip(state.sequences, bounds, bounds[1:]):
            if end > begin and not self.cache.grow(one.pages, one.length + end - begin):
                counts = ", ".join(f"{group.pages} pages of {group.name}" for group in self.cache.groups)
                raise UserError(f"the cache's {counts} are all in use; run fewer or shorter sequences at once")
        self.session.carry_out(self.cache.take_moves())
        return [one.pages.tables for one in state.sequences]

    def _advance(self, batch: Batch, state: Sequences) -> None:
        for one, count in zip(state.sequences, np.diff(batch.offsets).tolist()):
            self.cache.advance(one.pages, (), one.length + count)
