"""The load generator: arrival times and figures as pure functions, and whole against a server with known delays."""

import asyncio
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hasten.base.errors import ConfigError, UserError
from hasten.measure.arrivals import Ramp, arrival_times
from hasten.measure.http1 import Events, HttpClient, HttpError, bearer
from hasten.measure.serve_load import CACHE_HEADER, Asking, ask, find_model, run_load
from hasten.measure.serve_prompts import LoadRequest, RandomPrompts, read_custom, read_sharegpt
from hasten.measure.serve_report import Outcome, meets, parse_goodput, parse_metrics, parse_percentiles, percentile, report, table
from hasten.serve.responses import HEADER
from tests.cli import assert_refused, run
from tests.serve import stream_server
from tests.serve.stream_server import StreamServer

# --- arrival times


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness):
    times = arrival_times(40_000, 50.0, burstiness=burstiness, seed=1)
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert times[-1] == pytest.approx(40_000 / 50.0)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)  # a gamma's coefficient of variation
    # its distribution function at the mean, in closed form for whole shapes: 1 − e^−k · Σ k^i / i!
    if burstiness >= 1:
        k = int(burstiness)
        expected = 1 - math.exp(-k) * sum(k**i / math.factorial(i) for i in range(k))
        assert (gaps < 1 / 50).mean() == pytest.approx(expected, abs=0.01)


def test_times_repeat_with_their_seed():
    one, same, other = (arrival_times(100, 5.0, seed=seed) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    assert (arrival_times(10, math.inf) == 0).all()
    assert len(arrival_times(0, 5.0)) == 0


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 55.0), ("exponential", math.sqrt(10 * 100))])
def test_a_ramp_goes_from_one_rate_to_the_other(strategy, middle):
    count = 60_001
    ramp = Ramp(strategy, 10.0, 100.0)
    assert ramp.rates(3).tolist() == pytest.approx([10.0, middle, 100.0])
    gaps = np.diff(arrival_times(count, math.inf, ramp=ramp, seed=3))
    for begin, rate in ((0, 10.0), (count // 2 - 500, middle), (count - 1001, 100.0)):
        assert 1 / gaps[begin : begin + 1000].mean() == pytest.approx(rate, rel=0.15)


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, math.inf), (1.0, math.nan)])
def test_rates_are_above_nothing(rate, burstiness):
    with pytest.raises(ConfigError):
        arrival_times(10, rate, burstiness=burstiness)


# --- figures


def outcome(sent: float, chunks: list[float], tokens: int | None = None, **more) -> Outcome:
    """One whose chunks came at those times."""
    gaps = [later - earlier for earlier, later in zip(chunks, chunks[1:])]
    first, last = (chunks[0], chunks[-1]) if chunks else (None, None)
    return Outcome(sent, first=first, last=last, gaps=gaps, output_tokens=tokens, chunks=len(chunks), **more)


def test_the_documented_example_of_itl_and_tpot():
    """Two tokens a chunk: gaps of 40 ms, 20 ms a token."""
    one = outcome(0.0, [0.1, 0.14, 0.18, 0.22], tokens=7)
    assert one.seconds("tpot") == pytest.approx(0.12 / 6)
    assert one.gaps == pytest.approx([0.04] * 3)


