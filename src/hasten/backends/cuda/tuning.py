"""Block sizes timed on a device, and which of them to take.

An order of sums is chosen for a shape, whatever the rows, and tiles for every number of rows among those that give that order's bits: so
a row's tokens are the same in every batch before and after, though another order has other bits than the one before it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from hasten.backends.cuda.kernels.linear import LEAST_STEPS, Order, Scratch, Tiles, default_order, default_tiles, linear, scratch_size
from hasten.backends.cuda.kernels.pack import PackedWeight
from hasten.backends.cuda.limits import graph_seconds
from hasten.backends.cuda.products import Product
from hasten.backends.cuda.tape import Device
from hasten.backends.cuda.tuned import TunedLinear
from hasten.base.errors import UnsupportedError

ROWS = (1, 16, 64, 256, 2048)
"""Numbers of rows that tiles are timed for; those between take the next larger one's."""
FOOTPRINT = 256 << 20
"""Bytes of copies of a weight that are read in turn, well above what a device's cache holds."""
WORTH = 0.98
"""Another order is taken where it takes less than this share of the default's time."""
PROMISING = 3
"""Orders whose tiles are timed too."""

Clock = Callable[[torch.device, Callable[[], object]], float]
"""Seconds of some work on a device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """One product of ``rows`` rows, in ``seconds``; None where it was ``refused``, in words."""

    order: Order
    rows: int
    tiles: Tiles
    seconds: float | None
    refused: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Tuning:
    """What was chosen for a ``product`` of ``timings``, each of which is another; ``default`` is what it is otherwise summed in."""

    product: Product
    default: Order
    chosen: TunedLinear
    timings: tuple[Timing, ...]

    @property
    def refused(self) -> tuple[str, ...]:
        """Why some were refused, each reason once."""
        return refusals(self.timings)

    def seconds(self, rows: int) -> tuple[float | None, float]:
        """Of so many rows: by the defaults (None: they were refused), and as chosen."""
        order, cut = self.default, default_tiles(rows, self.default)
        usual = [each.seconds for each in self.timings if (each.order, each.rows, each.tiles) == (order, rows, cut)]
        taken = self.chosen.order, rows, self.chosen.tiles[rows]
        (now,) = {each.seconds for each in self.timings if (each.order, each.rows, each.tiles) == taken and each.seconds is not None}
        return usual[0], now


def tune(product: Product, on: Device, rows: Sequence[int] = ROWS, clock: Clock | None = None, footprint: int | None = None) -> Tuning:
    """Time orders with the default tiles, then the tiles of the best of them, and choose. ``clock`` is the device's, copies of the
    weight come to FOOTPRINT, unless given."""
    trials = _Trials(product, on, max(rows), clock or graph_seconds, FOOTPRINT if footprint is None else footprint)
    default = default_order(trials.weight)
    found = [trials.time(order, count, default_tiles(count, order)) for order in orders(trials.weight) for count in rows]
    for order in promising(found, default):
        usual = {count: default_tiles(count, order) for count in rows}
        found += [trials.time(order, count, cut) for count in rows for cut in tiles_for(count, order) if cut != usual[count]]
    return Tuning(product, default, chosen(found, default), tuple(found))


def orders(weight: PackedWeight) -> Iterator[Order]:
    """Orders of sums that go with a weight, its default first."""
    yield (default := default_order(weight))
    steps = (weight.span,) if weight.span else tuple(step for step in (32, 64, 128) if weight.group % step == 0)
    for step in steps:
        most = max(1, -(-weight.size // step) // LEAST_STEPS)
        yield from (order for parts in (1, 2, 4, 8) if parts <= most and (order := Order(step, parts)) != default)


def tiles_for(rows: int, order: Order) -> Iterator[Tiles]:
    """Tiles worth timing for a bucket of ``rows``."""
    if rows > 64:
        for out, wide, warps in ((64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8)):
            yield from (Tiles(out=out, rows=wide, warps=warps, stages=stages) for stages in (2, 3, 4))
        return
    wide = max(16, triton.next_power_of_2(rows))
    for out, warps in ((64, 4), (128, 4), (128, 8)):
        for split in (False, True) if order.parts > 1 else (False,):
            yield from (Tiles(out=out, rows=wide, warps=warps, stages=stages, split=split) for stages in (3, 4, 6))


def chosen(timings: Sequence[Timing], default: Order) -> TunedLinear:
    """The order that takes least time over all rows, in the geometric mean, and the fastest tiles for each number of them; the default
    order, unless another is worth it. Raises UnsupportedError, with the reasons, where no order could be timed for all rows."""
    fastest = _fastest(timings)
    means = _means(fastest, {each.rows for each in timings})
    if not means:
        raise UnsupportedError(f"no block sizes were fit: {'; '.join(refusals(timings)) or 'none were timed'}")
    order = min(means, key=means.__getitem__)
    if default in means and means[order] >= WORTH * means[default]:
        order = default
    return TunedLinear(order, {rows: timing.tiles for rows, timing in sorted(fastest[order].items())})


def promising(timings: Sequence[Timing], default: Order, most: int = PROMISING) -> tuple[Order, ...]:
    """The ``most`` orders of least time, and the default."""
    means = _means(_fastest(timings), {each.rows for each in timings})
    return tuple(dict.fromkeys((default, *sorted(means, key=means.__getitem__)[:most])))


def refusals(timings: Iterable[Timing]) -> tuple[str, ...]:
    """Why some were refused, each reason once."""
    return tuple(dict.fromkeys(each.refused for each in timings if each.refused))


def _fastest(timings: Iterable[Timing]) -> dict[Order, dict[int, Timing]]:
    """By order and rows, the fastest of what was not refused; of two alike the first."""
    found: dict[Order, dict[int, Timing]] = {}
    for each in timings:
        if each.seconds is not None:
            best = found.setdefault(each.order, {}).setdefault(each.rows, each)
            if best.seconds is not None and each.seconds < best.seconds:
                found[each.order][each.rows] = each
    return found


def _means(fastest: Mapping[Order, Mapping[int, Timing]], rows: Set[int]) -> dict[Order, float]:
    """The geometric mean over ``rows`` of an order's seconds; of those that have them all."""
    return {
        order: math.exp(sum(math.log(timing.seconds) for timing in its.values() if timing.seconds) / len(rows))
        for order, its in fastest.items()
        if set(its) == rows
    }


