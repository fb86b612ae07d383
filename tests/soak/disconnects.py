"""Clients that go away wherever their request is: it leaves the engine within a second, and nothing of it stays."""

import asyncio
import random
from collections import Counter

from tests.serve.scrape import scrape
from tests.serve.server import Server
from tests.soak.watch import LATE_SHARE, Stalls, at_rest, memory, open_files, require, until_rest
from tests.soak.wire import Asked, Wire, request

SLOTS, GROUP = 8, 8
FREED_S = 1.0
CONTEXT = 2048
PLANNED = 128 << 20
"""Bytes that the engine is given."""
ARGUMENTS = ("code-8m", "--memory", str(PLANNED), "--max-sequences", str(SLOTS), "--max-waiting", "64")
PHASES = ("queued", "prompt", "output", "end")
KNOWN = request("/v1/completions", {"prompt": "def f(x):\n", "max_tokens": 24, "temperature": 0})


def _asks(chance: random.Random, words: int, most: int) -> bytes:
    """A request on any route that generates, streamed or not, of so many words and tokens."""
    text = " ".join(chance.choice(("def", "x", "return", "import", "os", "=", "1")) for _ in range(words))
    stream, turns = chance.random() < 0.7, [{"role": "user", "content": text}]
    path, own = chance.choice([
        ("/v1/completions", {"prompt": text, "max_tokens": most, "ignore_eos": True, "n": chance.choice((1, 1, 2))}),
        ("/v1/chat/completions", {"messages": turns, "max_tokens": most, "ignore_eos": True}),
        ("/v1/messages", {"messages": turns, "max_tokens": most, "model": "code-8m"}),
        ("/v1/responses", {"input": text, "max_output_tokens": most}),
    ])  # fmt: skip
    more = request("/health", method="GET") if chance.random() < 0.3 else b""  # some send their next request at once
    return request(path, {**own, "stream": stream, "temperature": 1.0}) + more


def run(server: Server, points: int, seed: int, late: float = LATE_SHARE) -> dict:
    """Go away ``points`` times, as often in each phase. Raises Difference."""
    return asyncio.run(_run(server, points, seed, late))


async def _run(server: Server, points: int, seed: int, late: float) -> dict:
    wire, chance = Wire(server.url), random.Random(seed)
    known = (await wire.ask(KNOWN)).json()["choices"]
    first_s = await _first(wire, chance)
    await until_rest(server, 5.0)
    files, before, stalls = open_files(server), memory(server), Stalls(server)
    aborted = scrape(server.url).of("hasten_request_success_total", finished_reason="abort")
    seen, freed = Counter[str](), list[float]()
    group = 0
    while sum(seen.values()) < points:
        phase = PHASES[group % len(PHASES)]
        group += 1
        require(group < points, f"hardly anybody went away where they should have: {dict(seen)}")
        if phase == "queued":
            seen[phase] += await _queued(server, wire, chance)
        else:
            seen[phase] += sum(await asyncio.gather(*(_leave(wire, chance, phase, first_s) for _ in range(GROUP))))
        freed.append(await until_rest(server, FREED_S))
    for phase in PHASES:
        require(seen[phase] >= points // 40, f"{seen[phase]} clients went away in phase {phase}; that should be many more: {dict(seen)}")
    found = scrape(server.url)
    aborts = found.of("hasten_request_success_total", finished_reason="abort") - aborted
    require(aborts >= 0.7 * (points - seen["end"]), f"the server says that {aborts:g} outputs were aborted, {points} clients went away")
    require(at_rest(found), "something is left in the engine")
    require((await wire.ask(KNOWN)).json()["choices"] == known, "the same request is answered otherwise afterwards")
    await asyncio.sleep(0.2)
    require(open_files(server) <= files + 2, f"{open_files(server)} open files, {files} before")
    return {
        "points": sum(seen.values()), **{phase: seen[phase] for phase in PHASES}, "aborted": int(aborts),
        "freed_most_s": round(max(freed), 3), "freed_mean_s": round(sum(freed) / len(freed), 3),
    } | memory(server).growth(before, PLANNED) | stalls.told(late)  # fmt: skip


async def _first(wire: Wire, chance: random.Random) -> float:
    """Seconds to the first token of GROUP long prompts together."""
    asked = await asyncio.gather(*(wire.begin(_long(chance, 1)) for _ in range(GROUP)))
    await asyncio.gather(*(one.done for one in asked))
    return max(one.first - one.began for one in asked)


def _long(chance: random.Random, most: int) -> bytes:
    prompt = [chance.randrange(5, 1000) for _ in range(CONTEXT - 100)]
    return request("/v1/completions", {"prompt": prompt, "max_tokens": most, "ignore_eos": True, "stream": True})


async def _leave(wire: Wire, chance: random.Random, phase: str, first_s: float) -> bool:
    """Go away once; whether that was where it should have been."""
    reset = chance.random() < 0.5
    if phase == "prompt":
        asked = await wire.begin(_long(chance, 50))
        await asyncio.wait({asked.begun}, timeout=chance.uniform(0.0, 0.5) * first_s)
        inside = not asked.data
    elif phase == "output":
        asked = await wire.begin(_asks(chance, chance.randrange(1, 40), 1500))
        await asyncio.wait({asked.begun}, timeout=0.1 + first_s)  # one that does not stream says nothing until then
        await asyncio.sleep(chance.uniform(0.0, 0.3))
        inside = not asked.done.done()
    else:
        going = list[bool]()

        def at_end(asked: Asked) -> None:
            if not going and _ending(asked):
                going.append(True)
                asked.leave(reset)

        asked = await wire.begin(_asks(chance, 4, chance.randrange(1, 12)), at_end)
        await asyncio.wait({asked.done}, timeout=10.0)
        inside = bool(going)
    asked.leave(reset)
    return inside


def _ending(asked: Asked) -> bool:
    """Is the last token's event there, or, of an answer that is not streamed, the head? What follows may not be."""
    if b"event-stream" not in asked.data:
        return asked.status == 200
    return any(word in asked.data for word in (b'"finish_reason":"', b'"stop_reason":"', b"response.output_text.done"))


async def _queued(server: Server, wire: Wire, chance: random.Random) -> int:
    """Fill all slots, let others wait, and go away with these; how many that were."""
    holders = await asyncio.gather(*(wire.begin(request("/v1/completions", {
        "prompt": [7 + place], "max_tokens": 1900, "ignore_eos": True, "stream": True,
    })) for place in range(SLOTS)))  # fmt: skip
    await asyncio.gather(*(one.begun for one in holders))
    waiting = await asyncio.gather(*(wire.begin(_asks(chance, chance.randrange(1, 300), 50)) for _ in range(GROUP)))
    await asyncio.to_thread(server.until, lambda: scrape(server.url)["hasten_num_requests_waiting"], 5)  # it says so now and then
    await asyncio.sleep(chance.uniform(0.0, 0.2))
    held = not any(one.done.done() for one in holders)
    went = sum(not one.data for one in waiting) if held else 0
    for one in waiting:
        one.leave(chance.random() < 0.5)
    await asyncio.sleep(chance.uniform(0.0, 0.1))
    for one in holders:
        one.leave()
    return went


def told(found: dict) -> str:
    """The figures, for people."""
    phases = ", ".join(f"{found[phase]} {phase}" for phase in PHASES)
    return (
        f"disconnects, {found['points']:,} ({phases}; {found['aborted']:,} outputs aborted): at rest after {found['freed_mean_s']} s, "
        f"{found['freed_most_s']} s at most, 0 pages left; event loop late at {found['late']} of {found['ticks']:,} moments"
    )
