"""A thousand sockets that say nothing, half a head or half a body: who asks properly does not notice, and in the end the server closes
them all."""

import asyncio
import itertools
import random

from tests.serve.scrape import scrape
from tests.serve.server import Server
from tests.soak.watch import LATE_SHARE, Stalls, memory, open_files, quantile, require
from tests.soak.wire import Asked, Wire, request

PLANNED = 128 << 20
"""Bytes that the engine is given."""
ARGUMENTS = ("code-8m", "--memory", str(PLANNED), "--max-sequences", "8")
CLIENTS, TOKENS = 4, 16
CLOSED_S = 40.0
"""Until the server has closed all of them: a head may take 20 s, a body 30 s."""
HALVES = (
    b"",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ",
    request("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 200}]})[:-100],
)
"""What is sent of a request."""
TRICKLE_S = 2.0
"""Some send a byte as often; that does not give them more time."""


def run(server: Server, sockets: int, seconds: float, rounds: int, slower: float, late: float = LATE_SHARE, closed: bool = True) -> dict:
    """Ask for so many seconds without them and beside them, by turns; ``slower`` bounds the ratio of the medians, and twice that the
    ratio of the 99th percentiles. ``closed``: wait until the server has closed the last round's. Raises Difference."""
    return asyncio.run(_run(server, sockets, seconds, rounds, slower, late, closed))


async def _run(server: Server, sockets: int, seconds: float, rounds: int, slower: float, late: float, closed: bool) -> dict:
    wire, chance = Wire(server.url), random.Random(0)
    await _ask(wire, chance, 0.5)
    files, before, stalls = open_files(server), memory(server), Stalls(server)
    alone, beside, held = list[float](), list[float](), 0
    for turn in range(rounds):
        alone += await _ask(wire, chance, seconds)
        idle = [await wire.begin(HALVES[place % len(HALVES)]) for place in range(sockets)]
        await asyncio.sleep(0.1)
        trickling = asyncio.create_task(_trickle(idle))
        beside += await _ask(wire, chance, seconds)
        held = (await asyncio.to_thread(scrape, server.url))["process_open_fds"]
        require(held >= files + 0.99 * sockets, f"the server has {held:g} files open beside {sockets} idle sockets, {files} without")
        require(not any(one.done.done() for one in idle), "an idle socket was closed while it was to be in the way")
        if turn == rounds - 1 and closed:
            async with asyncio.timeout(CLOSED_S):
                await asyncio.gather(*(one.done for one in idle))
            told = {one.status for one in idle}
            require(told <= {0, 408}, f"half a request was answered with {sorted(told)}")
            require(408 in told, "nobody who sent half a body was told 408")
        trickling.cancel()
        for one in idle:
            one.leave()
        await asyncio.sleep(0.5)
    require(open_files(server) <= files + CLIENTS, f"{open_files(server)} open files afterwards, {files} before")
    ratios = {share: quantile(beside, share) / quantile(alone, share) for share in (0.5, 0.99)}
    for share, ratio in ratios.items():
        most = slower if share == 0.5 else 2 * slower
        require(
            ratio <= most, f"answers took {ratio:.2f} times as long beside {sockets} idle sockets (quantile {share}), {most:g} are allowed"
        )
    return {
        "sockets": sockets, "asked": len(alone) + len(beside), "median_ms": round(1000 * quantile(beside, 0.5), 2),
        "median_ratio": round(ratios[0.5], 3), "p99_ms": round(1000 * quantile(beside, 0.99), 2), "p99_ratio": round(ratios[0.99], 3),
        "files": int(held),
    } | memory(server).growth(before, PLANNED) | stalls.told(late)  # fmt: skip


async def _trickle(idle: list[Asked]) -> None:
    for place in itertools.count():
        await asyncio.sleep(TRICKLE_S / 10)
        for one in idle[place % 10 :: 10]:
            if one.begun_to_send and not one.done.done():
                one.send(b"x")


async def _ask(wire: Wire, chance: random.Random, seconds: float) -> list[float]:
    """How long answers took."""
    loop = asyncio.get_running_loop()
    end, took = loop.time() + seconds, list[float]()

    async def client() -> None:
        while loop.time() < end:
            prompt = [chance.randrange(5, 1000) for _ in range(20)]
            asked = await wire.ask(request("/v1/completions", {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "seed": 1}))
            require(asked.status == 200, f"status {asked.status}: {asked.body[:200]!r}")
            took.append(asked.ended - asked.began)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return took


def told(found: dict) -> str:
    """The figures, for people."""
    return (
        f"slowloris, {found['sockets']:,} idle sockets ({found['files']:,} files open): {found['asked']:,} requests, median "
        f"{found['median_ms']} ms, {found['median_ratio']} of what it is alone, p99 {found['p99_ms']} ms, {found['p99_ratio']}; grown by "
        f"{found['front_growth_mib']} MiB; event loop late at {found['late']} of {found['ticks']:,} moments"
    )
