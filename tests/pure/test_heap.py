"""What was freed between things that are still there goes back to the system."""

import ctypes
import re
from pathlib import Path

import pytest

from hasten.base import heap

HELD = re.compile(r"RssAnon:\s+(\d+) kB")
COUNT, SIZE = 2000, 40_000  # below what the C library would map apart


def held():
    return int(HELD.search(Path("/proc/self/status").read_text()).group(1)) << 10


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_holes_go_back():
    kept, freed = [], []
    for number in range(COUNT):
        freed.append(bytearray(SIZE))
        freed[-1][::1024] = bytes(len(range(0, SIZE, 1024)))
        if number % 50 == 49:
            kept.append(bytearray(600))  # behind what will be a hole
    freed.clear()
    before = held()
    heap.give_back()
    assert before - held() > COUNT * SIZE / 8  # what lies at the end went back by itself
    assert len(kept) == COUNT // 50
    assert not any(map(any, kept))


def test_a_library_without_it_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.give_back()