def test_figures_against_a_plain_calculation():
    rng = np.random.default_rng(4)
    outcomes = []
    for index in range(200):
        sent = float(rng.uniform(0, 10))
        times = (sent + rng.uniform(0.01, 0.5) + np.cumsum(rng.exponential(0.02, rng.integers(1, 30)))).tolist()
        counted = None if index % 5 == 0 else len(times) * 2
        error = "no" if index % 17 == 0 else "other" if index % 23 == 0 else None
        outcomes.append(outcome(sent, times, counted, prompt_tokens=index % 7, error=error, late=0.001 * index, cached=index % 50 == 1))
    outcomes.append(outcome(1.0, []))
    slos = {"ttft": 250.0, "tpot": 15.0, "e2el": 600.0}
    found = report(outcomes, 12.5, metrics=["ttft", "tpot", "itl", "e2el"], percentiles=[50, 99, 99.9], slos=slos)
    done = [one for one in outcomes if one.error is None and one.chunks]
    n_out = [one.output_tokens or one.chunks for one in done]
    lists = {
        "ttft": [1e3 * (one.first - one.sent) for one in done],
        "e2el": [1e3 * (one.last - one.sent) for one in done],
        "tpot": [1e3 * ((one.last - one.sent) - (one.first - one.sent)) / (n - 1) for one, n in zip(done, n_out) if n > 1],
        "itl": [1e3 * gap for one in done for gap in one.gaps],
    }
    assert (found["completed"], found["failed"]) == (len(done), len(outcomes) - len(done))
    assert found["errors"] == {"no": 12, "other": found["errors"]["other"], "the answer holds no output": 1}
    assert sum(found["errors"].values()) == found["failed"]
    assert found["total_output_tokens"] == sum(n_out)
    assert found["output_throughput"] == pytest.approx(sum(n_out) / 12.5)
    assert found["total_token_throughput"] == pytest.approx((sum(n_out) + sum(one.prompt_tokens for one in done)) / 12.5)
    assert found["request_throughput"] == pytest.approx(len(done) / 12.5)
    assert found["counted_by_chunks"] == sum(one.output_tokens is None for one in done)
    assert found["max_late_ms"] == pytest.approx(199.0)
    for name, values in lists.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(sum(values) / len(values))
        assert found[f"std_{name}_ms"] == pytest.approx(statistics.pstdev(values))
        for percent in (50, 99, 99.9):
            place = percent / 100 * (len(values) - 1)
            low, part = sorted(values)[int(place)], place - int(place)
            high = sorted(values)[min(int(place) + 1, len(values) - 1)]
            assert found[f"p{percent:g}_{name}_ms"] == pytest.approx(low + part * (high - low))
        assert found[f"median_{name}_ms"] == pytest.approx(statistics.median(values))
    good = 0
    for one, n in zip(done, n_out):
        per_token = 1e3 * (one.last - one.first) / (n - 1) if n > 1 else 0.0
        good += 1e3 * (one.first - one.sent) <= 250 and per_token <= 15 and 1e3 * (one.last - one.sent) <= 600
    assert 0 < good < len(done)
    assert found["request_goodput"] == pytest.approx(good / 12.5)


def test_no_answers_make_no_figures_up():
    found = report([outcome(0.0, [], error="gone")], 1.0, metrics=["ttft", "itl"], percentiles=[99], slos={})
    assert (found["completed"], found["failed"], found["mean_ttft_ms"], found["p99_itl_ms"]) == (0, 1, 0.0, 0.0)
    assert found["request_goodput"] is None
    assert "1 × gone" in table(found, metrics=["ttft"], percentiles=[99])
    assert percentile([], 99) == 0.0


def test_what_failed_meets_no_slo():
    assert not meets(outcome(0.0, [0.1], error="cut"), {})
    assert meets(outcome(0.0, [0.1]), {"tpot": 0.001, "ttft": 100.0})  # one token has no TPOT
    assert not meets(outcome(0.0, [0.2]), {"ttft": 100.0})


def test_goodput_is_read_as_vllm_writes_it():
    assert parse_goodput(["ttft:200 tpot:50"]) == parse_goodput(["ttft:200", "tpot:50"]) == {"ttft": 200.0, "tpot": 50.0}
    assert parse_goodput([]) == {}
    for wrong in ("ttft", "ttft:", "itl:5", "ttft:-1", "ttft:nan", "200"):
        with pytest.raises(ConfigError, match="goodput"):
            parse_goodput([wrong])
    assert parse_percentiles("50,99.9") == [50, 99.9]
    assert parse_metrics("ttft, itl") == ["ttft", "itl"]
    for wrong in ("", "a", "101", "-1", "nan"):
        with pytest.raises(ConfigError):
            parse_percentiles(wrong)
        with pytest.raises(ConfigError):
            parse_metrics(wrong)


# --- prompts


