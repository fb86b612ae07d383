"""Scales between a linear layer and what feeds it: inputs divided, weights multiplied, so that rounding costs less."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.compress.grid import Clip, Grid
from hasten.compress.threads import in_order
from hasten.formats.linear import LinearFormat

LEAST = 1e-4


def awq_scales(
    readers: Sequence[tuple[Tensor, Tensor]], form: LinearFormat, *, magnitudes: Tensor, tie: Tensor | None = None, steps: int = 20,
    clip: Clip = "none", threads: int = 1,
) -> tuple[Tensor, float, float]:  # fmt: skip
    """The scales [in] of inputs that several ``readers`` share, each a weight [out, in] with the moments [in, in] of what it reads, and
    ‖(W − Q)·X‖² summed over them, without and with the scales.

    Tried are m^a and m^a / w^(1−a) for ``steps`` + 1 exponents a from 0 to 1 (Lin et al. 2023, arXiv:2306.00978), m the ``magnitudes``
    [in], means of |x|, and w the mean share that a weight has of its group's largest; and 1. ``tie`` [in] names, for each input, the row
    before that it comes from: inputs of one row share a scale. ``threads`` change no result."""
    shares = torch.cat([_shares(weight, form.group) for weight, _ in readers]).mean(0)
    ones = torch.ones_like(magnitudes)
    exponents = [step / steps for step in range(steps + 1)]
    bases = [(exponent, base) for exponent in exponents for base in (ones, shares.clamp(min=LEAST) ** (1 - exponent))]
    tried = [ones, *(balanced(magnitudes.clamp(min=LEAST) ** exponent / base, tie) for exponent, base in bases)]

    narrow = [(weight, moments.to(weight.dtype)) for weight, moments in readers]

    def loss(scales: Tensor) -> float:
        return sum(_loss(weight, scales, moments, form, clip) for weight, moments in narrow)

    losses = list(in_order(loss, tried, threads))
    best = min(range(len(losses)), key=losses.__getitem__)
    return tried[best], losses[0], losses[best]


def smooth_scales(weights: Sequence[Tensor], largest: Tensor, *, strength: float = 0.5, tie: Tensor | None = None) -> Tensor:
    """max|x|^strength / max|w|^(1 − strength) per input (Xiao et al. 2022, arXiv:2211.10438): ``largest`` [in] are the inputs' max|x|.

    Inputs or weights that are all zeros keep their scale. ``tie`` as in awq_scales."""
    most = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    scales = largest.clamp(min=1e-5) ** strength / most.clamp(min=1e-5) ** (1 - strength)
    scales = torch.where((largest > 0) & (most > 0), scales, torch.ones_like(scales)).clamp(min=1e-5)
    return tied(scales, tie)


def balanced(scales: Tensor, tie: Tensor | None) -> Tensor:
    """``scales`` [in] tied, then divided by √(largest · least), so that they lie around 1."""
    scales = tied(scales.clamp(min=LEAST), tie)
    return scales / (scales.max() * scales.min()).sqrt()


def tied(scales: Tensor, tie: Tensor | None) -> Tensor:
    """The geometric mean over inputs that ``tie`` gives one source."""
    if tie is None:
        return scales
    count = int(tie.max()) + 1
    sums = torch.zeros(count, dtype=scales.dtype).index_add(0, tie, scales.log())
    numbers = torch.zeros(count, dtype=scales.dtype).index_add(0, tie, torch.ones_like(scales))
    return (sums / numbers)[tie].exp()


def _shares(weight: Tensor, group: int) -> Tensor:
    out, size = weight.shape
    group = group or size
    padded = torch.nn.functional.pad(weight.abs(), (0, -size % group)).reshape(out, -1, group)
    return (padded / padded.amax(-1, keepdim=True).clamp(min=1e-12)).reshape(out, -1)[:, :size]


def _loss(weight: Tensor, scales: Tensor, moments: Tensor, form: LinearFormat, clip: Clip) -> float:
    grid = Grid.fit(scaled := weight * scales, form, clip=clip, moments=moments / torch.outer(scales, scales).to(moments.dtype))
    inputs = torch.arange(weight.shape[1])
    error = weight - grid.dense(grid.codes(scaled, inputs), inputs) / scales
    return float(((error @ moments.to(error.dtype)) * error).sum(dtype=torch.float64))
