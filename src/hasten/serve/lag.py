"""Lag: how late the event loop comes to what is due. What holds the loop up holds every client up."""

import asyncio

from hasten.serve.histogram import Histogram

TICK_S = 0.1


async def watch_lag(lags: Histogram) -> None:
    """Observe in ``lags``, until cancelled, how many seconds late the running loop is at moments TICK_S apart. A hold-up that many of them
    pass in counts as often."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due += TICK_S
        await asyncio.sleep(due - loop.time())
        lags.observe(max(0.0, loop.time() - due))
