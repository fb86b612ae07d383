"""When to leave a service alone that does not answer."""

import time
from collections.abc import Callable


class Breaker:
    """Closed until ``failures`` in a row, then open. After ``pause`` seconds one attempt is granted; each that does not succeed doubles the
    pause before the next, to ``longest`` at most. What succeeds closes it. ``clock`` gives seconds that only grow."""

    def __init__(
        self, failures: int = 3, pause: float = 0.5, longest: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._limit, self._first, self._longest, self._clock = failures, pause, longest, clock
        self._failures, self._pause, self._next = 0, pause, 0.0

    @property
    def open(self) -> bool:
        """Whether only what `attempt` grants may be tried."""
        return self._failures >= self._limit

    def attempt(self) -> bool:
        """Whether to try now."""
        if not self.open:
            return True
        if (now := self._clock()) < self._next:
            return False
        self._pause = min(2 * self._pause, self._longest)
        self._next = now + self._pause
        return True

    def succeeded(self) -> bool:
        """Tell of an answer; returns whether that closed it."""
        was_open, self._failures, self._pause = self.open, 0, self._first
        return was_open

    def failed(self) -> bool:
        """Tell of none; returns whether that opened it. Those that were under way when it opened change nothing."""
        if self.open:
            return False
        self._failures += 1
        if self.open:
            self._next = self._clock() + self._pause
        return self.open
