"""Pages of mapped files that were read and are not needed for now: they go back to the system, to be read again when touched."""

import mmap
import os

import numpy as np

from hasten.formats.weights import Array

_ENTRY = 8  # bytes of /proc/self/pagemap that tell of a page
_PRESENT, _OF_A_FILE = np.uint64(3 << 62), np.uint64(1 << 61)  # in memory or swapped out; and as the file has it


def release(array: Array) -> int:
    """Give back the pages that lie wholly within ``array``, where it is a view of a mapped file and nobody has written to it; how many
    bytes. What the array reads is the same before and after. Nobody may write to it meanwhile.

    Does nothing where the system does not tell which pages were written to (Documentation/admin-guide/mm/pagemap.rst)."""
    owner: object = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not array.nbytes or not array.flags.c_contiguous:
        return 0
    page, first = mmap.PAGESIZE, array.ctypes.data
    begin, end = -(-first // page) * page, (first + array.nbytes) // page * page
    if begin >= end:
        return 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            told = np.frombuffer(os.pread(file.fileno(), (end - begin) // page * _ENTRY, begin // page * _ENTRY), np.uint64)
    except OSError:
        return 0
    if len(told) != (end - begin) // page or ((told & _PRESENT != 0) & (told & _OF_A_FILE == 0)).any():
        return 0
    start = np.frombuffer(owner, np.uint8).ctypes.data
    owner.madvise(mmap.MADV_DONTNEED, begin - start, end - begin)
    return int(np.count_nonzero(told & _PRESENT)) * page
