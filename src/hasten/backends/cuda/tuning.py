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

from hasten.backends.cuda.candidates import LINEAR, SEMI_STRUCTURED, Candidate, LinearSite
from hasten.backends.cuda.inputs import bucket_rows
from hasten.backends.cuda.kernels.linear import LEAST_STEPS, Order, Scratch, Tiles, default_order, default_tiles, linear, scratch_size
from hasten.backends.cuda.kernels.pack import PackedWeight, compressed, is_two_of_four
from hasten.backends.cuda.limits import graph_seconds
from hasten.backends.cuda.products import Product
from hasten.backends.cuda.session import STEP_TOKENS
from hasten.backends.cuda.tape import Device
from hasten.backends.cuda.tuned import TunedLinear
from hasten.base.errors import UnsupportedError, one_line

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
    """One product of ``rows`` rows, in ``seconds``; None where it was ``refused``, in words. ``order`` and ``tiles`` are of Triton's
    ``kernel``, and say nothing of another."""

    order: Order
    rows: int
    tiles: Tiles
    seconds: float | None
    refused: str = ""
    kernel: str = "triton"


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
        its = [each for each in self.timings if each.rows == rows]
        (usual,) = (each.seconds for each in its if (each.kernel, each.order, each.tiles) == ("triton", order, cut))
        if self.chosen.kernel == "triton":
            order, cut = self.chosen.order, self.chosen.tiles[rows]
        (now,) = (
            each.seconds
            for each in its
            if each.seconds is not None and (each.kernel, each.order, each.tiles) == (self.chosen.kernel, order, cut)
        )
        return usual, now


