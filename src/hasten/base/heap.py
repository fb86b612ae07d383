"""How the C library keeps memory that was freed."""

import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
LARGE = 1 << 20


def large_apart(size: int = LARGE) -> None:
    """From now on arrays of ``size`` bytes and more lie in pages of their own, which go back to the system when they are freed. For the
    whole process; nothing where the C library has no mallopt(3).

    Left to itself the library raises that size to the largest array it saw freed, up to 32 MiB. Those below then leave holes in the heaps
    of whichever threads asked for them, which arrays of other sizes do not fill: work on matrices comes to hold twice what is alive."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; no C library to be found
        return
    mallopt(_MMAP_THRESHOLD, size)
