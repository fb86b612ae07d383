"""Large arrays go back to the system one by one, whatever lies between them."""

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

def array(size):
    made = bytearray(size)
    made[::1024] = bytes(len(range(0, size, 1024)))
    return made

{call}
del array(16 << 20)[:1]  # from now on the library itself would keep less than that in its heap
arrays = [array(3 << 20) for _ in range(40)]
kept = arrays[4::5]  # the last one too: what is free at the end goes back by itself
before = held()
del arrays
print(json.dumps([before - held(), len(kept), any(map(any, kept))]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
@pytest.mark.parametrize(
    ("call", "goes_back"),
    [
        ("heap.large_apart()", True),
        ("", False),
        ("heap.large_apart(); inside = heap.large_kept(); inside.__enter__()", False),
        ("with heap.large_kept(): pass", True),
    ],
)
def test_holes_go_back(call, goes_back):
    """In a process of its own, for it is the whole process that is changed. Without the call they stay, and where they are to be kept."""
    script = HOLES.replace("{call}", call)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    back, kept, changed = json.loads(said)
    assert (back > 80 << 20) == goes_back, back
    assert kept == 8
    assert not changed


TOP = (
    HOLES[: HOLES.index("del array")]
    + """
arrays = [array(3 << 20) for _ in range(8)]
after = bytes(100)  # small, and at the end of the heap
before = held()
del arrays, after
print(json.dumps([before - held()]))
"""
)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_what_is_free_at_the_end_stays_where_it_is_to_be_kept():
    script = TOP.replace("{call}", "heap.large_apart(); inside = heap.large_kept(); inside.__enter__()")
    (back,) = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert back < 3 << 20


def test_a_library_without_it_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.large_apart()
    with heap.large_kept():
        pass
