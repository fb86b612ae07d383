"""Beam search: which beginnings to go on with, given log-probabilities. Knows no model, no cache and no text.

At every token each of at most ``width`` beginnings is continued by every id, and the sums of log-probabilities rank the candidates. The
definition is transformers' (`generate(num_beams=…)`), which fixes what the textbooks leave open:

- so many of the best candidates are looked at that ``width`` of them must go on: twice as many, or (1 + number of end ids) times;
- of these, the ones that end (by an end id, or because no more tokens are allowed) are finished outputs if they are among the ``width``
  best, and dropped if not; the ``width`` best of the others go on;
- a finished output's score is its sum over its length, its end id counted, to the power of ``length_penalty``; ``width`` of them are kept;
- the search is over when nothing can go on, when ``early_stopping`` is True and ``width`` are finished, or when the best beginning's
  score at its present length (with "never" and a positive ``length_penalty``: at the greatest length) does not beat the worst of ``width``
  finished ones.

Sums are float32, and equal ones rank by beginning, then by id, the lowest first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.engine.sampling import BeamSearch


@dataclass(frozen=True, slots=True)
class Beam:
    """One beginning: its tokens after the prompt, and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One finished output, an end id included; ``ended`` says that one did end it, rather than its length."""

    tokens: tuple[int, ...]
    score: float
    ended: bool


class BeamSearcher:
    """One search. Ask for log-probabilities of what follows each of ``beams``, give them to `advance`, until `done`.

    ``max_tokens`` is the most tokens an output may have; ``end_ids`` end one."""

    def __init__(self, search: BeamSearch, *, max_tokens: int, end_ids: Collection[int]) -> None:
        self._search, self._most, self._end_ids = search, max_tokens, frozenset(end_ids)
        self._looked_at = max(2, 1 + len(self._end_ids)) * search.width
        self._finished: list[Hypothesis] = []  # best first
        self.beams: list[Beam] = [Beam((), 0.0)]
        """The beginnings that go on, best first; at first the empty one alone."""
        self.done = False

    def advance(self, log_probs: NDArray[np.float32]) -> list[int]:
        """Go on by one token, given the log-probabilities [len(beams), vocab] of what may follow each beginning.

        -inf forbids an id. Returns for each of the new ``beams`` which of the old ones it continues: fork and drop sequences accordingly.
        Raises ValueError for a shape that does not fit or a NaN, and for beginnings that nothing may follow while nothing is finished."""
        if log_probs.shape[0] != len(self.beams) or np.isnan(log_probs).any():
            raise ValueError(f"log-probabilities {log_probs.shape} do not fit {len(self.beams)} beams, or hold NaN")
        length, width = len(self.beams[0].tokens) + 1, self._search.width
        totals = log_probs.astype(np.float32) + np.array([beam.total for beam in self.beams], np.float32)[:, None]
        going: list[tuple[Beam, int]] = []
        ending: list[Hypothesis] = []
        candidates = self._best(totals)
        for rank, (parent, token) in enumerate(candidates):
            total = float(totals[parent, token])
            tokens = (*self.beams[parent].tokens, token)
            ends = token in self._end_ids
            if not ends and length < self._most:
                going.append((Beam(tokens, total), parent))
            elif rank < width:
                ending.append(Hypothesis(tokens, self._score(total, length), ends))
        self._finished = sorted([*self._finished, *ending], key=lambda one: -one.score)[:width]
        if not candidates and not self._finished:
            raise ValueError("no id may follow any beginning")
        going = going[:width]
        self.beams = [beam for beam, _ in going]
        self.done = not going or (len(self._finished) == width and (self._search.early_stopping is True or not self._can_improve(length)))
        return [parent for _, parent in going]

    def best(self, count: int) -> list[Hypothesis]:
        """The best finished outputs, best first; fewer if there are not so many."""
        return self._finished[:count]

    def _best(self, totals: NDArray[np.float32]) -> list[tuple[int, int]]:
        """The candidates that are looked at, best first: which beginning, which id."""
        flat = totals.ravel()
        count = min(self._looked_at, flat.size)
        worst = -np.partition(-flat, count - 1)[count - 1]
        at_least = np.flatnonzero((flat >= worst) & (flat > -np.inf))
        places = at_least[np.argsort(-flat[at_least], kind="stable")][:count]
        return [divmod(int(place), totals.shape[1]) for place in places]

    def _can_improve(self, length: int) -> bool:
        at = self._most if self._search.early_stopping == "never" and self._search.length_penalty > 0 else length
        return self._score(self.beams[0].total, at) > self._finished[-1].score

    def _score(self, total: float, length: int) -> float:
        return float(np.float32(total) / np.float32(length**self._search.length_penalty))
