"""Two tenants on one server: one asks, the other asks the same or something else, and tries to tell by the time to its first token which of
the two the first has asked. It must find nothing in either cache, and be right as often as a coin."""

import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.ledger import Ledger
from hasten.base import hardware
from tests.serve.scrape import scrape
from tests.serve.server import Server
from tests.soak.determinism import Difference

PER_ROUND, CHANCE = 100, 0.55
TOKENS = 450
"""Of a prompt: enough that finding it in a cache saves most of the time to the first token."""
OWNER, OTHER = ({"authorization": f"Bearer {name}-of-two-tenants"} for name in ("owner", "other"))
HITS = ("hasten_prefix_cache_hits_total", "hasten_response_cache_hits_total")


class Served:
    """A server with both caches on, and a key for each tenant."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory()
        os.environ["HASTEN_CACHE"] = self._kept.name
        keys = Path(self._kept.name) / "keys"
        keys.write_text("owner-of-two-tenants\nother-of-two-tenants\n")
        self.server = Server("code-8m", "--max-sequences", "2", "--api-key-file", keys, "--response-cache", "memory")
        self.server.until(self.server.ready)
        self.server.until(lambda: any("response cache is open" in line for line in self.server.lines))
        self.client = httpx.Client(base_url=self.server.url, timeout=60)

    def end(self) -> None:
        """However it went."""
        self.client.close()
        self.server.process.kill()
        self.server.process.wait()
        self._kept.cleanup()

    def first_token_s(self, prompt: list[int], who: dict[str, str], temperature: float) -> float:
        """Seconds until the answer's first token."""
        body = {"prompt": prompt, "max_tokens": 1, "temperature": temperature, "stream": True, "ignore_eos": True}
        began = time.perf_counter()
        first: float | None = None
        with self.client.stream("POST", "/v1/completions", json=body, headers=who) as answer:
            for line in answer.iter_lines():  # to the end, so that the connection can be used again
                if first is None and line.startswith("data: {"):
                    first = time.perf_counter() - began
        if first is None:
            raise Difference(f"no token came: {answer.status_code}")
        return first

    def hits(self) -> list[float]:
        """Of either cache so far."""
        found = scrape(self.server.url, headers=OWNER)
        return [sum(value for (sample, _), value in found.samples.items() if sample == name) for name in HITS]


def run_pairs(served: Served, number: int, pairs: int, seed: int, who: dict[str, str] = OTHER) -> list[tuple[float, float]]:
    """Seconds to the first token of ``who``, of prompts that the owner has asked before and of ones that nobody has, a pair after the
    owner's request each. Raises Difference where a tenant found what is another's."""
    chance, times, before = random.Random(f"{seed} {number} {who}"), list[tuple[float, float]](), served.hits()
    for place in range(pairs):
        temperature = place % 2  # what is drawn is never kept as an answer, only its prompt's prefix
        asked, fresh = ([chance.randrange(1, 8192) for _ in range(TOKENS)] for _ in range(2))
        served.first_token_s(asked, OWNER, temperature)
        found = {}
        for kind, prompt in sorted((("asked", asked), ("fresh", fresh)), key=lambda _: chance.random()):
            found[kind] = served.first_token_s(prompt, who, temperature)
        times.append((found["asked"], found["fresh"]))
    if who is OTHER and served.hits() != before:
        raise Difference(f"hits of {HITS} were {before} before and are {served.hits()} after what only another tenant had asked")
    return times


def told_apart(times: list[tuple[float, float]]) -> dict[str, float]:
    """How often one who calls the quicker of a pair the one that was asked is right; and one who calls asked what is quicker than a
    threshold, the best one for the first half of the pairs, judged by the rest."""
    quicker = sum((asked < fresh) + 0.5 * (asked == fresh) for asked, fresh in times) / len(times)
    known, judged = times[: len(times) // 2], times[len(times) // 2 :]
    best = max((right(known, threshold), threshold) for pair in known for threshold in pair)[1]
    return {"quicker": quicker, "threshold": right(judged, best)}


def right(times: list[tuple[float, float]], threshold: float) -> float:
    """The share of both kinds that a threshold tells."""
    return sum((asked <= threshold) + (fresh > threshold) for asked, fresh in times) / (2 * len(times))


def summed(times: list[tuple[float, float]]) -> dict[str, Any]:
    """For people: what was told apart, and mean times in milliseconds."""
    asked, fresh = (1e3 * sum(each) / len(times) for each in zip(*times))
    return told_apart(times) | {"asked_ms": asked, "fresh_ms": fresh, "pairs": len(times)}


def tenants(ledger: Ledger, digest: str, pairs: int, seed: int) -> None:
    """Pairs of requests of another tenant, a round after the other against one server; raises Difference."""
    served, times = None, []
    try:
        for number in range(-(-pairs // PER_ROUND)):
            key = ("tenants", digest, hardware.detect().cpu.brand, PER_ROUND, number, seed)
            kept = ledger.get(*key)
            if kept is None:
                served = served or Served()
                kept = {"times": run_pairs(served, number, PER_ROUND, seed)}
                ledger.note(*key, value=kept)
            times += [(asked, fresh) for asked, fresh in kept["times"]]
    finally:
        if served is not None:
            served.end()
    found = summed(times)
    print(f"\ntenants, {found['pairs']:,} pairs, 0 hits across tenants; told apart {found['quicker']:.1%} by pairs,")
    times_ms = f"{found['asked_ms']:.2f} ms to a first token of what another tenant had asked, {found['fresh_ms']:.2f} of other prompts"
    print(f"{found['threshold']:.1%} by a threshold; {times_ms}")
    if max(found["quicker"], found["threshold"]) > CHANCE:
        raise Difference(f"more than {CHANCE:.0%} are told apart")