def test_random_prompts_have_the_asked_lengths():
    drawn = RandomPrompts(100, 20, range_ratio=0.5, prefix_tokens=8).draw(500, seed=1)
    assert drawn == RandomPrompts(100, 20, range_ratio=0.5, prefix_tokens=8).draw(500, seed=1)
    assert drawn != RandomPrompts(100, 20, range_ratio=0.5, prefix_tokens=8).draw(500, seed=2)
    lengths = [len(one.prompt) - 8 for one in drawn]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert {one.output_tokens for one in drawn} == set(range(10, 31))
    assert len({tuple(one.prompt[:8]) for one in drawn}) == 1
    assert all(0 <= token < 256 for one in drawn for token in one.prompt)
    assert [len(one.prompt) for one in RandomPrompts(5, 1).draw(3, 0)] == [5] * 3
    assert all(len(one.prompt.split()) == 5 for one in RandomPrompts(5, 1, as_text=True).draw(3, 0))
    for wrong in ((0, 1), (1, 0), (1, 1, 1.0), (1, 1, -0.1), (1, 1, 0.0, -1)):
        with pytest.raises(ConfigError):
            RandomPrompts(*wrong)


def test_prompts_of_files(tmp_path):
    file = tmp_path / "prompts"
    turns = [{"conversations": [{"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": "answer"}]} for i in range(5)]
    file.write_text(json.dumps([*turns, {"conversations": []}, {"conversations": [{"value": "alone"}]}, {}, 3]))
    found = read_sharegpt(file, 5, 9, seed=0)
    assert sorted(one.prompt for one in found) == [f"question {i}" for i in range(5)]
    assert len(read_sharegpt(file, 12, 9, seed=0)) == 12
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "output_tokens": 3}\n')
    assert sorted(read_custom(file, 2, 9, 0), key=lambda one: one.output_tokens) == [LoadRequest("b", 3), LoadRequest("a", 9)]
    for wrong in ("", "[]", '{"prompt": ""}', '{"prompt": "a", "output_tokens": 0}', "{", '{"text": "a"}'):
        file.write_text(wrong)
        with pytest.raises(UserError, match="prompts"):
            read_custom(file, 2, 9, 0)
        with pytest.raises(UserError, match="prompts"):
            read_sharegpt(file, 2, 9, 0)


# --- the client


def test_events_are_the_same_however_they_are_cut():
    whole = b'data: {"a": 1}\n\n: comment\n\ndata: two\ndata: lines\r\n\r\nevent: x\ndata:no space\n\nid: 1\n\ndata: \xc3\xa9\n\n'
    expected = [b'{"a": 1}', b"two\nlines", b"no space", "é".encode()]
    for size in range(1, len(whole) + 1):
        events = Events()
        assert [one for at in range(0, len(whole), size) for one in events.feed(whole[at : at + size])] == expected, size


HEAD = b"HTTP/1.1 200 OK\r\n"
ANSWERS = {
    "length": (HEAD + b"Content-Length: 5\r\n\r\nhello", b"hello"),
    "nothing": (HEAD + b"content-length: 0\r\n\r\n", b""),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n", b"hello"),
    "trailers": (HEAD + b"Transfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"hello"),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\nok", b"ok"),
    "to the end": (b"HTTP/1.0 200 OK\r\n\r\nhello", b"hello"),
    "short": (HEAD + b"Content-Length: 9\r\n\r\nhello", None),
    "cut chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", None),
    "negative": (HEAD + b"Content-Length: -1\r\n\r\n", None),
    "no size": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nhello\r\n0\r\n\r\n", None),
    "negative chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\nhello\r\n0\r\n\r\n", None),
    "huge chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n7fffffff\r\nhello", None),
    "no status": (b"HTTP/1.1 abc\r\n\r\n", None),
    "nothing at all": (b"", None),
}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_every_form(name, size):
    sent, body = ANSWERS[name]

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        for at in range(0, len(sent), size):
            writer.write(sent[at : at + size])
            await asyncio.sleep(0)
        writer.close()

    async def post() -> bytes:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        client, got = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 5.0), bytearray()
        try:
            await client.post("/", b"{}", {}, lambda piece, now: got.extend(piece))
        finally:
            await client.close()
            server.close()
        return bytes(got)

    if body is None:
        with pytest.raises(HttpError):
            asyncio.run(post())
    else:
        assert asyncio.run(post()) == body


