"""The semantic cache: near enough, and same in all but the prompt, or no answer."""

import asyncio
import time

import msgspec
import numpy as np
import pytest

from hasten.base.errors import ConfigError
from hasten.engine import SamplingParams
from hasten.serve.responses import Answer, Asked, Limits, Output, SemanticCache
from hasten.serve.responses.store import ENTRY_OVERHEAD

MODEL = b"m" * 32


async def by_number(prompt) -> np.ndarray:
    """Prompts [n] lie on a circle, n thousandths of a turn from its start, at any length."""
    angle = 2 * np.pi * prompt[0] / 1000
    return np.array([np.cos(angle), np.sin(angle)], np.float32) * (1 + prompt[0] % 7)


def cosine(one: int, other: int) -> float:
    return float(np.cos(2 * np.pi * (one - other) / 1000))


def asked(number: int, tenant: str = "t", **params) -> Asked:
    return Asked(tenant, (number,), SamplingParams(**params))


def answer(number: int, spaces: int = 0) -> Answer:
    return Answer((Output(f"answer {number}" + " " * spaces, (1,), "stop"),), 1, 1)


def texts(hit) -> str | None:
    return None if hit is None else hit.answer.outputs[0].text.rstrip()


def test_the_nearest_above_the_threshold_answers_and_is_marked():
    cache = SemanticCache(by_number, MODEL, limits=Limits(), threshold=cosine(0, 10))

    async def run() -> None:
        for number in (0, 100, 105):
            await cache.put(asked(number), answer(number))
        for number, expected in ((0, 0), (9, 0), (-9, 0), (11, None), (50, None), (102, 100), (103, 105), (114, 105), (500, None)):
            hit = await cache.get(asked(number))
            assert texts(hit) == (None if expected is None else f"answer {expected}"), number
            if hit is not None:
                assert hit.kind == "semantic"
                assert hit.similarity == pytest.approx(cosine(number, expected), abs=1e-6)
                assert hit.header == f"semantic; similarity={hit.similarity:.4f}"

    asyncio.run(run())
    assert cache.counts() | {"hits": 6, "misses": 3, "failed": 0, "entries": 3} == cache.counts()


def test_tenants_models_and_parameters_share_nothing():
    one, other = (SemanticCache(by_number, model, limits=Limits()) for model in (MODEL, b"n" * 32))

    async def run() -> None:
        await one.put(asked(1), answer(1))
        assert await one.get(asked(1)) is not None
        assert await one.get(asked(1, "another")) is None
        assert await other.get(asked(1)) is None
        for field in ({"max_tokens": 129}, {"seed": 3}, {"stop": ("a",)}, {"n": 2}, {"logprobs": 0}):
            assert await one.get(asked(1, **field)) is None
        # and another's nearer prompt does not stand before one's own
        await one.put(asked(3, "another"), answer(3))
        assert texts(await one.get(asked(3))) == "answer 1"
        assert texts(await one.get(asked(1, "another"))) == "answer 3"

    asyncio.run(run())


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"echo": True}, {"prompt_logprobs": 0}])
def test_what_must_not_be_shared_is_left_alone(params):
    cache = SemanticCache(by_number, MODEL, limits=Limits())

    async def run() -> object:
        await cache.put(asked(1, **params), answer(1))
        return await cache.get(asked(1, **params))

    assert asyncio.run(run()) is None
    assert cache.counts()["entries"] == 0


@pytest.mark.parametrize("seed", range(6))
def test_against_a_search_from_end_to_end(seed):
    """Random puts, gets and waits against a list, with room for 8 prompts of 3 groups, and for fewer where answers are long."""
    rng, now, room, limits = np.random.default_rng(seed), [0.0], 8, Limits(5000, 2000, 50.0)
    cache = SemanticCache(by_number, MODEL, threshold=cosine(0, 30), entries=room, limits=limits, clock=lambda: now[0])
    rows: list[tuple[str, int, float, int, int]] = []  # (tenant, number, put at, name, bytes), the one used last comes last
    hits = 0

    async def run() -> None:
        nonlocal hits
        for turn in range(1500):
            tenant, number = f"t{rng.integers(3)}", int(rng.integers(1000))
            now[0] += float(rng.uniform(0, 2))
            if rng.random() < 0.5:
                long = answer(turn, int(rng.integers(0, 2200)) if rng.random() < 0.3 else 0)
                size = len(msgspec.msgpack.encode(long)) + ENTRY_OVERHEAD
                await cache.put(asked(number, tenant), long)
                if size <= 2000:
                    rows.append((tenant, number, now[0], turn, size))
                while len(rows) > room or sum(row[4] for row in rows) > 5000:
                    del rows[0]
                continue
            near = [
                (cosine(number, row[1]), row) for row in rows
                if row[0] == tenant and cosine(number, row[1]) > cosine(0, 30) - 1e-6 and now[0] - row[2] < 50.0
            ]  # fmt: skip
            found = texts(await cache.get(asked(number, tenant)))
            if near and max(near)[0] > cosine(0, 30) + 1e-6:
                best = max(one for one, _ in near)
                assert found in {f"answer {row[3]}" for one, row in near if one > best - 1e-6}
            if found is not None:
                assert near, turn
                hits += 1
                row = next(row for row in rows if f"answer {row[3]}" == found)
                rows.remove(row)
                rows.append(row)
            assert cache.counts()["entries"] == len(rows) <= room
            assert cache.counts()["bytes"] == sum(row[4] for row in rows) <= 5000

    asyncio.run(run())
    assert hits > 20


def test_an_embedding_that_fails_is_a_miss():
    async def run() -> None:
        for wrong in (np.zeros(4), np.full(4, np.nan), np.full(4, np.inf)):

            async def embed(prompt, wrong=wrong) -> np.ndarray:
                return wrong

            cache = SemanticCache(embed, MODEL, limits=Limits())
            await cache.put(asked(1), answer(1))
            assert await cache.get(asked(1)) is None
            assert cache.counts() == {"hits": 0, "misses": 1, "failed": 2, "entries": 0, "bytes": 0}

        async def fails(prompt) -> np.ndarray:
            raise RuntimeError("no engine")

        cache = SemanticCache(fails, MODEL, limits=Limits())
        await cache.put(asked(1), answer(1))
        assert await cache.get(asked(1)) is None

    asyncio.run(run())


@pytest.mark.timed
def test_a_search_among_thousands_is_quick():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4096, 1024)).astype(np.float32)

    async def embed(prompt) -> np.ndarray:
        return vectors[prompt[0]]

    cache = SemanticCache(embed, MODEL, limits=Limits(), entries=4096)

    async def run() -> list[float]:
        for number in range(4096):
            await cache.put(asked(number), answer(number))
        times = []
        for number in range(0, 4096, 200):
            began = time.perf_counter()
            assert texts(await cache.get(asked(number))) == f"answer {number}"
            times.append(time.perf_counter() - began)
        return times

    assert np.median(asyncio.run(run())) < 10e-3


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"threshold": 1.0}, {"threshold": float("nan")}, {"entries": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError):
        SemanticCache(by_number, MODEL, limits=Limits(), **settings)
