"""Numbers of a few bits in 32-bit words, as checkpoints pack them: the lowest bits of a word are the first number."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = (2, 3, 4, 8)
"""Of the numbers that are read and written."""


def packed_width(count: int, bits: int) -> int:
    """Words that ``count`` numbers take."""
    return -(-count * bits // 32)


def unpack(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Words int32 […, packed_width(count)] → the ``count`` numbers in each last axis, uint8. Those of 3 bits may cross words."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return octets[..., :count]
    if bits == 3:
        each = np.unpackbits(octets, axis=-1, count=3 * count, bitorder="little").reshape(*octets.shape[:-1], count, 3)
        threes: NDArray[np.uint8] = np.asarray(each[..., 0] | each[..., 1] << 1 | each[..., 2] << 2, np.uint8)
        return threes
    per = 8 // bits
    numbers = np.empty((*octets.shape[:-1], octets.shape[-1] * per), np.uint8)
    for index in range(per):
        np.bitwise_and(octets >> (bits * index), (1 << bits) - 1, out=numbers[..., index::per])
    return numbers[..., :count]


def pack(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """The words of ``unpack``; the last is filled up with zeros."""
    count = numbers.shape[-1]
    size = 4 * packed_width(count, bits)
    if bits == 3:
        each = np.stack([numbers & 1, numbers >> 1 & 1, numbers >> 2 & 1], axis=-1).reshape(*numbers.shape[:-1], 3 * count)
        octets = np.packbits(each, axis=-1, bitorder="little")
        octets = np.concatenate([octets, np.zeros((*octets.shape[:-1], size - octets.shape[-1]), np.uint8)], axis=-1)
        return np.ascontiguousarray(octets).view("<i4")
    per = 8 // bits
    padded = np.zeros((*numbers.shape[:-1], size * per), np.uint8)
    padded[..., :count] = numbers
    octets = padded[..., ::per].copy()
    for index in range(1, per):
        octets |= padded[..., index::per] << (bits * index)
    return octets.view("<i4")


def pack_signed(numbers: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Words of signed numbers, each stored as one that is 2^(bits − 1) more and has no sign."""
    return pack((numbers.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8), bits)


def unpack_signed(words: NDArray[Any], bits: int, count: int) -> NDArray[np.int8]:
    """The numbers of ``pack_signed``."""
    return (unpack(words, bits, count) - np.uint8(1 << (bits - 1))).view(np.int8)


def unpack_within(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Words that hold 32 // bits numbers each, the bits left over unused: how 3 bits were packed before they crossed words."""
    per = 32 // bits
    shifts = np.arange(per, dtype=np.uint32) * np.uint32(bits)
    each = np.ascontiguousarray(words, "<i4").view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return each.astype(np.uint8).reshape(*words.shape[:-1], words.shape[-1] * per)[..., :count]
