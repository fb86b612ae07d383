"""Histogram: how many values were at most so large."""

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = tuple(step * 10.0**decade for decade in range(-4, 3) for step in (1.0, 1.6, 2.5, 4.0, 6.3))
"""Five bounds a decade, so that a quantile read between two of them is right to a quarter."""
TOKENS = tuple(float(step * 10**decade) for decade in range(6) for step in (1, 2, 5))


class Histogram:
    """Counts of values by upper bound. One thread observes, so there is no lock: a search in a short list and two additions."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(round(bound, 9) for bound in bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(bound, values at most so large), as Prometheus has them; the last is of all."""
        found, count = [], 0
        for bound, here in zip((*map(str, self._bounds), "+Inf"), self._counts):
            count += here
            found.append((bound, float(count)))
        return found
