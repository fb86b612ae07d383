"""Weights with a codebook in a checkpoint, hasten's own layout: for every number its place among sixteen.

Of a weight [out, in], or stacked ones: ``weight_packed`` int32 words of places, 4 bits each, and ``weight_shape`` as in compressed-tensors'
pack-quantized; ``weight_scale`` float32 [out, groups]; ``weight_codebook`` int8 [16], one for each of stacked ones: ascending, from -127 to
127, 0 among them. A number is its place's times its scale. No release of compressed-tensors has a layout for that."""

import numpy as np

from hasten.checkpoint.quantized.tensors import Parts
from hasten.formats import bits as bit_packing
from hasten.formats.codebook import LIMIT, SIZE, Codebook
from hasten.formats.linear import ClusteredLinear, QuantizedLinear
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Array, Weight

LAYOUT = "codebook-quantized"
ENDS = ("weight_codebook",)
BITS = 4  # of a place


def codebook_parts(stem: str, weight: QuantizedWeight) -> dict[str, Weight]:
    """The tensors that are written for a weight with a codebook, but for its scales."""
    shape = weight.shape
    words = (*shape[:-1], bit_packing.packed_width(shape[-1], BITS))
    return {
        f"{stem}.weight_packed": Weight(words, np.dtype("<i4"), lambda: bit_packing.pack(weight.quantized().q.astype(np.uint8), BITS)),
        f"{stem}.weight_shape": Weight((len(shape),), np.dtype("<i8"), lambda: np.array(shape, "<i8")),
        f"{stem}.weight_codebook": Weight((*shape[:-2], SIZE), np.dtype(np.int8), lambda: _codebook_of(weight.quantized())),
    }


def check_codebook(parts: Parts, stack: tuple[int, ...]) -> None:
    """Raise CheckpointError where the codebook of a weight, or of each of ``stack``, is missing or of another shape or kind."""
    parts.must_be("weight_codebook", (*stack, SIZE), "int8")


def read_codebook(parts: Parts) -> Codebook:
    """The numbers. Raises CheckpointError for some that no codebook has."""
    found: Codebook = parts.load("weight_codebook")
    wide = found.astype(np.int16)
    if (np.diff(wide) <= 0).any() or (wide < -LIMIT).any() or not (wide == 0).any(axis=-1).all():
        parts.wrong(
            "weight_codebook", f"has the numbers {wide.reshape(-1, SIZE)[0].tolist()}",
            f"{SIZE} ascending from -{LIMIT} to {LIMIT}, 0 among them; the file is damaged, download it again",
        )  # fmt: skip
    return found


def _codebook_of(its: QuantizedLinear) -> Array:
    if not isinstance(its, ClusteredLinear):
        raise ValueError("a format with a codebook, and a weight without")
    return its.codebook
