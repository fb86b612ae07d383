"""Threads that run when the others let them."""

import contextlib
import os
import sys
import threading


def give_way() -> None:
    """Let all other threads of this machine run before this one. Only Linux gives threads priorities of their own by this call."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
