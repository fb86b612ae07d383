"""Ten times what the server can do: the excess is refused at once, and those who are taken are served as well as at capacity.

Capacity is what clients get who each ask again as soon as they are answered. At capacity, and at ten times that, clients come by chance
(Poisson), whatever became of those before them."""

import asyncio
import dataclasses
import random
from collections.abc import Sequence

from tests.serve.server import Server
from tests.soak.watch import GROWTH_BYTES, Stalls, memory, ms, quantile, require, until_rest
from tests.soak.wire import Asked, Wire, request

SLOTS, TIMES, TOKENS, PROMPT = 8, 10, 256, 32
PLANNED = 128 << 20
"""Bytes that the engine is given."""
ARGUMENTS = ("code-8m", "--memory", str(PLANNED), "--max-sequences", str(SLOTS))


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What is asked. Seconds until a refusal, at the quantile ``share``; the rest in times of what is at capacity."""

    refused_s: float = 0.05
    share: float = 0.99
    first: float = 2.0
    wait: float = 2.0
    """Of the time to the first token, in times of what an answer takes from its first token to its last."""
    goodput: float = 0.9
    late: float = 0.001


@dataclasses.dataclass(frozen=True)
class Load:
    """What became of a load."""

    goodput: float
    """Whole answers a second, of those who came while it lasted."""
    first_s: Sequence[float]
    answer_s: Sequence[float]
    """From the first token to the last."""
    refused_s: Sequence[float]


def run(server: Server, usual_s: float, over_s: float, rounds: int, seed: int, bounds: Bounds = Bounds()) -> dict:
    """Load it for ``usual_s`` seconds at capacity and for ``over_s`` at ten times that, ``rounds`` times. Raises Difference."""
    return asyncio.run(_run(server, usual_s, over_s, rounds, seed, bounds))


async def _run(server: Server, usual_s: float, over_s: float, rounds: int, seed: int, bounds: Bounds) -> dict:
    wire, chance = Wire(server.url), random.Random(seed)
    await _closed(wire, 1.0)
    capacity = await _closed(wire, max(2.0, usual_s / 4))
    await until_rest(server, 10.0)
    stalls, before = Stalls(server), memory(server)
    usual, over = list[Load](), list[Load]()
    for _ in range(rounds):
        for found, rate, seconds in ((usual, capacity, usual_s), (over, TIMES * capacity, over_s)):
            found.append(await _open(wire, rate, seconds, chance))
            await until_rest(server, 10.0)
    first = [quantile([one for load in loads for one in load.first_s], bounds.share) for loads in (usual, over)]
    wait = first[1] / quantile([one for load in over for one in load.answer_s], 0.5)
    require(wait <= bounds.wait, f"the first token took {ms(first[1])} at {TIMES} times capacity, {wait:.1f} times as long as the rest")
    goodput = [sum(load.goodput for load in loads) / rounds for loads in (usual, over)]
    refused = [one for load in over for one in load.refused_s]
    offered = sum(len(load.first_s) + len(load.refused_s) for load in over)
    require(len(refused) > 0.7 * offered, f"{len(refused)} of {offered} were refused at {TIMES} times capacity; most should be")
    late = quantile(refused, bounds.share)
    require(late <= bounds.refused_s, f"a refusal took {ms(late)}, {ms(bounds.refused_s)} are allowed")
    require(
        first[1] <= bounds.first * first[0],
        f"the first token took {ms(first[1])} at {TIMES} times capacity, {ms(first[0])} at capacity: {first[1] / first[0]:.2f} times, "
        f"{bounds.first:g} are allowed",
    )
    require(
        goodput[1] >= bounds.goodput * goodput[0],
        f"{goodput[1]:.2f} answers a second at {TIMES} times capacity, {goodput[0]:.2f} at capacity: {goodput[1] / goodput[0]:.2f}",
    )
    return {
        "capacity": round(capacity, 2), "offered": offered, "refused": len(refused), "refused_ms": round(1000 * late, 1),
        "refused_most_ms": round(1000 * max(refused), 1), "first_ms": [round(1000 * one, 1) for one in first],
        "wait": round(wait, 2), "first_ratio": round(first[1] / first[0], 2), "goodput": [round(one, 2) for one in goodput],
        "goodput_ratio": round(goodput[1] / goodput[0], 3), "refused_at_capacity": sum(len(load.refused_s) for load in usual),
    } | memory(server).growth(before, PLANNED) | stalls.told(bounds.late)  # fmt: skip


def _body(chance: random.Random) -> bytes:
    prompt = [chance.randrange(5, 500) for _ in range(PROMPT)]
    return request("/v1/completions", {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "seed": 1, "stream": True})


async def _closed(wire: Wire, seconds: float) -> float:
    """Answers a second of as many clients as there are slots, and half as many again so that none is ever free."""
    loop, chance = asyncio.get_running_loop(), random.Random(0)
    end = loop.time() + seconds
    done = list[float]()

    async def client() -> None:
        while loop.time() < end:
            asked = await wire.ask(_body(chance))
            require(asked.status == 200, f"status {asked.status} below capacity")
            done.append(loop.time())

    began = loop.time()
    await asyncio.gather(*(client() for _ in range(SLOTS * 3 // 2)))
    return sum(at <= end for at in done) / (end - began)


async def _open(wire: Wire, rate: float, seconds: float, chance: random.Random) -> Load:
    """So many clients a second, for so long; all of them waited for."""
    loop = asyncio.get_running_loop()
    began, due = loop.time(), 0.0
    tasks = list[asyncio.Task[Asked]]()
    while (due := due + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(began + due - loop.time())
        tasks.append(asyncio.create_task(wire.ask(_body(chance))))
    answers = await asyncio.gather(*tasks)
    for asked in answers:
        require(asked.status in {200, 429}, f"status {asked.status}: {asked.body[:200]!r}")
        require(asked.ended is not None, "an answer was cut")
        if asked.status == 429:
            require(int(asked.header("retry-after") or 0) >= 1, "a 429 without Retry-After")
    served = [asked for asked in answers if asked.status == 200]
    for asked in served:
        require(asked.data.count(b'"finish_reason":"length"') == 1, "a stream without its one end")
    lasted = max(asked.ended for asked in served) - began
    refused = [asked.first - asked.began for asked in answers if asked.status == 429]
    first = [asked.first - asked.began for asked in served]
    return Load(len(served) / lasted, first, [asked.ended - asked.first for asked in served], refused)


def told(found: dict) -> str:
    """The figures, for people."""
    usual, over = found["goodput"]
    return (
        f"overload, {TIMES} times {found['capacity']} answers a second: {found['refused']:,} of {found['offered']:,} refused, p99 within "
        f"{found['refused_ms']} ms; first token p99 {found['first_ms'][1]} ms, {found['first_ratio']} of {found['first_ms'][0]} ms at "
        f"capacity ({found['refused_at_capacity']} refused there); {over} answers a second, {found['goodput_ratio']} of {usual}; grown by "
        f"{found['front_growth_mib']} and {found['engine_growth_mib']} MiB of {GROWTH_BYTES >> 20}; event loop late at {found['late']} of "
        f"{found['ticks']:,} moments"
    )