class Load:
    """A run against a StreamServer."""

    def __init__(self, *, backend: str = "openai", timeout: float = 10.0, **script) -> None:
        self.server, self._backend, self._timeout, self._script = StreamServer(), backend, timeout, script

    def run(self, requests: list[LoadRequest], times=None, **settings) -> tuple[list[Outcome], float]:
        async def load() -> tuple[list[Outcome], float]:
            client = HttpClient(await self.server.start(), self._timeout)
            asking = Asking(self._backend, "stream", headers={"X-Who": "me"}, extra={"script": self._script})
            try:
                return await run_load(client, asking, requests, np.zeros(len(requests)) if times is None else times, **settings)
            finally:
                await client.close()
                self.server.close()

        return asyncio.run(load())


@pytest.mark.timed
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
@pytest.mark.parametrize("per_chunk", [1, 2])
def test_times_are_those_of_the_server(backend, per_chunk):
    load = Load(backend=backend, first=0.1, gap=0.04, per_chunk=per_chunk)
    outcomes, seconds = load.run([LoadRequest("hello", 9)] * 4)
    chunks = -(-9 // per_chunk)
    for one in outcomes:
        assert one.error is None
        assert (one.tokens, one.chunks, one.prompt_tokens, one.cached) == (9, chunks, 7, False)
        assert one.seconds("ttft") == pytest.approx(0.1, abs=0.05)
        assert one.seconds("e2el") == pytest.approx(0.1 + 0.04 * (chunks - 1), abs=0.1)
        assert one.seconds("tpot") == pytest.approx(0.04 * (chunks - 1) / 8, abs=0.01)
        assert len(one.gaps) == chunks - 1
        assert statistics.median(one.gaps) == pytest.approx(0.04, abs=0.015)
    assert seconds < 2
    path, headers, body = load.server.seen[0]
    assert path == ("/v1/completions" if backend == "openai" else "/v1/chat/completions")
    assert headers["x-who"] == "me"
    assert body["stream"] is True
    assert body["temperature"] == 0.0
    assert body["model"] == "stream"
    if backend == "openai":
        assert (body["prompt"], body["max_tokens"]) == ("hello", 9)
    else:
        assert (body["messages"], body["max_completion_tokens"]) == ([{"role": "user", "content": "hello"}], 9)


def test_chunks_are_counted_where_the_server_does_not():
    (one,), _ = Load(no_usage=True).run([LoadRequest("hello", 9)], keep_text=True)
    assert (one.output_tokens, one.tokens, one.text) == (None, 9, "x " * 9)


def test_answers_from_a_response_cache_are_counted():
    assert CACHE_HEADER == HEADER
    outcomes, seconds = Load(cached=True).run([LoadRequest("hello", 2)] * 3)
    found = report(outcomes, seconds, metrics=["ttft"], percentiles=[99], slos={})
    assert found["cached"] == 3
    assert "Answers from a response cache:           3" in table(found, metrics=["ttft"], percentiles=[99])


@pytest.mark.parametrize("size", [1, 3, 50])
def test_answers_may_be_cut_anywhere(size):
    outcomes, _ = Load(bytes=size).run([LoadRequest("hello", 5)] * 3, keep_text=True)
    assert [(one.error, one.text) for one in outcomes] == [(None, "x " * 5)] * 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("refused", "status 429: the queue is full"),
        ("cut", "closed the connection before the end"),
        ("error", "the engine died"),
        ("garbage", "not what OpenAI's streams hold"),
        ("not http", "not HTTP/1.1"),
        ("no stream", "the answer is no stream: <html></html>"),
        ("hang", "timed out"),
    ],
)
def test_what_goes_wrong_is_counted(fault, said):
    load = Load(fault=fault, timeout=0.5)
    outcomes, seconds = load.run([LoadRequest("hello", 3)] * 3)
    assert all(said in (one.error or "") for one in outcomes), outcomes
    found = report(outcomes, seconds, metrics=["ttft"], percentiles=[99], slos={"ttft": 1e6})
    assert (found["completed"], found["failed"], found["request_goodput"]) == (0, 3, 0.0)
    assert sum(found["errors"].values()) == 3


