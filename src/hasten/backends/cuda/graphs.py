"""Graphs: all launches of a tape as one, captured in the background while steps are launched kernel by kernel."""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from hasten.base.errors import one_line

Replay = Callable[[], None]
CAPTURING = threading.Lock()
"""Held while anything is captured: torch takes one capture at a time in a process."""
SPOILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed, alive for good: torch's allocators may go on asking them which memory is theirs."""
_LOG = logging.getLogger("hasten")  # a line on stderr where nobody set it up otherwise


class Recorder(Protocol):
    """Makes one thing of many launches."""

    def record(self, play: Callable[[], object]) -> Replay:
        """What launches again all that ``play`` launches, to the same bits; nothing is computed yet. Kernels of ``play`` have run before.
        While this is at work other threads launch, allocate and wait for their streams, but not for the device as a whole."""
        ...


class DeviceRecorder:
    """Captures CUDA graphs on a CUDA ``device``."""

    def __init__(self, device: torch.device) -> None:
        # Torch makes streams that do not wait for the default one, which is therefore free while something is captured here.
        self._stream = torch.cuda.Stream(device)

    def record(self, play: Callable[[], object]) -> Replay:
        """A graph of what ``play`` launches on this thread's stream. Raises what torch raises, out of memory too."""
        graph = torch.cuda.CUDAGraph()
        with CAPTURING, torch.inference_mode(), torch.cuda.stream(self._stream):
            _make_handles(self._stream.device)
            try:
                graph.capture_begin(capture_error_mode="thread_local")  # what other threads do meanwhile is theirs
                try:
                    play()
                finally:
                    graph.capture_end()
            except Exception:
                SPOILED.append(graph)
                raise
        return graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """What records there; None where launching costs nothing beside computing, as in the interpreter."""
    return DeviceRecorder(device) if device.type == "cuda" else None


def _make_handles(device: torch.device) -> None:
    """What the library of products makes at a thread's first product on a stream, which may not be while something is captured."""
    a = torch.zeros((16, 16), dtype=torch.bfloat16, device=device)
    torch.mm(a, a)


class Recordable(Protocol):
    """A tape that plays. ``replay`` takes the place of ``launch`` as soon as it is there."""

    replay: Replay | None

    def launch(self) -> None:
        """Launch kernel after kernel."""
        ...


class Recordings:
    """Records what was added, one after the other and each once, in a thread that is there while anything waits. Who adds keeps what is
    added: what nobody keeps any more is not recorded. What fails is launched kernel by kernel for good, and the log says so once."""

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder, self._told = recorder, False
        self._added: weakref.WeakSet[Recordable] = weakref.WeakSet()
        self._guard = threading.Lock()  # of the two below
        self._waiting: deque[weakref.ref[Recordable]] = deque()
        self._thread: threading.Thread | None = None

    def add(self, player: Recordable) -> None:
        """Have ``player`` recorded, unless it was added before; returns at once."""
        if self._recorder is None or player in self._added:
            return
        self._added.add(player)
        with self._guard:
            self._waiting.append(weakref.ref(player))
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._work, args=(self._recorder,), name="hasten-graphs")
            try:
                self._thread.start()
            except RuntimeError as error:  # no more threads
                self._thread = None
                self._waiting.clear()
                self._tell(error)

    def settle(self) -> None:
        """Wait until all that was added is recorded, or has failed."""
        while (thread := self._running()) is not None:
            thread.join()

    def _running(self) -> threading.Thread | None:
        with self._guard:  # while one is started it cannot be waited for
            return self._thread

    def _work(self, recorder: Recorder) -> None:
        while (player := self._next()) is not None:
            try:
                player.replay = recorder.record(player.launch)
            except Exception as error:  # whatever it is, steps go on
                self._tell(error)
            del player  # which is nobody's any more, it may be

    def _next(self) -> Recordable | None:
        with self._guard:
            while self._waiting:
                if (player := self._waiting.popleft()()) is not None:
                    return player
            self._thread = None
            return None

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            _LOG.warning(
                "hasten: some steps are launched kernel by kernel, which takes longer: capturing a graph of them failed (%s: %s)",
                type(error).__name__, one_line(str(error)),
            )  # fmt: skip
