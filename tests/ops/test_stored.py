"""Digests and reads of stored bytes, against the published hash written out once more in Python."""

import ctypes
import mmap
import os
import sys
import threading
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


@pytest.mark.timed
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


# --- files that are played where the system keeps them


HUGE = 2 << 20
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges pages in place")


def stored(path, sizes, seed=0):
    """A file of random parts at multiples of 4096, its extents and their digests."""
    generator, extents, digests = np.random.default_rng(seed), [], []
    with open(path, "wb") as file:
        for size in sizes:
            file.write(bytes(4096 - file.tell() % 4096))
            data = generator.integers(0, 256, size, np.uint8)
            extents.append((file.tell(), size))
            digests.append(_native.digest(data))
            file.write(data.tobytes())
        file.write(b"end")
    return extents, digests


def mapped(path):
    with open(path, "rb") as file:
        return _native.MappedFile(file.fileno(), os.fstat(file.fileno()).st_size)


@pytest.mark.parametrize("threads", [1, 2])
def test_digests_of_a_mapped_file(tmp_path, threads):
    extents, digests = stored(tmp_path / "file", [1, CHUNK, 3 * CHUNK + 17, 4096, 5 * CHUNK - 1])
    file = mapped(tmp_path / "file")
    assert file.digests(_native.ThreadPool(threads), extents) == digests
    assert file.digests(_native.ThreadPool(threads), []) == []
    with pytest.raises(ValueError, match="beyond"):
        file.digests(_native.ThreadPool(1), [(4096, (tmp_path / "file").stat().st_size)])
    with pytest.raises(OSError):
        _native.MappedFile(-1, 100)


@linux_only
@pytest.mark.parametrize("rest", [0, 1, 4096, HUGE - 1])
def test_a_moved_file_is_the_same(tmp_path, rest):
    extents, digests = stored(tmp_path / "file", [100, 3 * HUGE, HUGE // 2, HUGE + rest])
    file, pool = mapped(tmp_path / "file"), _native.ThreadPool(2)
    file.move(extents, digests)
    assert file.moved() == (tmp_path / "file").stat().st_size
    assert not file.changed
    (tmp_path / "file").write_bytes(bytes((tmp_path / "file").stat().st_size))  # no page of it is the file's any more
    assert file.digests(pool, extents) == digests


@linux_only
def test_whoever_reads_while_it_moves_sees_every_byte(tmp_path):
    extents, digests = stored(tmp_path / "file", [16 * HUGE])
    file, pool, rounds, ended = mapped(tmp_path / "file"), _native.ThreadPool(1), 0, threading.Event()
    file.move(extents, digests)
    waiter = threading.Thread(target=lambda: (file.moved(), ended.set()))
    waiter.start()
    while not ended.is_set():
        assert file.digests(pool, extents) == digests
        rounds += 1
    waiter.join()
    assert rounds > 1
    assert file.moved() == (tmp_path / "file").stat().st_size


@linux_only
def test_what_was_changed_before_it_was_moved_is_told(tmp_path):
    extents, digests = stored(tmp_path / "file", [HUGE, HUGE, 5])
    file = mapped(tmp_path / "file")
    assert file.digests(_native.ThreadPool(1), extents) == digests
    with open(tmp_path / "file", "r+b") as other:
        other.seek(extents[1][0] + 12345)
        byte = other.read(1)
        other.seek(-1, os.SEEK_CUR)
        other.write(bytes([byte[0] ^ 1]))
    file.move(extents, digests)
    assert file.moved()
    assert file.changed


@linux_only
def test_only_a_file_in_memory_is_resident(tmp_path):
    stored(tmp_path / "file", [4 * HUGE])
    assert mapped(tmp_path / "file").resident
    with open(tmp_path / "file", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if mapped(tmp_path / "file").resident:
        pytest.skip("this file system keeps its files in memory")


@pytest.mark.timed
def test_a_file_that_goes_while_it_moves(tmp_path):
    """What is not wanted any more is let go at once, moved or not."""
    extents, digests = stored(tmp_path / "file", [8 * HUGE])
    file = mapped(tmp_path / "file")
    file.move(extents, digests)
    began = time.monotonic()
    del file
    assert time.monotonic() - began < 0.9  # the move begins after a second


def test_a_weight_in_a_file_is_the_same(tmp_path):
    pool = _native.ThreadPool(2)
    dense = np.random.default_rng(0).normal(size=(37, 200)).astype(np.float32)
    for form, group, zero_points in (("bf16", 0, False), ("int8", 0, False), ("int4", 128, False), ("int4", 32, True)):
        packed, other = (_native.WeightBuffer(form, 37, 200, group, zero_points) for _ in range(2))
        packed.pack(pool, dense)
        offsets = []
        with open(tmp_path / "file", "wb") as file:
            for part in packed.parts():
                file.write(bytes(4096 - file.tell() % 4096))
                offsets.append(file.tell())
                file.write(part.tobytes())
        whole = mapped(tmp_path / "file")
        for wrong in (offsets[:-1], [*offsets, 4096], [offset + 1 for offset in offsets], [offset + 8192 for offset in offsets]):
            with pytest.raises(ValueError, match="part|hold"):
                other.lie_in(whole, wrong)
        assert not other.unpack().any()
        other.lie_in(whole, offsets)
        del whole
        assert np.array_equal(other.unpack(), packed.unpack())


def test_a_table_in_a_file(tmp_path):
    table, rows = _native.TableBuffer(5, 96), np.random.default_rng(0).integers(0x3C00, 0x4000, (5, 96), np.uint16)
    table.part[:] = rows.view(np.uint8).ravel()
    (tmp_path / "file").write_bytes(bytes(4096) + rows.tobytes())
    with pytest.raises(ValueError, match="hold"):
        table.lie_in(mapped(tmp_path / "file"), 8192)
    table.lie_in(mapped(tmp_path / "file"), 4096)
