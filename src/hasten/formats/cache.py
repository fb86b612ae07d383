"""Row formats: how a cache stores what a token leaves behind, in plain numpy.

A row is what one token has in one layer: the key or the value of one head, or its latent row. A backend that stores rows otherwise
gives the same bits."""

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UnsupportedError, one_line
from hasten.formats.weights import DTYPES, Array

TINY = 2.0**-110  # a row no larger than this is kept as zeros, so that no scale is subnormal


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
    """Elements of one byte and one float32 scale a row: scale = max|x| / ``largest``, element = x / scale rounded half to even to
    ``dtype``, all in float32. A row below 2⁻¹¹⁰ has scale 1; one with an infinity or NaN has zeros and scale NaN."""

    dtype: np.dtype[np.generic]
    largest: float

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of ``n`` elements, its scale among them."""
        return n * self.dtype.itemsize + 4

    def encode(self, rows: Array) -> tuple[Array, NDArray[np.float32]]:
        """Elements [..., n] of ``dtype`` and scales [..., 1] of float32 ``rows`` [..., n]."""
        x = rows.astype(np.float32, copy=False)
        most = np.abs(x).max(axis=-1, keepdims=True)
        finite = np.isfinite(most)
        scales = np.where(most < TINY, np.float32(1), most / np.float32(self.largest))
        scales = np.where(finite, scales, np.float32(np.nan)).astype(np.float32)
        ratio = np.where(finite, x, np.float32(0)) / np.where(finite, scales, np.float32(1))
        return (np.rint(ratio) if self.dtype == np.int8 else ratio).astype(self.dtype), scales

    def decode(self, elements: Array, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """element · scale, float32 [..., n]."""
        with np.errstate(over="ignore"):  # the largest float32 may round up
            return np.asarray(elements.astype(np.float32) * scales, np.float32)


ROW_FORMATS: Mapping[str, PlainRows | ScaledRows] = {
    **{name: PlainRows(dtype) for name, dtype in DTYPES.items()},
    "int8": ScaledRows(np.dtype(np.int8), 127.0),
    "fp8": ScaledRows(np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
}
"""The formats of a state group, by the name it carries; fp8 is e4m3 without infinities (Micikevicius et al. 2022, arXiv:2209.05433)."""

CACHE_FORMATS: Mapping[str, str] = {"bf16": "bfloat16", "int8": "int8", "fp8": "fp8"}
"""What a user may ask for → the state group's format."""


def cache_format(name: str) -> str:
    """The state group's format for what a user asked for. Raises UnsupportedError for a name that is none of them."""
    if name not in CACHE_FORMATS:
        raise UnsupportedError(f"cache {one_line(name)} is not supported; accepted are {', '.join(CACHE_FORMATS)}: choose one of them")
    return CACHE_FORMATS[name]
