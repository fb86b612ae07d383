"""Sparse weights in a checkpoint, hasten's own layout: a bit for every number, and those that are not zero, row after row.

Of a weight [out, in], or stacked ones: ``weight_bitmask`` uint8 [out, in / 8 rounded up], the lowest bit the first number;
``weight_compressed`` [kept], bfloat16 or int8, or, of int4, ``weight_packed`` int32 words of all that are kept; ``weight_scale`` float32
[out, groups] of integers; ``weight_shape``. The mask is that of compressed-tensors' sparse-bitmask, whose other tensors (``row_offsets``)
say what the mask says already. That format is not written, as neither its library (from 0.15 on) nor transformers reads it any more."""

import numpy as np

from hasten.checkpoint.quantized.tensors import Parts, checked_size
from hasten.formats import bits as bit_packing
from hasten.formats.linear import NUMBERS, LinearFormat
from hasten.formats.mapped import release
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import DTYPES, Array, Weight

LAYOUT = "bitmask-sparse"
ENDS = ("weight_bitmask", "weight_compressed")
KINDS = {"bf16": DTYPES["bfloat16"], "int8": np.dtype(np.int8)}


def sparse_parts(stem: str, weight: QuantizedWeight) -> dict[str, Weight]:
    """The tensors that are written for a sparse weight, but for its scales. Its numbers are counted now, and loaded for each."""
    form, *rows = weight.form, *weight.shape[:-1]
    kept = int(np.count_nonzero(weight.quantized().q))
    found = {
        f"{stem}.weight_bitmask": Weight((*rows, -(-weight.shape[-1] // 8)), np.dtype(np.uint8), lambda: _mask(weight.quantized().q)),
        f"{stem}.weight_shape": Weight((len(weight.shape),), np.dtype("<i8"), lambda: np.array(weight.shape, "<i8")),
    }
    if form.number in KINDS:
        kind = KINDS[form.number]
        found[f"{stem}.weight_compressed"] = Weight((kept,), kind, lambda: _kept(weight.quantized().q).astype(kind))
    else:
        words = (bit_packing.packed_width(kept, form.bits),)
        found[f"{stem}.weight_packed"] = Weight(
            words, np.dtype("<i4"), lambda: bit_packing.pack_signed(_kept(weight.quantized().q), form.bits)
        )
    return found


def sparse_shape(parts: Parts) -> tuple[int, ...]:
    """The shape of a sparse weight, which its mask must have too. Raises CheckpointError where it has another."""
    mask, count = parts.shape("weight_bitmask", "uint8"), parts.shape("weight_shape", "int32", "int64")
    if count != (len(mask),) or len(mask) not in {2, 3}:
        parts.wrong("weight_shape", f"has shape {list(count)} beside a mask of shape {list(mask)}", "one number for each axis, 2 or 3")
    shape = tuple(int(size) for size in parts.load("weight_shape"))
    for size in shape:
        checked_size(parts.name, "inputs, outputs or experts", size)
    if mask != (*shape[:-1], -(-shape[-1] // 8)):
        parts.wrong("weight_bitmask", f"has shape {list(mask)}", f"a bit for each of {list(shape)}, as 'weight_shape' says")
    return shape


def check_sparse(parts: Parts, form: LinearFormat) -> None:
    """Raise CheckpointError where the numbers that are kept are missing, or of another kind than ``form`` says."""
    part, kind = ("weight_compressed", KINDS[form.number].name) if form.number in KINDS else ("weight_packed", "int32")
    if len(parts.shape(part, kind)) != 1:
        parts.wrong(part, f"has shape {list(parts.shape(part, kind))}", "one axis, the numbers that are kept")


def sparse_numbers(parts: Parts, form: LinearFormat, shape: tuple[int, ...]) -> Array:
    """All numbers, zeros in their places: int8, or float32 of bf16. Raises CheckpointError for a mask that does not count what is kept."""
    packed = parts.load("weight_bitmask")
    bits = np.unpackbits(packed, axis=-1, bitorder="little").view(np.bool_)
    release(packed)
    if bits[..., shape[-1] :].any():
        parts.wrong(
            "weight_bitmask", f"has bits behind the {shape[-1]} inputs of a row", "zeros there; the file is damaged, download it again"
        )
    mask = bits[..., : shape[-1]]
    kept = int(np.count_nonzero(mask))
    part = "weight_compressed" if form.number in KINDS else "weight_packed"
    stored = parts.load(part)
    if len(stored) != (needed := kept if form.number in KINDS else bit_packing.packed_width(kept, form.bits)):
        parts.wrong(
            part, f"has {len(stored):,} entries", f"{needed:,} for the {kept:,} bits of the mask; the file is damaged, download it again"
        )
    values = stored if form.number in KINDS else bit_packing.unpack_signed(stored, form.bits, kept)
    if form.number == "int8" and kept and int(values.min()) == -128:
        parts.wrong(part, "has numbers from -128", "-127 to 127, which sparse weights are rounded to")
    q = np.zeros(shape, np.float32 if not NUMBERS[form.number][1] else np.int8)
    q[mask] = values
    release(stored)
    return q


def _mask(q: Array) -> Array:
    return np.packbits(q != 0, axis=-1, bitorder="little")


def _kept(q: Array) -> Array:
    kept: Array = q[q != 0]
    return kept
