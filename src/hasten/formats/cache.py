"""Row formats: how a cache stores what a token leaves behind, in plain numpy.

A row is what one token has in one layer: the key or the value of one head, or its latent row. A backend that stores rows otherwise
gives the same bits."""

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UnsupportedError, one_line
from hasten.formats.weights import DTYPES, Array, Weight

LEAST_SCALE, MOST_SCALE = 2.0**-24, 65504.0
"""Between what a float16 can say: a row that would want less is kept coarser, one that would want more is cut off."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlainRows:
    """Every element rounded to ``dtype``, to nearest even."""

    dtype: np.dtype[np.generic]

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of ``n`` elements."""
        return n * self.dtype.itemsize

    def encode(self, rows: Array) -> tuple[Array, None]:
        """Elements [..., n] of the format's dtype; there are no scales."""
        with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are kept as such
            return rows.astype(self.dtype), None

    def decode(self, elements: Array, scales: None = None) -> Array:
        """What is stored, as it is."""
        return elements


@dataclasses.dataclass(frozen=True, slots=True)
class ScaledRows:
    """Elements of one byte and one float16 scale a row: scale = max|x| / ``largest`` in float32, brought within [2⁻²⁴, 65504] and rounded
    up to float16, so that no element passes ``largest`` for its rounding; element = x / scale in float32, brought within ±``largest`` and
    rounded half to even to ``dtype``. A row with an infinity or NaN has zeros and scale NaN."""

    dtype: np.dtype[np.generic]
    largest: float

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of ``n`` elements, its scale among them."""
        return n * self.dtype.itemsize + 2

    def encode(self, rows: Array) -> tuple[Array, NDArray[np.float16]]:
        """Elements [..., n] of ``dtype`` and float16 scales [..., 1] of float32 ``rows`` [..., n]."""
        x = rows.astype(np.float32, copy=False)
        most = np.abs(x).max(axis=-1, keepdims=True)
        finite = np.isfinite(most)
        wanted = np.clip(np.where(finite, most, np.float32(0)) / np.float32(self.largest), np.float32(LEAST_SCALE), np.float32(MOST_SCALE))
        near = wanted.astype(np.float16)
        scales = (near.view(np.uint16) + (near < wanted)).view(np.float16)  # the next float16 where the nearest is below
        ratio = np.clip(np.where(finite, x, np.float32(0)) / scales.astype(np.float32), -self.largest, self.largest)
        elements = (np.rint(ratio) if self.dtype == np.int8 else ratio).astype(self.dtype)
        return elements, np.where(finite, scales, np.float16(np.nan))

    def decode(self, elements: Array, scales: NDArray[np.float16]) -> NDArray[np.float32]:
        """element · scale, float32 [..., n]."""
        return np.asarray(elements.astype(np.float32) * scales.astype(np.float32), np.float32)


ROW_FORMATS: Mapping[str, PlainRows | ScaledRows] = {
    **{name: PlainRows(dtype) for name, dtype in DTYPES.items()},
    "int8": ScaledRows(np.dtype(np.int8), 127.0),
    "fp8": ScaledRows(np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
}
"""The formats of a state group, by the name it carries; fp8 is e4m3 without infinities (Micikevicius et al. 2022, arXiv:2209.05433)."""

CACHE_FORMATS: Mapping[str, str] = {"bf16": "bfloat16", "int8": "int8", "fp8": "fp8"}
"""What a user may ask for → the state group's format."""


@dataclasses.dataclass(frozen=True, slots=True)
class MeantCache:
    """How a model's keys and values are meant to be kept: ``format`` is what a user would ask for.

    ``scales`` are for engines that have one for a layer, by name: ``blocks.0.mixer.k_scale`` and ``v_scale``, what a stored element stands
    for. Rows here have scales of their own (ScaledRows), which are closer, so nothing here reads them: they are kept to be written."""

    format: str
    scales: Mapping[str, Weight] = dataclasses.field(default_factory=dict)


def cache_format(name: str) -> str:
    """The state group's format for what a user asked for. Raises UnsupportedError for a name that is none of them."""
    if name not in CACHE_FORMATS:
        raise UnsupportedError(f"cache {one_line(name)} is not supported; accepted are {', '.join(CACHE_FORMATS)}: choose one of them")
    return CACHE_FORMATS[name]
