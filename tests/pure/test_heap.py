"""What was freed between things that are still there goes back to the system."""

import ctypes
import json
import subprocess
import sys

import pytest

from hasten.base import heap

HOLES = """
import json, re
from pathlib import Path
from hasten.base import heap

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) << 10

chunks = [bytearray(40_000) for _ in range(2000)]
for chunk in chunks:
    chunk[::1024] = bytes(len(range(0, 40_000, 1024)))
kept = chunks[49::50]  # the last one too: what is free at the end goes back by itself
del chunks, chunk
before = held()
heap.give_back()
print(json.dumps([before - held(), len(kept), any(map(any, kept))]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_holes_go_back():
    """In a process of its own: in another's heap the holes would be filled by what is there."""
    said = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True).stdout
    back, kept, changed = json.loads(said)
    assert back > 10 << 20
    assert kept == 40
    assert not changed


def test_a_library_without_it_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.give_back()
