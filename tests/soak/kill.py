"""Engines killed under many streams: every client is told within a second, the others are sent away meanwhile, and the next one answers
as the last one did."""

import asyncio
import os
import random
import signal
import tempfile
import time

import httpx

from tests.serve.server import Server, client_of, read
from tests.soak.determinism import Difference
from tests.soak.watch import require

STREAMS, SLOTS = 64, 32
"""Half of the streams run, half wait."""
TOLD_S = 1.0
"""Until each client has its last event, or its status."""
READY_S = 10.0
"""Until the server is ready again, beyond what its first engine took."""
LONG = {"max_tokens": 1900, "ignore_eos": True, "stream": True}
KNOWN = {"prompt": "def f(x):\n", "max_tokens": 24, "temperature": 0}


class Served:
    """A server, how long it took to be ready, and what it answers to KNOWN."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory()
        os.environ["HASTEN_CACHE"] = self._kept.name  # as tests/conftest.py does: nothing of the user's
        began = time.monotonic()
        self.server = Server("code-8m", "--max-sequences", str(SLOTS), "--max-waiting", str(2 * STREAMS))
        self.server.until(self.server.ready)
        self.cold_s = time.monotonic() - began
        self.answer = self.server.post("/v1/completions", KNOWN).json()["choices"]

    def end(self) -> None:
        """However it went."""
        self.server.process.kill()
        self.server.process.wait()
        self._kept.cleanup()


def run_round(served: Served, number: int, seed: int) -> dict:
    """Kill the engine once under STREAMS streams, at a moment drawn from ``seed`` and ``number``; what was measured. Raises Difference."""
    return asyncio.run(_round(served, number, seed))


async def _round(served: Served, number: int, seed: int) -> dict:
    server, chance = served.server, random.Random(f"{seed} {number}")
    async with client_of(server) as client:
        before, begun = server.engine_pid(), [asyncio.Event() for _ in range(STREAMS)]
        bodies = [{**LONG, "prompt": [5 + place] * chance.randrange(1, 60), "seed": number} for place in range(STREAMS)]
        streams = [asyncio.create_task(read(client, body, one)) for body, one in zip(bodies, begun)]
        async with asyncio.timeout(60):
            while sum(one.is_set() for one in begun) < SLOTS:
                await asyncio.sleep(0.01)
        await asyncio.sleep(chance.random())
        os.kill(before, signal.SIGKILL)
        killed = time.monotonic()
        refusals, ready_s = await _until_ready(client, killed, served.cold_s + READY_S)
        ends = await asyncio.gather(*streams)
        late = [ended - killed for _, _, ended in ends]
        require(max(late) <= TOLD_S, f"a client waited {max(late):.2f} s for its end, {TOLD_S} s are allowed")
        for status, told, _ in ends:
            require(status in {200, 503}, f"a stream ended with status {status}")
            require(sum("error" in one for one in told) == 1 and "error" in told[-1], f"a stream ended without its one error: {told[-1:]}")
            require(
                not any(choice["finish_reason"] for one in told for choice in one.get("choices", ())), "a stream ended as if it were whole"
            )
        streamed = sum(len(told) > 1 for _, told, _ in ends)
        require(streamed >= SLOTS, f"{streamed} streams had begun; {SLOTS} at least were meant to be under way")
        require(refusals > 0, "nobody was sent away with 503 while there was no engine")
        require(server.engine_pid() != before, "the killed engine is still there")
        answer = (await client.post("/v1/completions", json=KNOWN)).json().get("choices")
        require(answer == served.answer, f"the next engine answers {answer}, the first one {served.answer}")
    return {"last_told_s": max(late), "mean_told_s": sum(late) / STREAMS, "refusals": refusals, "ready_s": ready_s, "streamed": streamed}


async def _until_ready(client: httpx.AsyncClient, killed: float, most_s: float) -> tuple[int, float]:
    """How many were sent away from the first refusal to the next answer, and seconds from the kill to that. Raises Difference."""
    refusals, ask = 0, {**KNOWN, "max_tokens": 1}
    while (since := time.monotonic() - killed) < most_s:
        answer = await client.post("/v1/completions", json=ask)
        if answer.status_code == 503:
            refusals += 1
            require(int(answer.headers.get("retry-after", "0")) >= 1, "a 503 without Retry-After")
        elif answer.status_code == 200 and refusals:
            return refusals, time.monotonic() - killed
        else:
            require(answer.status_code == 200 and since < TOLD_S, f"status {answer.status_code}, {since:.2f} s after the kill")
        await asyncio.sleep(0.05)
    raise Difference(f"not ready {most_s:.1f} s after the kill")