def test_no_server_is_an_error_of_every_request():
    async def load() -> Outcome:
        return await ask(HttpClient("http://127.0.0.1:9"), Asking(model="m"), LoadRequest("a", 1))

    assert "refused" in asyncio.run(load()).error.lower() or "connect" in asyncio.run(load()).error.lower()


def test_a_request_that_cannot_be_written_is_an_error():
    (bad, good), _ = Load().run([LoadRequest("\ud800", 1), LoadRequest("a", 1)])
    assert "surrogate" in bad.error
    assert good.ok


def test_a_key_goes_into_a_header_or_nowhere():
    assert bearer("sk-1") == {"Authorization": "Bearer sk-1"}
    assert bearer(None) == bearer("") == {}
    for wrong in ("a\r\nX: 1", "ключ", "a\x00"):
        with pytest.raises(UserError, match="API key") as told:
            bearer(wrong)
        assert wrong not in str(told.value)


def test_no_more_than_asked_are_under_way():
    load = Load(first=0.02)
    outcomes, seconds = load.run([LoadRequest("hello", 2)] * 20, max_concurrency=4)
    assert load.server.most == 4
    assert load.server.connections <= 5  # and they are used again
    assert all(one.ok for one in outcomes)
    assert seconds >= 5 * 0.02


@pytest.mark.timed
def test_requests_are_sent_when_they_are_due():
    times = arrival_times(30, 100.0, seed=2)
    load = Load()
    outcomes, _ = load.run([LoadRequest("hello", 1)] * 30, times)
    behind = [one.sent - when for one, when in zip(outcomes, times)]
    assert max(behind) - min(behind) < 0.1
    assert all(one.late < 0.1 for one in outcomes)


def test_a_connection_the_server_closed_is_not_used():
    load = Load(close=True)
    outcomes, _ = load.run([LoadRequest("hello", 2)] * 6, max_concurrency=2)
    assert all(one.ok for one in outcomes)
    assert load.server.connections == 6


def test_a_lost_race_with_a_closing_server_is_no_error():
    """The server closes an idle connection just when a request is sent on it."""

    async def load() -> list[str | None]:
        turns = 0

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal turns
            for first in (True, False):
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
                if not first:
                    break
                turns += 1
                told = stream_server.event({"choices": [{"text": "x"}]}) + stream_server.event(b"[DONE]")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(told) + told)
            writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        errors = [(await ask(client, Asking(model="m"), LoadRequest("a", 1))).error for _ in range(4)]
        assert turns == 4
        await client.close()
        server.close()
        return errors

    assert asyncio.run(load()) == [None] * 4


def test_the_model_is_the_first_that_is_listed():
    async def load() -> str:
        server = StreamServer()
        client = HttpClient(await server.start())
        found = await find_model(client, {})
        server.close()
        await client.close()
        return found

    assert asyncio.run(load()) == "stream"
    with pytest.raises(UserError, match="--model"):
        asyncio.run(find_model(HttpClient("http://127.0.0.1:9"), {}))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http://a:port", "http://a?b=c"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="URL"):
        HttpClient(url)


