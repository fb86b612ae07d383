"""Embedder: prompts into vectors, the mean of their hidden states after the last norm, between the steps of an engine."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import one_line
from hasten.cache import SequencePages
from hasten.engine.engine import Engine
from hasten.program import Batch, StateLostError

STEP_TOKENS = 128
"""Tokens of a step, at most, and no more than the context's: so long may it keep an engine from its own."""


@dataclasses.dataclass(slots=True)
class _Text:
    tokens: Sequence[int]
    pages: SequencePages
    total: NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Embedding:
    """What became of a prompt: ``vector`` float32 [width], or None and the ``error``."""

    number: int
    vector: NDArray[np.float32] | None
    error: str | None = None


class Embedder:
    """Computes prompts on the pages of ``engine``, beside its requests and after them: where pages are short, it waits. A vector does not
    depend on what else is computed: the rows of a prompt are added up in their order, in float64."""

    def __init__(self, engine: Engine, width: int) -> None:
        self._engine, self._width = engine, width
        self._numbers = itertools.count(1)
        self._texts: dict[int, _Text] = {}

    @property
    def busy(self) -> bool:
        """Is there work?"""
        return bool(self._texts)

    def submit(self, tokens: Sequence[int]) -> int:
        """Take a prompt of at least one token; its number."""
        number = next(self._numbers)
        self._texts[number] = _Text(tokens, self._engine.cache.start(), np.zeros(self._width))
        return number

    def abort(self, number: int) -> None:
        """Forget a prompt; an unknown one is done already."""
        if (text := self._texts.pop(number, None)) is not None:
            self._engine.cache.free(text.pages)

    def step(self) -> list[Embedding]:
        """Compute some tokens; what is done by them."""
        planned = self._plan()
        if not planned and self._texts:
            first, *others = self._texts
            if self._engine.busy:
                self._give_way([first, *others])
                return []
            self._give_way(others)
            planned = self._plan()
            if not planned:
                return [self._end(first, "the cache has no pages for so many tokens; send shorter texts")]
        return self._compute(planned)

    def _plan(self) -> list[tuple[int, int]]:
        """Prompts, by number, and how many tokens of each come next."""
        planned, left = list[tuple[int, int]](), min(STEP_TOKENS, self._engine.session.program.context)
        for number, text in self._texts.items():
            count = min(left, len(text.tokens) - text.pages.length)
            if not count or not self._engine.cache.grow(text.pages, text.pages.length + count):
                break
            planned.append((number, count))
            left -= count
        return planned

    def _give_way(self, numbers: Sequence[int]) -> None:
        """Begin these again later, so that no two wait for each other's pages."""
        for text in (self._texts[number] for number in numbers):
            self._engine.cache.free(text.pages)
            text.total[:] = 0

    def _compute(self, planned: Sequence[tuple[int, int]]) -> list[Embedding]:
        if not planned:
            return []
        cache, session = self._engine.cache, self._engine.session
        texts = [self._texts[number] for number, _ in planned]
        starts = [text.pages.length for text in texts]
        parts = [list(text.tokens[start : start + count]) for text, start, (_, count) in zip(texts, starts, planned)]
        self._engine.move(cache.take_moves())  # others' pages: a text shares none
        try:
            rows = session.hidden(Batch.of(parts, starts), [text.pages.tables for text in texts])
        except Exception as error:
            if len(planned) == 1 or isinstance(error, StateLostError):
                return [self._end(number, f"{type(error).__name__}: {one_line(str(error), 300)}") for number, _ in planned]
            return [done for one in planned for done in self._compute([one])]
        ended, at = list[Embedding](), 0
        for (number, count), text, start in zip(planned, texts, starts):
            for row in rows[at : at + count]:
                text.total += row
            at += count
            cache.advance(text.pages, (), start + count)
            if start + count == len(text.tokens):
                ended.append(self._end(number))
        return ended

    def _end(self, number: int, error: str | None = None) -> Embedding:
        text = self._texts[number]
        self.abort(number)
        if error is None and not np.isfinite(text.total).all():
            error = "the model's hidden states are not finite"
        vector = (text.total / len(text.tokens)).astype(np.float32)
        return Embedding(number, None if error is not None else vector, error)
