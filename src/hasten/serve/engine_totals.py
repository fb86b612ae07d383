"""Engine totals: what all engines of this server have counted, one process after another."""

from collections import deque
from collections.abc import Mapping

WINDOW_S = 1.0


class EngineTotals:
    """Each new process counts from nothing; these sums do not. What a process did after its last word is lost with it."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._now: dict[str, int] = {}
        self._window: deque[tuple[float, Mapping[str, int]]] = deque([(0.0, {})])
        self._busy = False

    def begin(self) -> None:
        """Another process counts from here on."""
        for name, value in self._now.items():
            self._before[name] = self._before.get(name, 0) + value
        self._now = {}
        self._window, self._busy = deque([(0.0, {})]), False

    def take(self, counters: dict[str, int], now: float, busy: bool) -> None:
        """What the process says it has counted by ``now``, and whether there is more to do."""
        self._now, self._busy = counters, busy
        window = self._window
        window.append((now, counters))
        while len(window) > 2 and window[1][0] < now - WINDOW_S:
            window.popleft()

    def total(self, name: str) -> int:
        """A counter, of all processes; 0 where none has told of it."""
        return self._before.get(name, 0) + self._now.get(name, 0)

    def read_bytes_s(self, now: float) -> float:
        """Bytes that the last second's steps read a second, in the time that they took; 0 where there were none."""
        return 1e9 * self._ratio("read_bytes", "step_ns", now, 0.0)

    def kernel_share(self, now: float) -> float | None:
        """The share of kernels in the time of the last second's steps, of those that were profiled; None where none was."""
        share = self._ratio("kernel_ns", "profiled_ns", now, -1.0)
        return None if share < 0 else share

    def _ratio(self, over: str, under: str, now: float, otherwise: float) -> float:
        (_, first), (at, last) = self._window[0], self._window[-1]
        steps = last.get(under, 0) - first.get(under, 0)
        if not steps or (not self._busy and now - at > WINDOW_S):  # a step may take longer than that
            return otherwise
        return (last.get(over, 0) - first.get(over, 0)) / steps
