"""The codebook of sixteen that serves a weight best: numbers of one byte, 0 among them, that all elements of a matrix share.

Weight sharing is Han et al. 2015 (Deep Compression, arXiv:1510.00149), which clusters with k-means. In one dimension, and with centres of
one byte, the best clusters need no search: they are the cheapest path through the 255 numbers (as in Wang & Song 2011, Ckmeans.1d.dp)."""

import numpy as np
from numpy.typing import NDArray

SIZE = 16
LIMIT = 127
"""Numbers are -127 to 127, as int8 activations are."""

_BINS = 4 * LIMIT + 1  # halves of a step, so that every border between two numbers is a border of bins

Floats = NDArray[np.float32]
Codebook = NDArray[np.int8]


class Histogram:
    """Elements in steps of their scale, each with a weight, as far as a choice of numbers depends on them."""

    def __init__(self) -> None:
        self._sums = np.zeros((3, _BINS))

    def add(self, steps: Floats, weights: NDArray[np.floating]) -> None:
        """``steps`` within ±127, and ``weights`` of the same shape."""
        at, x, each = bins(steps).ravel(), steps.ravel().astype(np.float64), weights.ravel().astype(np.float64)
        for power, sums in enumerate(self._sums):
            sums += np.bincount(at, each * x**power if power else each, _BINS)

    def best(self) -> Codebook:
        """The 16 different numbers, ascending, 0 among them, to the nearest of which the elements come with the least squared error."""
        middle = 2 * LIMIT
        above = _Side(self._sums[:, middle:])
        mirrored = self._sums[:, :middle][:, ::-1] * np.array([[1], [-1], [1]])
        below = _Side(np.concatenate([mirrored, np.zeros((3, 1))], axis=1))
        cost, count = min((below.cost[count] + above.cost[SIZE - 1 - count], count) for count in range(SIZE))
        return np.array([*[-each for each in reversed(below.numbers(count))], 0, *above.numbers(SIZE - 1 - count)], np.int8)


def bins(steps: Floats) -> NDArray[np.int16]:
    """Which half of a step each element lies in, 0 for -127 to -126.5; ``steps`` are numbers within ±127 but for rounding."""
    found: NDArray[np.int16] = np.clip(np.floor(2 * steps), -2 * LIMIT, 2 * LIMIT).astype(np.int16) + np.int16(2 * LIMIT)
    return found


def nearest(steps: Floats, codebook: Codebook) -> NDArray[np.int8]:
    """The place in ``codebook`` of the number nearest to each element, the larger of two."""
    borders = codebook[:-1].astype(np.int64) + codebook[1:]
    places = np.searchsorted(borders, np.arange(_BINS) - 2 * LIMIT, side="right").astype(np.int8)
    return places[bins(steps)]


def fitted(weight: Floats, scales: Floats, group: int, importance: NDArray[np.floating] | None = None) -> Codebook:
    """The best codebook for ``weight`` [out, in] with ``scales`` [out, groups], of ``group`` inputs each: that with the least squared
    error, each input's weighed by ``importance`` [in]."""
    found = Histogram()
    for index in range(scales.shape[1]):
        part = slice(index * group, (index + 1) * group)
        each = np.square(scales[:, index, None].astype(np.float64)) * (np.ones(weight.shape[1]) if importance is None else importance)[part]
        found.add(_steps(weight[:, part], scales[:, index]), np.nan_to_num(each, posinf=0))
    return found.best()


def places(weight: Floats, scales: Floats, group: int, codebook: Codebook) -> NDArray[np.int8]:
    """Where in ``codebook`` lies what is nearest to each element of ``weight``; of what is not finite the scale tells."""
    found = np.empty(weight.shape, np.int8)
    for index in range(scales.shape[1]):
        part = slice(index * group, (index + 1) * group)
        found[:, part] = nearest(_steps(weight[:, part], scales[:, index]), codebook)
    return found


def _steps(part: Floats, scales: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        steps: Floats = np.clip(np.nan_to_num(part / scales[:, None]), -LIMIT, LIMIT)
    return steps


class _Side:
    """One side of 0: ``cost[k]`` is that of the best k numbers of 1 to 127 beside 0, for k up to 15."""

    def __init__(self, sums: NDArray[np.float64]) -> None:
        self._before = np.concatenate([np.zeros((3, 1)), np.cumsum(sums, axis=1)], axis=1)
        levels = np.arange(LIMIT + 1)
        lower, upper = levels[:, None], levels[None]
        pairs = self._cost(2 * lower, lower + upper, lower) + self._cost(lower + upper, 2 * upper, upper)
        pairs[lower >= upper] = np.inf
        best = np.where(levels == 0, 0.0, np.inf)
        last = self._cost(2 * levels, np.full_like(levels, sums.shape[1]), levels)
        self.cost, self._from, self._ends = [float((best + last).min())], [], [0]
        for _ in range(SIZE - 1):
            reached = best[:, None] + pairs
            self._from.append(reached.argmin(axis=0))
            best = reached.min(axis=0)
            self._ends.append(int((best + last).argmin()))
            self.cost.append(float((best + last).min()))

    def _cost(self, begin: NDArray[np.int_], end: NDArray[np.int_], level: NDArray[np.int_]) -> NDArray[np.float64]:
        """Of giving the elements of the bins [begin, end) the number ``level``."""
        weight, first, second = self._before[:, end] - self._before[:, begin]
        made: NDArray[np.float64] = second - 2 * level * first + level.astype(np.float64) ** 2 * weight
        return made

    def numbers(self, count: int) -> list[int]:
        """The best ``count``, ascending."""
        found, at = list[int](), self._ends[count]
        for step in range(count - 1, -1, -1):
            found.append(at)
            at = int(self._from[step][at])
        return found[::-1]
