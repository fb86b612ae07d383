"""A weight that is stored quantized: its codes and scales to the bit, and what they mean for whoever wants plain numbers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from hasten.base.errors import ConfigError, one_line
from hasten.formats.codebook import SIZE as CODEBOOK_SIZE
from hasten.formats.linear import NUMBERS, LinearFormat, QuantizedLinear
from hasten.formats.weights import Array, Weight

_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedWeight(Weight):
    """A weight [out, in], or weights stacked in one [count, out, in], stored in ``form``. ``load`` gives what it means, float32.

    ``quantized`` gives the stored numbers; ``activations`` (bf16, int8, fp8; int8-static: StaticWeight) are what it meets; ``bits`` are
    those of a number in the file, its share of scales, zero points, mask and codebook counted."""

    form: LinearFormat
    quantized: Callable[[], QuantizedLinear]
    activations: str
    bits: float

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        form: LinearFormat,
        quantized: Callable[[], QuantizedLinear],
        activations: str = "bf16",
        bits: float | None = None,
    ) -> Self:
        """``quantized`` is called for every use, so it should make what it can of a mapped file; unless ``bits`` are given, at once for a
        sparse weight, whose numbers are counted, and scales count as float32. Raises ConfigError for activations that the format is not
        multiplied with."""
        if activations not in form.activations:
            raise ConfigError(
                f"activations {one_line(activations)} do not go with weights in {form}; accepted: {', '.join(form.activations)}"
            )
        if bits is None:
            bits = _bits_of(shape, form, int(np.count_nonzero(quantized().q)) if form.sparse else math.prod(shape))
        return cls(shape, _FLOAT32, lambda: quantized().dense(), form, quantized, activations, bits)

    @classmethod
    def from_array(cls, dense: Array, form: LinearFormat, activations: str = "bf16") -> Self:
        """``dense`` [out, in] or [count, out, in] rounded to nearest (LinearFormat.quantize), kept in memory."""
        whole = form.quantize(dense)
        return cls.of(dense.shape, form, lambda: whole, activations)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form, scales, zero points and mask counted."""
        return math.ceil(self.size * self.bits / 8)


def _bits_of(shape: tuple[int, ...], form: LinearFormat, kept: int) -> float:
    """Bits of a number, where ``kept`` of all are stored."""
    width, groups = max(1, shape[-1]), -(-shape[-1] // form.group) if form.group else 1
    scales = groups * (32 + form.bits * form.zero_points) if NUMBERS[form.number][1] else 0
    mask = 8 * -(-width // 8) if form.sparse else 0
    codebook = 8 * CODEBOOK_SIZE / max(1, math.prod(shape[-2:])) if form.has_codebook else 0
    return form.bits * kept / max(1, math.prod(shape)) + (scales + mask) / width + codebook


def is_pruned(weight: Weight) -> bool:
    """Whether zeros were taken out of it, and nothing was rounded."""
    return isinstance(weight, QuantizedWeight) and weight.form.sparse and not NUMBERS[weight.form.number][1]


STATIC = "int8-static"


@dataclasses.dataclass(frozen=True, slots=True)
class StaticWeight(QuantizedWeight):
    """A quantized weight that is multiplied with int8 activations of one scale for all tokens, ``input_scale``, a float32."""

    input_scale: float


def static(weight: QuantizedWeight, input_scale: float) -> StaticWeight:
    """``weight``, fed int8 of one scale. Raises ConfigError for a scale that is no positive float32, or a format that is not fed int8."""
    scale = float(np.float32(input_scale))
    if not 0 < scale < math.inf or "int8" not in weight.form.activations:
        raise ConfigError(f"activations of scale {input_scale} do not go with weights in {weight.form}; a positive number is needed")
    return StaticWeight(weight.shape, weight.dtype, weight.load, weight.form, weight.quantized, STATIC, weight.bits, scale)


def static_as(weights: Sequence[QuantizedWeight], made: QuantizedWeight) -> QuantizedWeight:
    """``made`` of all of ``weights``, fed int8 of the scale that they agree on; else of each token's own, which rounds less."""
    scales = {weight.input_scale if isinstance(weight, StaticWeight) else None for weight in weights}
    (scale, *others) = scales
    return made if others or scale is None else static(made, scale)


@dataclasses.dataclass(frozen=True, slots=True)
class DequantizedWeight(Weight):
    """What a weight means, float32, that is ``stored`` in a format it cannot be had in, for ``reason``; ``bits`` are those of a number."""

    stored: str
    reason: str
    bits: float

    @classmethod
    def of(cls, shape: tuple[int, ...], load: Callable[[], Array], stored: str, reason: str, bits: float) -> Self:
        """``load`` gives float32."""
        return cls(shape, _FLOAT32, load, stored, reason, bits)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return math.ceil(self.size * self.bits / 8)


def dequantized(weight: QuantizedWeight, reason: str) -> DequantizedWeight:
    """The meaning of ``weight`` alone."""
    return DequantizedWeight.of(weight.shape, weight.load, str(weight.form), reason, weight.bits)


def stored_as(weight: Weight) -> str:
    """How a weight is stored, in words: its dtype, or its format and what that is multiplied with."""
    match weight:
        case QuantizedWeight():
            return f"{weight.form} × {weight.activations}"
        case DequantizedWeight():
            return weight.stored
        case _:
            return str(weight.dtype)
