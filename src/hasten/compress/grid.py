"""The numbers a weight may be rounded to: scales and zero points, and the search for better ones."""

import dataclasses
from typing import Literal, Self

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import UnsupportedError
from hasten.formats.linear import NUMBERS, LinearFormat, QuantizedLinear

Clip = Literal["none", "weights", "outputs"]
"""What a grid's range is chosen for: to hold every weight, or for the least squared error of the weights, or of what they give."""

CANDIDATES = 40
LEAST_RANGE = 0.4
"""Ranges tried by a search: so many, evenly from the whole of a group's to this share of it."""

LARGEST_BLOCK = 256
"""Inputs of a group up to which a search for outputs weighs errors by all of the group's second moments; beyond, by their diagonal."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """``scales`` and, where the format has them, ``zeros`` [out, groups], of ``group`` inputs each, in the weight's own dtype."""

    form: LinearFormat
    scales: Tensor
    zeros: Tensor | None
    group: int

    @classmethod
    def fit(cls, weight: Tensor, form: LinearFormat, *, clip: Clip = "none", moments: Tensor | None = None) -> Self:
        """The grid for ``weight`` [out, in]; ``moments`` [in, in] are Σ x·xᵀ over the inputs, which ``clip='outputs'`` needs.

        Without a search it is LinearFormat.quantize's. Raises UnsupportedError for a format that has no scales."""
        if not NUMBERS[form.number][1]:
            raise UnsupportedError(f"weights {form} have no scales, so nothing is to be fitted; choose one of int8, int4, int3, int2, fp8")
        group = form.group or weight.shape[1]
        parts = _grouped(weight, group)
        scales, zeros = _range(parts, form, 1.0)
        if clip != "none":
            weigh = _weigher(moments if clip == "outputs" else None, weight, group)
            best = weigh(parts - _dense(_codes(parts, scales, zeros, form), scales, zeros))
            for share in torch.linspace(1, LEAST_RANGE, CANDIDATES).tolist()[1:]:
                tried, tried_zeros = _range(parts, form, share)
                error = weigh(parts - _dense(_codes(parts, tried, tried_zeros, form), tried, tried_zeros))
                better = error < best
                best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
                if zeros is not None and tried_zeros is not None:
                    zeros = torch.where(better, tried_zeros, zeros)
        return cls(form, scales.T.contiguous(), None if zeros is None else zeros.T.contiguous(), group)

    def codes(self, columns: Tensor, inputs: Tensor) -> Tensor:
        """Stored numbers of ``columns`` [out, n], the weights of ``inputs`` [n]: rounded to nearest, half to even."""
        scales, zeros = self._of(inputs)
        return _codes(columns, scales, zeros, self.form)

    def dense(self, codes: Tensor, inputs: Tensor) -> Tensor:
        """What stored numbers [out, n] of ``inputs`` [n] stand for."""
        scales, zeros = self._of(inputs)
        return _dense(codes, scales, zeros)

    def quantized(self, codes: Tensor) -> QuantizedLinear:
        """All stored numbers [out, in] with the scales they go with."""
        zeros = None if self.zeros is None else self.zeros.numpy().astype(np.int32)
        q = codes.float().numpy().astype(ml_dtypes.float8_e4m3fn if self.form.number == "fp8" else np.int8)
        return QuantizedLinear(q, self.scales.float().numpy(), zeros, self.group)

    def _of(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        index = torch.div(inputs, self.group, rounding_mode="floor")
        return self.scales[:, index], None if self.zeros is None else self.zeros[:, index]


def _grouped(weight: Tensor, group: int) -> Tensor:
    """[groups, out, group]; what the last group lacks is 0, which any grid holds exactly."""
    out, size = weight.shape
    count = -(-size // group)
    padded = torch.nn.functional.pad(weight, (0, count * group - size))
    return padded.reshape(out, count, group).transpose(0, 1)


def _range(parts: Tensor, form: LinearFormat, share: float) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros [groups, out] for ``share`` of each group's range; a group of zeros has scale 1."""
    high, low = parts.amax(-1).clamp(min=0) * share, parts.amin(-1).clamp(max=0) * share
    if form.zero_points:
        span = (high - low) / (2**form.bits - 1)
        scales = torch.where(span > 0, span, torch.ones_like(span))
        least = -(2 ** (form.bits - 1))
        return scales, (torch.round(-low / scales) + least).clamp(least, -least - 1)
    span = torch.maximum(high, -low) / NUMBERS[form.number][1]
    return torch.where(span > 0, span, torch.ones_like(span)), None


def _codes(values: Tensor, scales: Tensor, zeros: Tensor | None, form: LinearFormat) -> Tensor:
    """``scales`` and ``zeros`` lie beside ``values``, or lack their last axis."""
    steps, limit = values / _beside(scales, values), NUMBERS[form.number][1]
    if form.number == "fp8":
        return steps.clamp(-limit, limit).to(torch.float8_e4m3fn).to(values.dtype)
    least = -(2 ** (form.bits - 1))
    if zeros is not None:
        return (torch.round(steps) + _beside(zeros, values)).clamp(least, -least - 1)
    # The one number more below zero is stored and played as any other; a range that holds every weight has no use for it.
    return torch.round(steps).clamp(least if form.bits < 8 else -limit, limit)


def _dense(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    return (codes if zeros is None else codes - _beside(zeros, codes)) * _beside(scales, codes)


def _beside(each: Tensor, values: Tensor) -> Tensor:
    return each if each.dim() == values.dim() else each[..., None]


class _weigher:
    """Sums of squared errors [groups, out], plain or weighed by second moments."""

    def __init__(self, moments: Tensor | None, weight: Tensor, group: int) -> None:
        self._square: Tensor | None = None
        self._diagonal: Tensor | None = None
        if moments is None:
            return
        size = weight.shape[1]
        lacking = -size % group
        if group > LARGEST_BLOCK:
            padded = torch.nn.functional.pad(moments.diagonal(), (0, lacking))
            self._diagonal = padded.reshape(-1, 1, group).to(weight.dtype)
        else:
            padded = torch.nn.functional.pad(moments, (0, lacking, 0, lacking))
            count = padded.shape[0] // group
            blocks = padded.reshape(count, group, count, group)
            self._square = torch.stack([blocks[i, :, i] for i in range(count)]).to(weight.dtype)

    def __call__(self, error: Tensor) -> Tensor:
        if self._square is not None:
            return ((error @ self._square) * error).sum(-1)
        return (error * error if self._diagonal is None else error * error * self._diagonal).sum(-1)
