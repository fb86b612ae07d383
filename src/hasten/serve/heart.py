"""The heart of the engine's process: what tells the server, from a thread of its own, that the process runs and how far its loop is.

A process that was stopped does not beat. A loop that hangs beats on, but neither its steps nor its processor time go on. A step that only
takes long, because the model is large, uses the processor meanwhile."""

import os
import struct
import threading
import time
from dataclasses import dataclass

BEAT_S = 0.5
_BEAT = struct.Struct("<QdB")
READ = 4096 * _BEAT.size
"""Bytes to read at a time: whole beats."""


@dataclass(frozen=True, slots=True)
class Beat:
    """``turns`` of the loop so far, ``cpu_s`` that the process has used, and whether there is work."""

    turns: int
    cpu_s: float
    busy: bool


class Heart:
    """Writes a beat to the pipe ``descriptor`` every half second until the process ends. The loop sets ``turns`` and ``busy``."""

    def __init__(self, descriptor: int) -> None:
        self.turns = 0
        self.busy = False
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)  # a server that does not read must not stop the heart

    def start(self) -> None:
        """Begin to beat."""
        threading.Thread(target=self._run, name="heart", daemon=True).start()

    def beat(self) -> bool:
        """One beat, unless the pipe is full; whether anybody is there to read it."""
        try:
            os.write(self._descriptor, _BEAT.pack(self.turns, time.process_time(), self.busy))
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _run(self) -> None:
        while self.beat():  # the loop sees it too when the server is gone
            time.sleep(BEAT_S)


def read_beats(data: bytes) -> list[Beat]:
    """The beats in what a pipe gave: it passes each on whole."""
    return [Beat(turns, cpu_s, bool(busy)) for turns, cpu_s, busy in _BEAT.iter_unpack(data)]


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. How long without a beat, or with a loop that neither turns nor computes, until the engine counts as not ready, and until
    it is replaced; and how long one step may compute."""

    unready_s: float = 4.0
    replaced_s: float = 30.0
    step_s: float = 1800.0


class Pulse:
    """What the beats say, by a clock of the reader's. It begins as of a process that beats."""

    IDLE_SHARE = 0.02
    """A loop with work that uses less of a processor than this computes nothing."""

    def __init__(self, patience: Patience, now: float) -> None:
        self._patience = patience
        self._last = self._turned = self._computed = now
        self._beat = Beat(0, 0.0, False)

    def feel(self, beat: Beat, now: float) -> None:
        """Take a beat."""
        before = self._beat
        if beat.turns != before.turns or not beat.busy or not before.busy:
            self._turned = self._computed = now
        elif beat.cpu_s - before.cpu_s > self.IDLE_SHARE * max(now - self._last, BEAT_S):
            self._computed = now
        self._last, self._beat = now, beat

    def silent_s(self, now: float) -> float:
        """For how long nothing has shown that the loop is alive."""
        return now - min(self._last, self._computed)

    def well(self, now: float) -> bool:
        """Does it look alive?"""
        return self.silent_s(now) < self._patience.unready_s

    def lost(self, now: float) -> str:
        """Why the process must be replaced; '' where it need not."""
        if (silent := self.silent_s(now)) >= self._patience.replaced_s:
            what = "does not run" if now - self._last >= self._patience.replaced_s else "has work and does nothing"
            return f"{what}, for {silent:.0f} seconds by now"
        if (long := now - self._turned) >= self._patience.step_s:
            return f"is in the same step for {long:.0f} seconds"
        return ""
