"""Engines that die, hang or are stopped, clients that go away, too much work, and the end of a server."""

import asyncio
import os
import signal
import time

import httpx
import pytest

from tests.cli import assert_refused, run
from tests.serve.server import client_of, cpu_seconds, events, read, serving

pytestmark = pytest.mark.timed

LONG = {"prompt": [5, 6, 7], "max_tokens": 1900, "ignore_eos": True, "stream": True}
STREAMS = 16


@pytest.mark.row("exit code of a dead engine", "replaced")
@pytest.mark.row("one fault for all", "everyone is told")
def test_a_killed_engine_ends_every_stream_within_a_second_and_comes_back():
    with serving("code-8m", "--max-sequences", "8", "--max-waiting", "64") as server:

        async def rounds() -> None:
            async with client_of(server) as client:
                for seed in range(3):
                    before, begun = server.engine_pid(), asyncio.Event()
                    streams = [
                        asyncio.create_task(read(client, {**LONG, "seed": seed, "prompt": [5 + i]}, begun)) for i in range(STREAMS)
                    ]  # fmt: skip
                    await begun.wait()
                    await asyncio.sleep(0.1)
                    os.kill(before, signal.SIGKILL)
                    killed = time.monotonic()
                    async with asyncio.timeout(1.0):
                        while (refused := await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200:
                            pass
                    assert refused.status_code == 503
                    assert int(refused.headers["retry-after"]) >= 1
                    for status, found, ended in await asyncio.gather(*streams):
                        assert ended - killed < 1.0
                        assert status == 503 or "error" in found[-1]
                        assert sum("error" in one for one in found) == 1
                        assert not any(choice["finish_reason"] for one in found[:-1] for choice in one.get("choices", ()))
                    await asyncio.to_thread(server.until, server.ready, 15)
                    assert server.engine_pid() != before
                    assert (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})).status_code == 200

        asyncio.run(rounds())
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.stop() == 0


@pytest.mark.row("lying health", "a stopped engine")
def test_a_stopped_engine_is_noticed_and_replaced():
    with serving("code-8m", "--replace-after", "6") as server:
        before = server.engine_pid()
        os.kill(before, signal.SIGSTOP)
        stopped = time.monotonic()
        server.until(lambda: not server.ready(), 10)
        assert 1 < time.monotonic() - stopped < 10  # not at the first late beat
        server.until(lambda: server.ready() and server.engine_pid() != before, 60)
        assert time.monotonic() - stopped < 60
        assert any("does not run" in line for line in server.lines)
        assert server.stop() == 0


@pytest.mark.row("disconnects", "within a second")
def test_who_goes_away_frees_the_engine(server):
    """Eight that would take the engine for seconds leave; the ninth does not wait for them."""

    async def leave() -> None:
        async with client_of(server) as client:
            for after in (0.0, 0.05, 0.3):  # while they are tokenized, in their prompts, or streaming
                streams = [asyncio.create_task(read(client, {**LONG, "n": 2, "prompt": [9 + i]})) for i in range(8)]
                await asyncio.sleep(after)
                for one in streams:
                    one.cancel()
                await asyncio.gather(*streams, return_exceptions=True)

    asyncio.run(leave())
    began = time.monotonic()
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
    assert time.monotonic() - began < 1.0
    pid = server.engine_pid()
    time.sleep(0.5)
    before = cpu_seconds(pid)
    time.sleep(1.0)
    assert cpu_seconds(pid) - before < 0.1  # nothing goes on for nobody


@pytest.mark.row("overload", "bounded unless told otherwise")
def test_too_much_is_refused_at_once_and_the_rest_is_served():
    with serving("code-8m", "--max-sequences", "2", "--max-waiting", "4") as server:

        async def crowd() -> list[httpx.Response]:
            async with client_of(server) as client:
                body = {"prompt": [5], "max_tokens": 200, "ignore_eos": True, "temperature": 0}
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(30)))

        answers = asyncio.run(crowd())
        served = [one for one in answers if one.status_code == 200]
        refused = [one for one in answers if one.status_code == 429]
        assert len(served) + len(refused) == 30
        assert len(served) >= 6
        assert len(refused) >= 10
        assert len({one.json()["choices"][0]["text"] for one in served}) == 1
        for one in refused:
            assert int(one.headers["retry-after"]) >= 1
            assert one.json()["error"]["type"] == "rate_limit_error"
        alone = server.post("/v1/completions", {"prompt": "x", "n": 7, "seed": 1})  # more than may wait, while nobody does
        assert len(alone.json()["choices"]) == 7
        too_many = server.post("/v1/completions", {"prompt": ["x"] * 5, "n": 64, "seed": 1})
        assert too_many.status_code == 400
        late = server.post("/v1/completions", {**LONG, "stream": False, "timeout_s": 0.05})
        assert late.status_code == 504
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.row("shutdown", "drains unless told otherwise")
def test_told_to_stop_it_ends_its_streams_and_takes_no_new_ones():
    with serving("code-8m", "--max-sequences", "8", "--max-waiting", "64") as server:
        engine = server.engine_pid()

        async def drain() -> None:
            async with client_of(server) as client:
                begun = [asyncio.Event() for _ in range(STREAMS)]
                body = {**LONG, "max_tokens": 150}
                streams = [asyncio.create_task(read(client, body, one)) for one in begun]
                await asyncio.gather(*(one.wait() for one in begun[:1]))
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
                refused = await client.post("/v1/completions", json={"prompt": "x"})
                assert refused.status_code == 503
                assert refused.headers["retry-after"]
                for status, found, _ in await asyncio.gather(*streams):
                    assert status == 200
                    assert found[-1]["choices"][0]["finish_reason"] == "length"

        asyncio.run(drain())
        assert server.process.wait(10) == 0
        assert not os.path.exists(f"/proc/{engine}")


