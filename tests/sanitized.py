"""A pytest plugin: the tests run on the extension at ``HASTEN_SANITIZED``, built with sanitizers, and not on the one installed.

As a program it writes past the end of a tape's arena, which AddressSanitizer must stop.
"""

import importlib.util
import os
import sys

import numpy as np

import hasten

PATH = os.environ["HASTEN_SANITIZED"]

spec = importlib.util.spec_from_file_location("hasten._native", PATH)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
sys.modules["hasten._native"] = hasten._native = native


def pytest_report_header():
    return f"hasten._native is {PATH}"


def overrun():
    """Two rows of 64 bytes where the arena has room for one."""
    tape = native.Tape(native.ThreadPool(1), "generic", 4096, 4, 8, 16)
    tape.embed(np.zeros((8, 16), np.uint16), 1.0, 4096 - 64)
    ids, none = np.arange(2, dtype=np.int32), np.zeros(0, np.int32)
    tape.run(ids, ids, np.array([0, 2], np.int32), none, [native.PageTable([])], np.zeros((0, 8), np.float32))


if __name__ == "__main__":
    overrun()
    sys.exit("nobody noticed")
