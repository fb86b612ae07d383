"""Answers in Redis, with a real server: shared, bounded, and never in a request's way."""

import asyncio
import contextlib
import logging
import statistics
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from hasten.engine import SamplingParams
from hasten.serve.responses import Answer, Asked, Limits, Output, ResponseCache, key_of, open_store
from hasten.serve.responses.breaker import Breaker
from hasten.serve.responses.redis import NAMESPACE, RedisStore
from tests.serve.redis_server import RedisServer, free_port

MODEL = b"m" * 32
LIMITS = Limits(value_bytes=100_000, seconds=60.0)


@pytest.fixture
def server(tmp_path) -> Iterator[RedisServer]:
    one = RedisServer(tmp_path)
    one.start()
    yield one
    one.kill()


def asked(number: int, tenant: str = "t") -> Asked:
    return Asked(tenant, (1, 2, number), SamplingParams())


def answer(text: str) -> Answer:
    return Answer((Output(text, (1, 2), "stop"),), 3, 2)


@contextlib.asynccontextmanager
async def caches(url: str, count: int = 1, limits: Limits = LIMITS) -> AsyncIterator[list[ResponseCache]]:
    """As many servers would have them: a store each."""
    made = [ResponseCache(open_store(url, limits), limits.value_bytes) for _ in range(count)]
    for one in made:
        one.open(MODEL)
    yield made
    for one in made:
        await one.close()


@contextlib.asynccontextmanager
async def raw(server: RedisServer) -> AsyncIterator:
    from redis.asyncio import Redis

    client = Redis.from_url(server.url)
    yield client
    await client.aclose()


async def asked_or_computed(cache: ResponseCache, number: int) -> bool:
    """As a server does it; whether it was a hit. A wrong answer fails."""
    hit = await cache.get(asked(number))
    if hit is not None:
        assert hit.answer == answer(f"answer {number}")
        return True
    await cache.put(asked(number), answer(f"answer {number}"))
    return False


def test_two_servers_share_hits(server):
    async def run() -> None:
        async with caches(server.url, 2) as (one, other), raw(server) as redis:
            assert not any([await asked_or_computed(one, number) for number in range(20)])
            assert all([await asked_or_computed(other, number) for number in range(20)])
            assert await other.get(asked(3, "another tenant")) is None
            keys = await redis.keys("*")
            assert len(keys) == 20
            assert all(key.startswith(NAMESPACE.encode()) for key in keys)
            assert all([0 < await redis.pttl(key) <= 60_000 for key in keys])
            assert other.counts()["hits"] == 20
            other.open(b"n" * 32)  # another model
            assert await other.get(asked(3)) is None

    asyncio.run(run())


@pytest.mark.timed
def test_what_is_old_is_gone(server):
    async def run() -> None:
        async with caches(server.url, limits=Limits(seconds=0.2)) as (cache,):
            await asked_or_computed(cache, 1)
            assert await cache.get(asked(1)) is not None
            await asyncio.sleep(0.3)
            assert await cache.get(asked(1)) is None

    asyncio.run(run())


@pytest.mark.timed
def test_a_hit_is_quick(server):
    async def run() -> list[float]:
        async with caches(server.url) as (cache,):
            await asked_or_computed(cache, 1)
            times = []
            for _ in range(101):
                began = time.perf_counter()
                assert await cache.get(asked(1)) is not None
                times.append(time.perf_counter() - began)
            return times

    assert statistics.median(asyncio.run(run())) < 2e-3