@pytest.mark.timed
def test_one_core_takes_five_thousand_chunks_a_second():
    """32 streams of 200 chunks a second each, which come one by one: what they cost this process, in seconds of its processor."""
    chunks, streams, gap = 200, 32, 0.005
    command = [sys.executable, stream_server.__file__, str(chunks), str(gap)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"

            async def load() -> tuple[list[Outcome], float]:
                client = HttpClient(url)
                began = time.process_time()
                outcomes, _ = await run_load(client, Asking(model="m"), [LoadRequest("a", chunks)] * streams, np.zeros(streams))
                used = time.process_time() - began
                await client.close()
                return outcomes, used

            outcomes, used = asyncio.run(load())
        finally:
            server.kill()
    assert all(one.ok and one.chunks == chunks for one in outcomes)
    arrivals = sum(sum(gap > 0 for gap in one.gaps) for one in outcomes)
    assert arrivals > 0.5 * chunks * streams  # they did come one by one
    assert chunks * streams / used > 5000, f"{chunks * streams / used:,.0f} chunks a second of processor time"


# --- the command


@pytest.fixture
def url():
    """A StreamServer in a process of its own."""
    code = (
        "import asyncio; from tests.serve.stream_server import StreamServer\n"
        "async def main():\n    print(await (one := StreamServer()).start(), flush=True)\n    await asyncio.sleep(600)\nasyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as server:
        yield server.stdout.readline().strip()
        server.kill()


def test_the_command_prints_and_saves(url, tmp_path):
    options = ["--base-url", url, "--random-input-len", 5, "--random-output-len", 4, "--num-prompts", 10, "--seed", 3, "--num-warmups", 1]
    options += ["--request-rate", 200, "--burstiness", 0.5, "--max-concurrency", 4, "--extra-body", '{"script": {"first": 0.01}}']
    options += [
        "--metric-percentiles",
        "50,99",
        "--save-result",
        "--save-detailed",
        "--result-dir",
        tmp_path,
        "--result-filename",
        "r.json",
    ]
    done = run("bench", "serve", *options, "--goodput", "ttft:1000", "tpot:500")
    assert done.code == 0, done.err
    for label in (
        "Successful requests: 10", "Failed requests: 0", "Request throughput (req/s):", "Request goodput (req/s):", "Mean TTFT (ms):",
        "P99 TTFT (ms):", "P50 ITL (ms):", "Median TPOT (ms):", "Mean E2EL (ms):", "Output token throughput (tok/s):",
    ):  # fmt: skip
        assert label in " ".join(done.out.split()), label
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (saved["model_id"], saved["completed"], saved["total_output_tokens"], saved["request_rate"]) == ("stream", 10, 40, 200.0)
    assert saved["request_goodput"] == saved["request_throughput"]
    assert saved["output_lens"] == [4] * 10
    assert len(saved["ttfts"]) == len(saved["itls"]) == 10
    plain = json.loads(run("bench", "serve", *options[:12], "--backend", "openai-chat", "--json").out)
    assert (plain["completed"], plain["request_rate"], plain["backend"]) == (10, "inf", "openai-chat")


def test_the_command_fails_where_nothing_was_answered(url):
    failed = run("bench", "serve", "--base-url", url, "--num-prompts", 3, "--extra-body", '{"script": {"fault": "refused"}}')
    assert failed.code == 2
    assert "Failed requests:" in failed.out
    assert "3 × status 429: the queue is full" in failed.out
    assert "no request was answered" in failed.err


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--backend", "vllm"], ["backend", "openai-chat"]),
        (["--goodput", "itl:5"], ["goodput", "ttft:MS"]),
        (["tpot:50"], ["argument", "tpot:50"]),
        (["--request-rate", "0"], ["request rate"]),
        (["--dataset-name", "sonnet"], ["dataset-name", "sharegpt"]),
        (["--dataset-name", "custom"], ["--dataset-path"]),
        (["--ramp-up-strategy", "linear"], ["--ramp-up-start-rps"]),
        (["--ramp-up-strategy", "steep"], ["ramp-up-strategy", "exponential"]),
        (["--percentile-metrics", "latency"], ["percentile-metrics", "e2el"]),
        (["--extra-body", "[]"], ["extra-body", "JSON object"]),
        (["--base-url", "nowhere"], ["URL"]),
        (["--port", "9"], ["models cannot be listed", "--model"]),
    ],
)
def test_the_command_refuses(monkeypatch, capsys, arguments, fragments):
    from tests.cli import main

    assert_refused(main(monkeypatch, capsys, "bench", "serve", *arguments), *fragments)
