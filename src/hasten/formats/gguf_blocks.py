"""What the blocks of GGUF's tensor types mean. Source: https://github.com/ggml-org/ggml, src/ggml-common.h and src/ggml-quants.c."""

import numpy as np
from numpy.typing import NDArray

from hasten.formats.linear import Floats, LinearFormat, QuantizedLinear

Bytes = NDArray[np.uint8]

STORED = {"Q8_0": LinearFormat("int8", 32), "Q4_0": LinearFormat("int4", 32)}
"""Types whose codes and scales are those of a format, as they are."""


def codes(kind: str, raw: Bytes, shape: tuple[int, ...]) -> QuantizedLinear:
    """The numbers of a tensor in Q8_0 or Q4_0; float16 scales d of either sign.

    Q8_0: d, 32 of int8. Q4_0: d, 16 bytes whose low nibbles are numbers 0 to 15, the high ones 16 to 31; q − 8."""
    size = 34 if kind == "Q8_0" else 18
    blocks = raw.reshape(-1, size)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32).reshape(*shape[:-1], -1)
    rest = blocks[:, 2:]
    if kind == "Q8_0":
        q = rest.copy().view(np.int8)
    else:
        q = (np.concatenate([rest & 0x0F, rest >> 4], axis=1) - np.uint8(8)).view(np.int8)
    empty = scales == 0  # a block of zeros, whatever its codes
    q[empty.reshape(-1)] = 0
    return QuantizedLinear(q.reshape(shape), np.where(empty, np.float32(1), scales), None, 32)


def dense(kind: str, raw: Bytes) -> Floats:
    """The numbers of a tensor in a type of 256 numbers to a block, float32, in order."""
    return {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}[kind](raw).reshape(-1)


def _half(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _scales_and_mins(raw: Bytes) -> tuple[Floats, Floats]:
    """12 bytes → 8 scales and 8 minima of 6 bits. Bytes 0 to 3 and 4 to 7 hold the first four of each in their lower 6 bits, and in the
    upper 2 the upper ones of the last four, whose lower 4 bits are the nibbles of bytes 8 to 11."""
    first, second, third = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | (first >> 6) << 4], axis=1)
    mins = np.concatenate([second & 0x3F, (third >> 4) | (second >> 6) << 4], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _q4_k(raw: Bytes) -> Floats:
    """d, dmin, 12 bytes of scales and minima, 128 of nibbles: 32 numbers in the low ones of 32 bytes, the next 32 in the high ones."""
    blocks = raw.reshape(-1, 144)
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    nibbles = blocks[:, 16:].reshape(-1, 4, 1, 32)
    q = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=2).reshape(-1, 8, 32).astype(np.float32)
    return _affine(blocks, scales, mins, q)


def _q5_k(raw: Bytes) -> Floats:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i of byte j is of number j of the 32 numbers i."""
    blocks = raw.reshape(-1, 176)
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    nibbles = blocks[:, 48:].reshape(-1, 4, 1, 32)
    low = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=2).reshape(-1, 8, 32)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _affine(blocks, scales, mins, (low | fifth << 4).astype(np.float32))


def _affine(blocks: Bytes, scales: Floats, mins: Floats, q: Floats) -> Floats:
    """(d · scale) · q − (dmin · min), 32 numbers a scale."""
    return (_half(blocks[:, 0:2]) * scales)[..., None] * q - (_half(blocks[:, 2:4]) * mins)[..., None]


def _q6_k(raw: Bytes) -> Floats:
    """128 bytes of lower nibbles, 64 of upper bit pairs, 16 scales of int8, d: (d · scale) · (q − 32), 16 numbers a scale. Of each 128
    numbers, 64 bytes hold numbers 0 to 63 in their low nibbles and the others in the high ones; 32 bytes hold the bit pairs, 32 numbers
    to each pair of bits."""
    blocks = raw.reshape(-1, 210)
    nibbles = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=2).reshape(-1, 256)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    q: Floats = (low | high.reshape(-1, 256) << 4).astype(np.float32) - np.float32(32)
    scales: Floats = _half(blocks[:, 208:210]) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return scales[..., None] * q.reshape(-1, 16, 16)
