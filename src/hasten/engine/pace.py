"""Pace: what steps and moves take on this machine, learned from those that were. The scheduler plans with it, as data (`Costs`)."""

import dataclasses
import statistics
from collections import deque
from collections.abc import Sequence

from hasten.engine.plan import Costs, Entry

KEPT = 8
"""Steps of running sequences alone that their time is the median of."""
ENOUGH = 3
"""Of them, before prompts may be computed beside as many sequences."""
STALE = 128
"""Steps with prompts after which sequences are timed alone again: they have grown meanwhile."""
FAST, SLOW = 0.8, 2.5
"""A step with prompts that takes less than so much of what those alone took, or more than so many times what was expected, asks for the
same: the machine has more to do than it had, or less."""
LARGE = 64
"""Tokens of a step from which on its fixed part hardly counts."""


class Pace:
    """``costs`` are a guess, until they are ``measured``; else they stay as they are."""

    def __init__(self, costs: Costs, measured: bool = True) -> None:
        self.costs, self._measured = costs, measured
        self._alone = deque[float](maxlen=KEPT)  # seconds
        self._tokens = deque[tuple[float, int]](maxlen=ENOUGH)  # seconds for each token of prompts, and how many there were
        self._bytes = deque[float](maxlen=KEPT)  # seconds for each
        self._mixed = 0  # steps with prompts since one without

    def note_step(self, entries: Sequence[Entry], seconds: float) -> None:
        """A step of these entries took so long."""
        if not self._measured or not entries:
            return
        rows = sum(entry.draws and len(entry.tokens) == 1 for entry in entries)
        tokens = sum(len(entry.tokens) for entry in entries) - rows
        if tokens:
            self._note_prompts(rows, tokens, seconds)
        else:
            self._note_alone(rows, seconds)

    def note_moves(self, size: int, seconds: float) -> None:
        """So many bytes of pages were moved in so long."""
        if self._measured:
            self._bytes.append(seconds / size)
            self.costs = dataclasses.replace(self.costs, byte_s=statistics.median(self._bytes))

    def _note_alone(self, rows: int, seconds: float) -> None:
        if not self.costs.fits(rows):
            self._alone.clear()
        self._alone.append(seconds)
        self._mixed = 0
        step_s = statistics.median_low(self._alone) if len(self._alone) >= ENOUGH else 0.0
        self.costs = dataclasses.replace(self.costs, rows=rows, step_s=step_s)

    def _note_prompts(self, rows: int, tokens: int, seconds: float) -> None:
        costs = self.costs
        if (tokens < LARGE) if not rows else not (costs.step_s and costs.fits(rows)):
            return  # what of it is the tokens' is not known
        alone = costs.step_s * rows / costs.rows if rows else 0.0
        expected = alone + tokens * (costs.token_s if costs.tried else alone / max(1, rows))
        self._tokens.append((max(seconds - alone, 0.01 * seconds) / tokens, tokens))
        self._mixed += 1
        if rows and (self._mixed > STALE or not FAST * alone < seconds < SLOW * expected):
            self._alone.clear()
            costs = dataclasses.replace(costs, step_s=0.0)
        # The dearest of the last: where one token more begins another tile, a step takes a leap.
        self.costs = dataclasses.replace(costs, token_s=max(self._tokens)[0], tried=max(count for _, count in self._tokens))