@pytest.mark.row("shutdown", "grace ends")
def test_grace_ends():
    with serving("code-8m", "--grace", "0.3") as server:

        async def cut() -> None:
            async with client_of(server) as client:
                begun = asyncio.Event()
                stream = asyncio.create_task(read(client, {**LONG, "n": 8}, begun))
                await begun.wait()
                server.process.send_signal(signal.SIGTERM)
                _, found, _ = await stream
                assert "went down" in found[-1]["error"]["message"], found[-1]

        began = time.monotonic()
        asyncio.run(cut())
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 8


@pytest.mark.row("shutdown", "nothing is left")
def test_the_engine_dies_with_its_server():
    with serving("code-8m") as server:
        engine = server.engine_pid()
        server.process.kill()
        server.process.wait()
        end = time.monotonic() + 5
        while os.path.exists(f"/proc/{engine}"):
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.row("http and keys", "every route, deny by default")
def test_keys_are_asked_for_everywhere_but_where_nothing_is_said(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nalpha-1\nbeta-2\n")
    with serving("code-8m", "--api-key-file", keys) as server:
        body = {"prompt": "x", "max_tokens": 1}
        routes = [
            ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/messages"), ("POST", "/v1/responses"),
            ("POST", "/v1/messages/count_tokens"), ("POST", "/v1/embeddings"), ("POST", "/tokenize"), ("POST", "/detokenize"),
            ("GET", "/v1/models"), ("GET", "/v1/models/code-8m"), ("GET", "/openapi.json"),
            ("GET", "/metrics"), ("GET", "/nothing"), ("GET", "/health/"),
            ("GET", "/health/../v1/models"), ("GET", "//health"), ("GET", "/%68ealth"), ("GET", "/ready%2f..%2fv1%2fmodels"),
        ]  # fmt: skip
        wrong = [
            {}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Bearer x"}, {"authorization": "Bearer alpha-"},
            {"authorization": "Bearer alpha-11"}, {"authorization": "Basic alpha-1"}, {"x-api-key": "beta"},
            {"authorization": "Bearer # ours"}, {"host": "localhost", "x-forwarded-for": "127.0.0.1"},
        ]  # fmt: skip
        with httpx.Client(base_url=server.url) as client:
            for method, path in routes:
                for headers in wrong:
                    answer = client.request(method, server.url + path, json=body if method == "POST" else None, headers=headers)
                    assert answer.status_code == 401, (path, headers)
            for headers in ({"authorization": "Bearer alpha-1"}, {"x-api-key": "beta-2"}, {"authorization": "bearer  beta-2"}):
                assert client.post("/v1/completions", json=body, headers={**headers, "host": "any.example"}).status_code == 200
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
        log = "\n".join(server.lines)
        assert "alpha-1" not in log
        assert "beta-2" not in log


@pytest.mark.row("pickles on sockets", "loopback alone")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-model",), ("no-such-model",)),
        (("code-8m", "--host", "0.0.0.0"), ("0.0.0.0", "--api-key-file", "--without-keys")),
        (("code-8m", "--host", "203.0.113.7", "--without-keys"), ("cannot listen on 203.0.113.7:8000",)),
        (("code-8m", "--api-key-file", "/nonexistent"), ("/nonexistent", "cannot be read")),
        (("code-8m", "--max-body", "lots"), ("--max-body", "lots")),
    ],
)
def test_what_cannot_be_served(arguments, said):
    assert_refused(run("serve", *arguments), *said)


@pytest.mark.row("exit code of a dead engine", "never could live")
def test_what_the_engine_cannot_load_is_one_line_and_exit_code_2():
    outcome = run("serve", "code-8m", "--memory", "1MB", "--port", "0")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "1,000,000 bytes of memory are not enough" in outcome.err.splitlines()[-1]


def test_streams_end_in_exactly_one_finish(server):
    for seed in range(8):
        found = events(server.post("/v1/completions", {"prompt": "é", "max_tokens": 9, "stream": True, "seed": seed, "n": 3}).text)
        for index in range(3):
            reasons = [one["choices"][0]["finish_reason"] for one in found if one["choices"][0]["index"] == index]
            assert reasons[-1] in {"stop", "length"}
            assert not any(reasons[:-1])