def tune(product: Product, on: Device, rows: Sequence[int] = ROWS, clock: Clock | None = None, footprint: int | None = None) -> Tuning:
    """Time orders with the default tiles, then the tiles of the best of them, and choose. ``clock`` is the device's, copies of the
    weight come to FOOTPRINT, unless given."""
    trials = _Trials(product, on, max(rows), clock or graph_seconds, FOOTPRINT if footprint is None else footprint)
    default = default_order(trials.weight)
    found = [trials.time(order, count, default_tiles(count, order)) for order in orders(trials.weight) for count in rows]
    for order in promising(found, default):
        usual = {count: default_tiles(count, order) for count in rows}
        found += [trials.time(order, count, cut) for count in rows for cut in tiles_for(count, order) if cut != usual[count]]
    for candidate in LINEAR:
        if candidate.name != "triton":
            found += trials.time_library(candidate, rows)
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
    order, unless another is worth it; and a library's kernel where that is worth it for all of them. Raises UnsupportedError, with the
    reasons, where no order could be timed for all rows."""
    rows = {each.rows for each in timings}
    fastest = _fastest([each for each in timings if each.kernel == "triton"])
    means = _means(fastest, rows)
    if not means:
        raise UnsupportedError(f"no block sizes were fit: {'; '.join(refusals(timings)) or 'none were timed'}")
    order = min(means, key=means.__getitem__)
    if default in means and means[order] >= WORTH * means[default]:
        order = default
    kernel, least = "triton", WORTH * means[order]
    for name in dict.fromkeys(each.kernel for each in timings if each.kernel != "triton"):
        for mean in _means(_fastest([each for each in timings if each.kernel == name]), rows).values():
            if mean < least:
                kernel, least = name, mean
    return TunedLinear(order, {rows: timing.tiles for rows, timing in sorted(fastest[order].items())}, kernel)


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
        self.weight, self._device, self._capability, self._clock = product.weight(on.device), on.device, on.capability, clock
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

    def time_library(self, candidate: Candidate[LinearSite], rows: Sequence[int]) -> list[Timing]:
        """Of a library's kernel: nothing where that is not for the product; else its times, or why it is refused for all rows. A row must
        have the same bits in every bucket, at its beginning and its end."""
        its, order = self._product, default_order(self.weight)
        fours = self._product.form.sparse and is_two_of_four(self.weight)
        site = LinearSite(
            its.form, its.fed, max(rows), its.out, its.size, its.dtype, invariant=True, capability=self._capability,
            measured=candidate.name, two_of_four=fours, heads=its.heads,
        )  # fmt: skip
        if candidate.refuses(site) is not None:
            return []

        def told(count: int, seconds: float | None, why: str = "") -> Timing:
            return Timing(order, count, default_tiles(count, order), seconds, why, candidate.name)

        try:
            if why := self._varies(candidate):
                return [told(count, None, f"{candidate.name}: {why}") for count in rows]
            copies = [self._for(candidate, weight) for weight in self._copies]
            return [told(count, self._clock(self._device, self._all(candidate, copies, count)) / len(copies)) for count in rows]
        except RuntimeError as error:  # a library that is not there, or takes no such sizes
            return [told(count, None, f"{candidate.name}: {one_line(str(error))}") for count in rows]

    def _varies(self, candidate: Candidate[LinearSite]) -> str:
        """Why a library's rows may depend on their batch; '' where nothing says so."""
        most = len(self._x)
        if most < STEP_TOKENS:
            return f"whether rows depend on their batch shows in steps of up to {STEP_TOKENS} rows, and these are {most}"
        weight = self._for(candidate, self.weight)
        whole = self._of_library(candidate, weight, 0, most)
        for count in bucket_rows(most):
            for begin in (0, most - count):
                if not torch.equal(self._of_library(candidate, weight, begin, count), whole[begin : begin + count]):
                    return "a row has other bits than among other rows"
        return ""

    @staticmethod
    def _for(candidate: Candidate[LinearSite], weight: PackedWeight) -> PackedWeight:
        return compressed(weight) if candidate.name == SEMI_STRUCTURED else weight

    def _all(self, candidate: Candidate[LinearSite], copies: Sequence[PackedWeight], rows: int) -> Callable[[], None]:
        scale = None if self._scale is None else self._scale[:rows]
        x, y = self._x[:rows], self._empty(rows)

        def work() -> None:
            for weight in copies:
                candidate.launch(x, weight, y, scale=scale)

        return work

    def _of_library(self, candidate: Candidate[LinearSite], weight: PackedWeight, begin: int, rows: int) -> Tensor:
        scale, y = None if self._scale is None else self._scale[begin : begin + rows], self._empty(rows)
        candidate.launch(self._x[begin : begin + rows], weight, y, scale=scale)
        return y

    def _expected(self, order: Order) -> Tensor:
        if order not in self._whole:
            self._whole[order] = self._played(order, 0, len(self._x), Tiles(stages=1))  # which every device has room for
        return self._whole[order]

    def _played(self, order: Order, begin: int, rows: int, tiles: Tiles) -> Tensor:
        y, scratch = self._room(rows, order, tiles)
        self._launch(self.weight, order, begin, rows, tiles, y, scratch)
        return y

    def _room(self, rows: int, order: Order, tiles: Tiles) -> tuple[Tensor, Scratch]:
        sums, arrived = scratch_size(rows, self._product.out, order, tiles, self._product.heads)
        made = torch.empty(sums, device=self._device), torch.zeros(arrived, dtype=torch.int32, device=self._device)
        return self._empty(rows), Scratch(*made)

    def _empty(self, rows: int) -> Tensor:
        """What is not written shows: nothing equals NaN."""
        return torch.full((rows, self._product.heads * self._product.out), math.nan, dtype=self._product.dtype, device=self._device)

    def _launch(self, weight: PackedWeight, order: Order, begin: int, rows: int, tiles: Tiles, y: Tensor, scratch: Scratch) -> None:
        scale = None if self._scale is None else self._scale[begin : begin + rows]
        linear(self._x[begin : begin + rows], weight, y, scale=scale, scratch=scratch, order=order, tiles=tiles)
