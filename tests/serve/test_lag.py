"""The event loop's lag: of a loop that is held up, and of one that is not."""

import asyncio
import contextlib
import time

import pytest

from hasten.serve.histogram import SECONDS, Histogram
from hasten.serve.lag import TICK_S, watch_lag

pytestmark = pytest.mark.timed


def late(lags: Histogram, seconds: float) -> tuple[int, int]:
    """How many ticks, and how many of them later than that."""
    by_bound = dict(lags.buckets())
    return int(by_bound["+Inf"]), int(by_bound["+Inf"] - by_bound[str(seconds)])


def test_a_loop_that_is_held_up_shows():
    async def run() -> tuple[Histogram, Histogram]:
        free, held = Histogram(SECONDS), Histogram(SECONDS)
        for lags, hold_s in ((free, 0.0), (held, 0.5)):
            watching = asyncio.create_task(watch_lag(lags))
            await asyncio.sleep(0.2)
            time.sleep(hold_s)
            await asyncio.sleep(0.2)
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        return free, held

    free, held = asyncio.run(run())
    ticks, slow = late(free, 0.1)
    assert 0.1 / TICK_S < ticks <= 0.4 / TICK_S + 1
    assert slow < ticks / 2
    ticks, slow = late(held, 0.1)
    assert slow >= 0.25 / TICK_S  # each tick that passed meanwhile, not one for all of them
    assert 0.05 < held.sum / ticks < 0.5
