"""How the C library keeps memory that was freed."""

import contextlib
import ctypes
from collections.abc import Iterator, Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
_USUAL_TRIM = 128 << 10  # what mallopt(3) says it is
_MOST = 32 << 20  # the largest M_MMAP_THRESHOLD that glibc takes
LARGE = 1 << 20


def large_apart(size: int = LARGE) -> None:
    """From now on arrays of ``size`` bytes and more lie in pages of their own, which go back to the system when they are freed. For the
    whole process; nothing where the C library has no mallopt(3).

    Left to itself the library raises that size to the largest array it saw freed, up to 32 MiB. Those below then leave holes in the heaps
    of whichever threads asked for them, which arrays of other sizes do not fill: work on matrices comes to hold twice what is alive."""
    _mallopt({_MMAP_THRESHOLD: size, _TRIM_THRESHOLD: _USUAL_TRIM})


@contextlib.contextmanager
def large_kept() -> Iterator[None]:
    """In here freed arrays of up to 32 MiB stay with the process, for the next of their size: work that makes the same arrays over and
    over would else wait for the system to clear pages anew each time. For the whole process; afterwards as `large_apart` has it."""
    _mallopt({_MMAP_THRESHOLD: _MOST, _TRIM_THRESHOLD: 2**31 - 1})
    try:
        yield
    finally:
        large_apart()


def _mallopt(options: Mapping[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; no C library to be found
        return
    for option, value in options.items():
        mallopt(option, value)
