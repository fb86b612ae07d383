"""How the weight of a linear layer is stored: every format by its name, and its plain meaning in numpy.

A name is a number format, then what differs from the usual, with hyphens: ``int4``, ``int4-g32``, ``int4-channel``, ``int3-g64-zp``,
``int8-g128``, ``bf16-sparse``. Formats with scales share one per output channel (fp8, int8) or per channel and 128 inputs (int4, int3,
int2, lut4) unless the name says ``-gN`` or ``-channel``; ``-zp`` adds zero points; ``-sparse`` stores what is not zero, and a mask.
lut4 stores places in a codebook of 16 numbers of one byte, which a whole matrix shares."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UnsupportedError, one_line
from hasten.formats.codebook import LIMIT, Codebook, fitted, places

Floats = NDArray[np.float32]

# number → bits, the largest value of the symmetric form (0: no scales), inputs per scale unless named
NUMBERS = {
    "f32": (32, 0.0, 0), "f16": (16, 0.0, 0), "bf16": (16, 0.0, 0), "fp8": (8, 448.0, 0),
    "int8": (8, 127.0, 0), "int4": (4, 7.0, 128), "int3": (3, 3.0, 128), "int2": (2, 1.0, 128),
    "lut4": (4, float(LIMIT), 128),
}  # fmt: skip
WITH_ZERO_POINTS = ("int4", "int3", "int2")
WITH_CODEBOOK = ("lut4",)
SPARSE = ("bf16", "int8", "int4")
GROUPS = (32, 64, *range(128, 1025, 128))


@dataclasses.dataclass(frozen=True, slots=True)
class LinearFormat:
    """``group`` inputs share a scale; 0: one scale per output channel, or none where the number has no scales.

    A checkpoint may store what no name says: groups of another size, int8 with zero points."""

    number: str
    group: int = 0
    zero_points: bool = False
    sparse: bool = False

    @classmethod
    def parse(cls, name: str) -> Self:
        """The format of that name. Raises UnsupportedError, saying what is accepted."""
        number, *rest = name.split("-")
        if number not in NUMBERS:
            raise UnsupportedError(
                f"weights {one_line(name)} are not supported; accepted are {', '.join(NUMBERS)}, and variants such as int4-g64"
            )
        _, limit, group = NUMBERS[number]
        zero_points = sparse = False
        for part in rest:
            if part == "zp" and number in WITH_ZERO_POINTS and not zero_points:
                zero_points = True
            elif part == "sparse" and number in SPARSE and not sparse:
                sparse = True
            elif part == "channel" and limit:
                group = 0
            elif part.startswith("g") and part[1:].isdecimal() and int(part[1:]) in GROUPS and limit:
                group = int(part[1:])
            else:
                raise UnsupportedError(
                    f"weights {one_line(name)} are not supported: {number} has no variant {part!r}; it has {_variants(number)}"
                )
        if sparse and zero_points:
            raise UnsupportedError(
                f"weights {one_line(name)} are not supported: what a sparse weight leaves out is 0, so it has no zero points"
            )
        return cls(number, group, zero_points, sparse)

    def __str__(self) -> str:
        usual = NUMBERS[self.number][2]
        group = "" if self.group == usual else "-channel" if self.group == 0 else f"-g{self.group}"
        return self.number + group + "-zp" * self.zero_points + "-sparse" * self.sparse

    @property
    def has_name(self) -> bool:
        """Whether it can be asked for, and so is played as it is."""
        wide = self.group == 0 or (self.group in GROUPS and NUMBERS[self.number][1] > 0)
        return wide and not (self.zero_points and self.number not in WITH_ZERO_POINTS)

    @property
    def bits(self) -> int:
        """Of a stored number, its share of scales and codebook not counted."""
        return NUMBERS[self.number][0]

    @property
    def is_integer(self) -> bool:
        """Whether products with int8 activations are exact sums of integers."""
        return self.number.startswith("int") or self.has_codebook

    @property
    def has_codebook(self) -> bool:
        """Whether what is stored are places in a codebook (ClusteredLinear)."""
        return self.number in WITH_CODEBOOK

    @property
    def activations(self) -> tuple[str, ...]:
        """What the format can be multiplied with, the usual first."""
        if self.is_integer:
            return "int8", "bf16"
        return ("f32",) if self.number in {"f32", "f16"} else ("bf16", "fp8") if self.number == "fp8" else ("bf16",)

    def as_sparse(self) -> Self:
        """The same with zeros left out, for a weight that was pruned. Raises UnsupportedError for a format that has no such form."""
        if self.number not in SPARSE or self.zero_points:
            raise UnsupportedError(
                f"weights that were pruned are not stored in {self}, which has no sparse form; accepted: {', '.join(SPARSE)}, without -zp"
            )
        return dataclasses.replace(self, sparse=True)

    def quantize(self, dense: NDArray[np.generic]) -> "QuantizedLinear":
        """``dense`` [out, in], or matrices stacked, rounded to nearest, half to even, in float32; in a codebook to the larger of two.

        Symmetric: scale = max|w| / limit. With zero points: scale = (max(w, 0) − min(w, 0)) / (2^bits − 1), zero = what 0 rounds to.
        A group of zeros has scale 1. A codebook is the one with the least squared error, each matrix has its own."""
        if dense.ndim > 2:
            return stacked([self.quantize(matrix) for matrix in dense])
        weight = dense.astype(np.float32)
        out, size = weight.shape
        bits, limit, _ = NUMBERS[self.number]
        if not limit:
            rounded = _rounded(weight, self.number)  # as float32, which holds them all
            return QuantizedLinear(rounded + np.float32(0) if self.sparse else rounded, None, None, 0)  # -0 + 0 is 0, which is left out
        group = self.group or size
        count = -(-size // group)
        scales, zeros = np.ones((out, count), np.float32), np.zeros((out, count), np.int32)
        q = np.empty(weight.shape, ml_dtypes.float8_e4m3fn if self.number == "fp8" else np.int8)
        for index in range(count):
            part = weight[:, index * group : (index + 1) * group]
            high, low = part.max(1, initial=0), part.min(1, initial=0)
            span = (high - low) / np.float32(2**bits - 1) if self.zero_points else np.maximum(high, -low) / np.float32(limit)
            scale = scales[:, index] = np.where(span == 0, np.float32(1), span)
            if self.has_codebook:
                continue
            with np.errstate(invalid="ignore"):  # of what is not finite the scale tells
                steps = part / scale[:, None]
            if self.number == "fp8":
                rounded = np.clip(steps, -limit, limit)
            elif self.zero_points:
                least = -(2 ** (bits - 1))
                zero = zeros[:, index] = np.clip(np.rint(np.nan_to_num(-low / scale)).astype(np.int32) + least, least, -least - 1)
                rounded = np.nan_to_num(np.clip(np.rint(steps) + zero[:, None], least, -least - 1))
            else:
                rounded = np.nan_to_num(np.clip(np.rint(steps), -limit, limit))
            q[:, index * group : (index + 1) * group] = rounded
        if self.has_codebook:
            codebook = fitted(weight, scales, group)
            return ClusteredLinear(places(weight, scales, group, codebook), scales, None, group, codebook)
        return QuantizedLinear(q, scales, zeros if self.zero_points else None, group)


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """``q`` [out, in] are the stored numbers: int8 (all integers), float8_e4m3fn, or float32 where there are no scales. ``scales`` float32
    and ``zeros`` int32 [out, groups] go with ``group`` inputs, the last perhaps with fewer. Stacked weights have an axis before these."""

    q: NDArray[Any]
    scales: Floats | None
    zeros: NDArray[np.int32] | None
    group: int

    def __getitem__(self, index: int) -> Self:
        """The weight of that number, of stacked ones."""
        scales, zeros = (None if each is None else each[index] for each in (self.scales, self.zeros))
        return dataclasses.replace(self, q=self.q[index], scales=scales, zeros=zeros)

    def dense(self) -> Floats:
        """What the stored numbers stand for: (q − zero) · scale, float32 [out, in]."""
        if self.scales is None:
            return self.q.astype(np.float32, copy=False)
        dense = self.q.astype(np.float32)
        with np.errstate(invalid="ignore"):  # 0 · inf, which is not a number
            for index in range(self.scales.shape[-1]):
                part = dense[..., index * self.group : (index + 1) * self.group]
                if self.zeros is not None:
                    part -= self.zeros[..., index, None]
                part *= self.scales[..., index, None]
        return dense


@dataclasses.dataclass(frozen=True, slots=True)
class ClusteredLinear(QuantizedLinear):
    """``q`` are places in ``codebook`` int8 [16], ascending, 0 among them; stacked weights have a codebook each, [count, 16]."""

    codebook: Codebook

    def __getitem__(self, index: int) -> Self:
        """The weight of that number, of stacked ones."""
        plain = QuantizedLinear.__getitem__(self, index)
        return dataclasses.replace(self, q=plain.q, scales=plain.scales, codebook=self.codebook[index])

    def dense(self) -> Floats:
        """What the places stand for: codebook[q] · scale, float32 [out, in]."""
        numbers = np.take_along_axis(self.codebook[..., None, :], self.q.astype(np.int64), axis=-1)
        return QuantizedLinear(numbers, self.scales, None, self.group).dense()


def stacked(matrices: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Weights of one format and shape, with an axis before theirs."""
    first = matrices[0]
    q, scales, zeros = (_stack([getattr(each, name) for each in matrices]) for name in ("q", "scales", "zeros"))
    if not isinstance(first, ClusteredLinear):
        return QuantizedLinear(q, scales, zeros, first.group)
    codebooks = np.stack([each.codebook for each in matrices if isinstance(each, ClusteredLinear)])
    return ClusteredLinear(q, scales, zeros, first.group, codebooks)


def _stack(arrays: Sequence[Any]) -> Any:
    return None if arrays[0] is None else np.stack(arrays)


def _rounded(values: Floats, number: str) -> Floats:
    kinds = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    with np.errstate(over="ignore"):
        return values.astype(kinds[number]).astype(np.float32)


def _variants(number: str) -> str:
    scaled = ["-channel", "-gN with N of 32, 64, 128, 256 … 1024"] if NUMBERS[number][1] else []
    return ", ".join([*scaled, *["-zp"] * (number in WITH_ZERO_POINTS), *["-sparse"] * (number in SPARSE)]) or "none"
