"""Digests and reads of stored bytes, against the published hash written out once more in Python."""

import ctypes
import mmap
import os
import sys
import time

import numpy as np
import pytest

from hasten import _native

CHUNK = 256 << 10
MASK = (1 << 64) - 1
P1, P2, P3, P4, P5 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def rotated(value, by):
    return (value << by | value >> (64 - by)) & MASK


def rounded(sum_, word):
    return rotated((sum_ + word * P2) & MASK, 31) * P1 & MASK


def xxh64(data, seed):
    """xxHash specification, section "XXH64 algorithm description", step by step."""
    at = 0
    if len(data) < 32:
        hash_ = (seed + P5) & MASK
    else:
        lanes = [(seed + P1 + P2) & MASK, (seed + P2) & MASK, seed, (seed - P1) & MASK]
        for at in range(0, len(data) - 31, 32):
            for lane in range(4):
                lanes[lane] = rounded(lanes[lane], int.from_bytes(data[at + 8 * lane : at + 8 * lane + 8], "little"))
        at += 32
        hash_ = sum(rotated(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18))) & MASK
        for lane in lanes:
            hash_ = ((hash_ ^ rounded(0, lane)) * P1 + P4) & MASK
    hash_ = (hash_ + len(data)) & MASK
    while len(data) - at >= 8:
        hash_ = (rotated(hash_ ^ rounded(0, int.from_bytes(data[at : at + 8], "little")), 27) * P1 + P4) & MASK
        at += 8
    if len(data) - at >= 4:
        hash_ = (rotated(hash_ ^ int.from_bytes(data[at : at + 4], "little") * P1 & MASK, 23) * P2 + P3) & MASK
        at += 4
    for byte in data[at:]:
        hash_ = rotated(hash_ ^ byte * P5 & MASK, 11) * P1 & MASK
    for shift, prime in ((33, P2), (29, P3), (32, 1)):
        hash_ = (hash_ ^ hash_ >> shift) * prime & MASK
    return hash_


def expected(data):
    return sum(xxh64(data[begin : begin + CHUNK], number) for number, begin in enumerate(range(0, len(data), CHUNK))) & MASK


def test_the_published_values():
    assert xxh64(b"", 0) == 0xEF46DB3751D8E999
    assert xxh64(b"abc", 0) == 0x44BC2CF5AD770999
    assert _native.digest(np.frombuffer(b"abc", np.uint8)) == 0x44BC2CF5AD770999


@pytest.mark.parametrize("count", [*range(70), CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37])
def test_digest(count):
    data = np.random.default_rng(count).integers(0, 256, count, np.uint8)
    assert _native.digest(data) == expected(data.tobytes())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, 5 * CHUNK + 4097])
def test_read_stored(tmp_path, threads, count):
    data = np.random.default_rng(0).integers(0, 256, count, np.uint8)
    (tmp_path / "file").write_bytes(b"x" * 777 + data.tobytes() + b"y")
    room = np.full(count, 0xAA, np.uint8)
    with open(tmp_path / "file", "rb") as file:
        assert _native.read_stored(_native.ThreadPool(threads), file.fileno(), 777, room) == _native.digest(data)
    assert np.array_equal(room, data)


def test_swapped_chunks_differ():
    data = np.random.default_rng(0).integers(0, 256, (2, CHUNK), np.uint8)
    assert _native.digest(data.ravel()) != _native.digest(data[::-1].ravel().copy())


def test_what_cannot_be_read(tmp_path):
    pool, room = _native.ThreadPool(2), np.zeros(3 * CHUNK, np.uint8)
    (tmp_path / "short").write_bytes(b"x" * (2 * CHUNK + 5))
    with open(tmp_path / "short", "rb") as file:
        with pytest.raises(OSError):
            _native.read_stored(pool, file.fileno(), 0, room)
        with pytest.raises(OSError):
            _native.read_stored(pool, file.fileno(), 1 << 40, room)
    with pytest.raises(OSError):
        _native.read_stored(pool, -1, 0, room)


def resident(mapped):
    """Whether each page of a mapping is in memory."""
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    found = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
    assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0
    return np.frombuffer(found, np.uint8) & 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
def test_what_will_be_needed_is_fetched(tmp_path):
    with open(tmp_path / "file", "wb+") as file:
        file.write(np.random.default_rng(0).bytes(8 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if resident(mapped).any():
        pytest.skip("this file system keeps its files in memory")
    _native.will_need(np.frombuffer(mapped, np.uint8)[100 : (4 << 20) - 100])
    half = len(resident(mapped)) // 2
    deadline = time.monotonic() + 20
    while not resident(mapped)[:half].all():
        assert time.monotonic() < deadline, resident(mapped)[:half].mean()
        time.sleep(0.01)
    _native.will_need(np.empty(0, np.uint8))


def test_a_weight_is_the_same_from_its_parts():
    pool = _native.ThreadPool(2)
    dense = np.random.default_rng(0).integers(0x3C00, 0x4000, (37, 200), np.uint16)
    for form, group in (("bf16", 0), ("int8", 0), ("int4", 0), ("int4", 128)):
        packed, filled = (_native.WeightBuffer(form, 37, 200, group) for _ in range(2))
        packed.pack(pool, dense)
        assert sum(part.nbytes for part in packed.parts()) == packed.nbytes
        for room, part in zip(filled.parts(), packed.parts(), strict=True):
            assert not room.any()
            room[:] = part
        assert all(part.any() for part in filled.parts())
    with pytest.raises(ValueError, match="dense"):
        packed.pack(pool, dense[:, :199].copy())