@pytest.mark.timed
def test_a_server_that_dies_and_returns_fails_no_request(server, caplog):
    caplog.set_level(logging.WARNING, "hasten")
    hits: dict[str, int] = {"before": 0, "down": 0, "after": 0}

    async def run() -> None:
        async with caches(server.url, 2) as pair:

            async def requests(phase: str, count: int) -> float:
                longest = 0.0
                for number in range(count):
                    began = time.perf_counter()
                    hits[phase] += await asked_or_computed(pair[number % 2], number // 2)
                    longest = max(longest, time.perf_counter() - began)
                return longest

            await requests("before", 40)
            server.kill()
            longest = await requests("down", 400)
            assert longest < 1.0
            assert [one.counts()["store_down"] for one in pair] == [1, 1]
            assert all(one.counts()["store_skipped"] > 100 for one in pair)
            server.start()
            for _ in range(100):  # the longest pause is 5 s
                await requests("after", 40)
                if not any(one.counts()["store_down"] for one in pair):
                    break
                await asyncio.sleep(0.1)
            hits["after"] = 0
            await requests("after", 40)
            assert [one.counts()["store_outages"] for one in pair] == [1, 1]

    asyncio.run(run())
    assert hits["before"] == 20  # the second server's
    assert hits["down"] == 0
    assert hits["after"] >= 20
    said = [record.getMessage() for record in caplog.records]
    assert sum("does not answer" in line for line in said) == 2
    assert sum("answers again" in line for line in said) == 2
    assert len(said) == 4


@pytest.mark.timed
def test_one_that_dies_in_the_middle_of_many_requests(server):
    """With 32 of them under way at a time: none fails, none is wrong."""

    async def run() -> None:
        async with caches(server.url, 2) as pair:
            number = iter(range(100_000))
            stop = asyncio.Event()

            async def worker(cache: ResponseCache) -> None:
                while not stop.is_set():
                    await asked_or_computed(cache, next(number) % 50)
                    await asyncio.sleep(0.001)

            async def faults() -> None:
                for _ in range(2):
                    await asyncio.sleep(0.3)
                    await asyncio.to_thread(server.kill)
                    await asyncio.sleep(0.4)
                    await asyncio.to_thread(server.start)
                await asyncio.sleep(0.5)
                stop.set()

            await asyncio.gather(faults(), *(worker(pair[index % 2]) for index in range(32)))
            assert all(one.counts()["store_errors"] for one in pair)
            assert all(one.counts()["hits"] for one in pair)

    asyncio.run(run())


@pytest.mark.timed
def test_one_that_accepts_and_never_answers():
    async def run() -> None:
        silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", port := free_port())
        store = RedisStore(f"redis://127.0.0.1:{port}", LIMITS)
        cache = ResponseCache(store, LIMITS.value_bytes)
        cache.open(MODEL)
        began = time.perf_counter()
        await asyncio.gather(*(cache.get(asked(number)) for number in range(64)))  # together they wait once, or for a connection
        assert time.perf_counter() - began < 0.6
        assert cache.counts()["store_down"] == 1
        began = time.perf_counter()
        for number in range(100):
            assert await cache.get(asked(number)) is None
        assert time.perf_counter() - began < 0.1
        await cache.close()
        silent.close()

    asyncio.run(run())


def test_answers_that_come_too_late_answer_nothing_else(server):
    """A late answer may lie on a connection that is used again. It must never be taken for that of the next request."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delays: Iterator[float]) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def onwards() -> None:
            while piece := await reader.read(65536):
                to_writer.write(piece)

        async def back() -> None:
            while piece := await to_reader.read(65536):
                await asyncio.sleep(next(delays))
                writer.write(piece)

        with contextlib.suppress(OSError):
            await asyncio.gather(onwards(), back())

    async def run() -> None:
        delays = (0.075 if number % 9 > 6 else 0.0 for number in range(1_000_000))
        slow = await asyncio.start_server(lambda reader, writer: relay(reader, writer, delays), "127.0.0.1", port := free_port())
        store = RedisStore(f"redis://127.0.0.1:{port}", LIMITS, timeout=0.05)
        cache = ResponseCache(store, LIMITS.value_bytes)
        cache.open(MODEL)
        async with caches(server.url) as (direct,):
            for number in range(20):
                await asked_or_computed(direct, number)
        for turn in range(120):
            await asked_or_computed(cache, turn % 20)
            await asyncio.sleep(0.002)
        assert cache.counts()["hits"] > 10
        assert cache.counts()["store_errors"] > 5
        assert cache.counts()["damaged"] == 0  # none was read for another; its digest would have told
        await cache.close()
        slow.close()

    asyncio.run(run())


@pytest.mark.row("pickles on sockets", "a canary at every socket")
def test_damaged_long_and_foreign_entries_are_misses(server):
    async def run() -> None:
        limits = Limits(value_bytes=2000)
        async with caches(server.url, limits=limits) as (cache,), raw(server) as redis:
            name = NAMESPACE + key_of(MODEL, asked(1)).hex()
            await asked_or_computed(cache, 1)
            whole = await redis.get(name)
            for damaged in (b"", b"x", whole[:-1], whole + b"x", whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], b"x" * 1_000_000):
                await redis.set(name, damaged)
                assert await cache.get(asked(1)) is None
            assert cache.counts()["damaged"] == 5  # an empty one is none
            await redis.delete(name)
            await redis.rpush(name, b"a list")
            assert await cache.get(asked(1)) is None
            assert cache.counts()["store_refused"] == 1
            await redis.delete(name)
            await redis.set(name, whole)
            assert await cache.get(asked(1)) is not None
            await cache.put(asked(2), answer("x" * 3000))
            assert await cache.get(asked(2)) is None

    asyncio.run(run())


def test_one_that_is_full_still_answers(server):
    async def run() -> None:
        async with caches(server.url) as (cache,), raw(server) as redis:
            await asked_or_computed(cache, 1)
            await redis.config_set("maxmemory", "1")
            for number in range(2, 10):
                assert not await asked_or_computed(cache, number)
            assert await asked_or_computed(cache, 1)
            counts = cache.counts()
            assert (counts["store_refused"], counts["store_down"], counts["kept"]) == (8, 0, 1)

    asyncio.run(run())


def test_a_wrong_password_costs_hits_only_and_is_not_told(server, caplog):
    caplog.set_level(logging.WARNING, "hasten")

    async def run() -> None:
        async with raw(server) as redis:
            await redis.config_set("requirepass", "secret")
        async with caches(server.url.replace("//", "//:hush@")) as (cache,):
            for number in range(5):
                assert not await asked_or_computed(cache, number)
            assert cache.counts()["store_down"] == 1

    asyncio.run(run())
    assert caplog.records
    assert "hush" not in caplog.text


def test_the_breaker_alone():
    now = [0.0]
    breaker = Breaker(3, 1.0, 4.0, lambda: now[0])
    assert [breaker.attempt() and breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.open
    assert not breaker.failed()  # one that was under way
    granted = []
    for tick in range(200):
        now[0] = tick / 10
        if breaker.attempt():
            granted.append(now[0])
            breaker.failed()
    assert granted == pytest.approx([1.0, 3.0, 7.0, 11.0, 15.0, 19.0])
    assert breaker.succeeded()
    assert not breaker.open
    assert not breaker.succeeded()
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    now[0] += 1.0
    assert breaker.attempt()  # the pause is the first one again
