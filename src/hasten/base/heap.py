"""Memory that was freed, and that the C library keeps for whoever asks next."""

import ctypes


def give_back() -> None:
    """Hand pages that hold nothing back to the system, those between others too (malloc_trim(3)); no more than a C library without it does.

    Work on many threads leaves each thread's heap with holes of its own, which later work of other sizes does not fill."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; no C library to be found
        return
    trim(ctypes.c_size_t(0))