class _Trials:
    """A product on random numbers, of which every trial must give the bits that its order gives for all rows at once."""

    def __init__(self, product: Product, on: Device, rows: int, clock: Clock, footprint: int) -> None:
        self.weight, self._device, self._clock = product.weight(on.device), on.device, clock
        copies = max(1, -(-footprint // self.weight.nbytes))
        self._copies = [self.weight, *(dataclasses.replace(self.weight, codes=self.weight.codes.clone()) for _ in range(copies - 1))]
        self._x, self._scale = product.rows(rows, on.device)
        self._product = product
        self._whole: dict[Order, Tensor] = {}

    def time(self, order: Order, rows: int, tiles: Tiles) -> Timing:
        """The trial's time, or why it is refused."""
        try:
            whole = self._expected(order)
            for begin in (0, len(self._x) - rows):
                if not torch.equal(self._played(order, begin, rows, tiles), whole[begin : begin + rows]):
                    return Timing(order, rows, tiles, None, "a row has other bits than among other rows")
            y, scratch = self._room(rows, order, tiles)

            def work() -> None:
                for weight in self._copies:
                    self._launch(weight, order, 0, rows, tiles, y, scratch)

            return Timing(order, rows, tiles, self._clock(self._device, work) / len(self._copies))
        except OutOfResources as error:
            return Timing(order, rows, tiles, None, f"the device has too little {error.name}")

    def _expected(self, order: Order) -> Tensor:
        if order not in self._whole:
            self._whole[order] = self._played(order, 0, len(self._x), Tiles(stages=1))  # which every device has room for
        return self._whole[order]

    def _played(self, order: Order, begin: int, rows: int, tiles: Tiles) -> Tensor:
        y, scratch = self._room(rows, order, tiles)
        self._launch(self.weight, order, begin, rows, tiles, y, scratch)
        return y

    def _room(self, rows: int, order: Order, tiles: Tiles) -> tuple[Tensor, Scratch]:
        """What is not written shows: nothing equals NaN."""
        y = torch.full((rows, self._product.heads * self._product.out), math.nan, dtype=self._product.dtype, device=self._device)
        sums, arrived = scratch_size(rows, self._product.out, order, tiles, self._product.heads)
        made = torch.empty(sums, device=self._device), torch.zeros(arrived, dtype=torch.int32, device=self._device)
        return y, Scratch(*made)

    def _launch(self, weight: PackedWeight, order: Order, begin: int, rows: int, tiles: Tiles, y: Tensor, scratch: Scratch) -> None:
        scale = None if self._scale is None else self._scale[begin : begin + rows]
        linear(self._x[begin : begin + rows], weight, y, scale=scale, scratch=scratch, order=order, tiles=tiles)
