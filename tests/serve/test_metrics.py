"""/metrics of a real server: exact where clients were told the same, complete, documented, and never of a client's words."""

import asyncio
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from hasten.base.errors import ConfigError
from hasten.serve.metrics import check_prefix
from tests.cli import ROOT, assert_refused, run
from tests.serve.scrape import Scrape, scrape
from tests.serve.server import Server, events, serving

DURATIONS = [
    "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds",
]  # fmt: skip


def settled(server: Server) -> Scrape:
    """What is said once the engine has told of its last step."""

    def idle() -> Scrape | None:
        found = scrape(server.url)
        return found if not found["hasten_num_requests_running"] + found["hasten_num_requests_waiting"] else None

    time.sleep(0.3)
    return server.until(idle, 10)


async def load(server: Server, bodies: list[dict]) -> list[tuple[dict, float]]:
    """What each was told of its tokens, and how long it took."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def one(body: dict) -> tuple[dict, float]:
            began = time.monotonic()
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            last = events(answer.text)[-1] if body.get("stream") else answer.json()
            return last["usage"], time.monotonic() - began

        return await asyncio.gather(*map(one, bodies))


@pytest.mark.timed
def test_counts_are_what_clients_were_told(server):
    before = settled(server)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    bodies = [
        {"prompt": "def f" + "x" * i, "max_tokens": 5 + i % 7, "seed": i, **(streamed if i % 2 else {})} for i in range(24)
    ]  # fmt: skip
    bodies += [{"prompt": [[5] * 40, [6] * 3], "n": 2, "max_tokens": 6, "ignore_eos": True, "seed": 1, "best_of": 3}]
    outputs = 24 + 4
    told = asyncio.run(load(server, bodies))
    after = settled(server)

    def more(name: str, **labels: str) -> float:
        name = f"hasten_{name}"
        return after.of(name, **labels) - before.of(name, **labels) if labels else after[name] - before[name]

    assert more("prompt_tokens_total") == sum(usage["prompt_tokens"] for usage, _ in told)
    generated = sum(usage["completion_tokens"] for usage, _ in told)
    assert more("generation_tokens_total") == more("request_generation_tokens_sum") == generated
    ended = {reason: more("request_success_total", finished_reason=reason) for reason in ("stop", "length", "abort", "error")}
    assert ended["stop"] + ended["length"] == outputs
    assert ended["abort"] == ended["error"] == 0
    for name in [*DURATIONS, "request_prompt_tokens", "request_generation_tokens"]:
        assert more(f"{name}_count") == outputs, name
    assert more("http_requests_total", route="/v1/completions", status="200") == len(bodies)
    whole = more("e2e_request_latency_seconds_sum")
    assert 0 < whole <= sum(seconds for _, seconds in told) + 3 * told[-1][1]  # the last has four outputs
    parts = [more(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")]
    assert min(parts) >= 0
    assert 0.5 * whole < sum(parts) <= whole
    # the last has no token alone, so nothing is between its tokens
    assert more("inter_token_latency_seconds_count") <= generated - outputs
    assert more("inter_token_latency_seconds_sum") == pytest.approx(parts[2], rel=1e-6)
    # what the engine says: prompts once for each request it had, the third output of each of the last two as well
    assert more("prefix_cache_queries_total") == more("prompt_tokens_total")
    assert more("engine_step_tokens_total") >= generated
    assert more("engine_profiled_step_seconds_total") > more("engine_profiled_kernel_seconds_total") >= 0
    assert more("engine_read_bytes_total") > 10e6 * more("engine_steps_total")


@pytest.mark.timed
def test_shares_are_there_while_it_works_and_none_after(server):
    body = {"prompt": [5, 6], "max_tokens": 500, "ignore_eos": True}

    async def look() -> list[Scrape]:
        task = asyncio.create_task(load(server, [body] * 6))
        found = []
        while not task.done():
            found.append(await asyncio.to_thread(scrape, server.url))
            await asyncio.sleep(0.1)
        await task
        return found

    seen = asyncio.run(look())
    assert max(one["hasten_num_requests_running"] for one in seen) == 6
    assert max(one["hasten_kv_cache_usage_perc"] for one in seen) > 0
    shares = [one.of("hasten_step_outside_kernels_ratio") for one in seen]
    assert 0 < max(shares) < 1
    used = [one["hasten_memory_bandwidth_utilization_ratio"] for one in seen]
    assert 0 < max(used) < 3  # a small model is read from the processor's cache
    (rate,) = {one["hasten_streaming_read_bytes_per_second"] for one in seen}
    assert 1e8 < rate < 1e13
    time.sleep(1.3)
    after = scrape(server.url)
    assert after["hasten_memory_bandwidth_utilization_ratio"] == 0
    assert not after.labels("hasten_step_outside_kernels_ratio")
    assert ("hasten_step_outside_kernels_ratio", frozenset()) not in after.samples


@pytest.mark.timed
def test_who_waits_and_who_leaves_are_counted():
    with serving("code-8m", "--max-sequences", "1", "--max-waiting", "8", "--read-rate", "20GB") as server:
        assert scrape(server.url)["hasten_streaming_read_bytes_per_second"] == 20e9

        async def crowd() -> None:
            body = {"prompt": [5], "max_tokens": 200, "ignore_eos": True}
            task = asyncio.create_task(load(server, [body] * 3))
            waiting = 0.0
            while not task.done():
                waiting = max(waiting, (await asyncio.to_thread(scrape, server.url))["hasten_num_requests_waiting"])
                await asyncio.sleep(0.05)
            assert waiting == 2
            slow = [seconds for _, seconds in await task]
            found = await asyncio.to_thread(settled, server)
            queued = found["hasten_request_queue_time_seconds_sum"]
            assert 0.8 * (sum(slow) - max(slow)) - 0.2 < queued < sum(slow)  # each begins when the one before ends
            async with httpx.AsyncClient(base_url=server.url) as client:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/completions", json={**body, "max_tokens": 1900}, timeout=0.3)

        asyncio.run(crowd())
        found = settled(server)
        assert found.of("hasten_request_success_total", finished_reason="abort") == 1
        assert found.of("hasten_http_requests_total", route="/v1/completions", status="499") == 1
        assert any("queued 0." in line or "queued 1." in line for line in server.lines)


def test_a_restart_makes_no_counter_fall(tmp_path):
    with serving("code-8m", "--metrics-prefix", "vllm:") as server:
        bodies = [{"prompt": "x = " * 20, "max_tokens": 20, "ignore_eos": True}] * 3
        asyncio.run(load(server, bodies))
        time.sleep(0.4)
        seen = [scrape(server.url)]
        for deaths in (1, 2):
            os.kill(server.engine_pid(), signal.SIGKILL)
            server.until(lambda deaths=deaths: scrape(server.url)["vllm:engine_restarts_total"] == deaths)
            seen.append(scrape(server.url))
            assert seen[-1]["vllm:engine_up"] == 0
            server.until(server.ready)
            seen.append(scrape(server.url))
            asyncio.run(load(server, bodies))
            time.sleep(0.4)
            seen.append(scrape(server.url))
        counters = [name for name, kind in seen[0].kinds.items() if kind == "counter"]
        assert len(counters) > 15
        for earlier, later in zip(seen, seen[1:]):
            for name, labels in earlier.samples:
                if name in counters or name.endswith(("_bucket", "_count", "_sum")):
                    assert later.samples[name, labels] >= earlier.samples[name, labels], name
        assert seen[-1]["vllm:generation_tokens_total"] == 9 * 20
        assert seen[-1]["vllm:prefix_cache_queries_total"] == seen[-1]["vllm:prompt_tokens_total"]
        assert seen[-1]["vllm:engine_steps_total"] >= 9 * 20 / 3
        assert all(name.startswith(("vllm:", "process_")) for name in seen[-1].kinds)


def test_clients_words_are_in_no_label(server):
    hostile = 'zzz"} 1\nhasten_engine_up 0\n'
    with httpx.Client(base_url=server.url) as client:
        for path in ("/zzz-1", "/v1/models/zzz-2", "/v1/zzz-3%0A", "/metrics/zzz", "/%22zzz"):
            client.get(path)
        client.request("ZZZ", "/v1/completions")
        client.get("/health", headers={"traceparent": "zzz", "x-request-id": "zzz", "user-agent": hostile[:3]})
        client.post("/v1/completions", json={"prompt": hostile, "model": hostile, "user": "zzz"})
        client.post("/v1/completions", json={"prompt": hostile, "user": "zzz", "max_tokens": 1})
        text = client.get("/metrics").text
    assert "zzz" not in text
    assert text.count('hasten_engine_up{model_name="code-8m"}') == 1
    found = scrape(server.url)
    routes = {value for value in found.labels("hasten_http_requests_total") if value.startswith("/")}
    assert routes <= {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name:path}", "/tokenize", "/detokenize", "/health", "/ready",
        "/metrics", "/openapi.json", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/embeddings",
    }  # fmt: skip
    assert "/v1/models/{name:path}" in routes
    assert found.of("hasten_http_requests_total", route="other", status="404") >= 3


def documented() -> dict[str, str]:
    """Types by name, as the page has them."""
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| (\w+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert len(dict(rows)) == len(rows) > 30
    return {name if name.startswith("process_") else f"hasten_{name}": kind for name, kind in rows}


def test_every_name_is_documented_and_every_documented_name_is_there(server):
    assert documented() == scrape(server.url).kinds


def test_a_key_is_asked_for_here_too(tmp_path):
    (tmp_path / "keys").write_text("alpha\n")
    with serving("code-8m", "--api-key-file", tmp_path / "keys") as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert scrape(server.url, headers={"authorization": "Bearer alpha"})["hasten_engine_up"] == 1
        found = scrape(server.url, headers={"authorization": "Bearer alpha"})
        assert found.of("hasten_http_requests_total", route="/metrics", status="401") == 1


@pytest.mark.parametrize("prefix", ["", "1x", "a-b", "a b", "ä", "a\n", "x" * 65, 'a{b="c"} 1\n#'])
def test_prefixes_that_begin_no_name(prefix):
    with pytest.raises(ConfigError, match="--metrics-prefix"):
        check_prefix(prefix)


def test_a_bad_prefix_is_one_line():
    assert_refused(run("serve", "code-8m", "--metrics-prefix", "9"), "--metrics-prefix", "'9'")


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_trace_is_in_the_log_and_in_the_answer(server):
    for sent, sampled in ((f"00-{TRACE}-{SPAN}-01", "01"), (f"00-{TRACE}-{SPAN}-00", "00")):
        answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}, headers={"traceparent": sent})
        id = answer.headers["x-request-id"]
        assert answer.headers["traceresponse"] == f"00-{TRACE}-{id}-{sampled}"
        line = server.until(lambda id=id: next((line for line in list(server.lines) if id in line), None), 5)
        assert f"trace {TRACE}" in line
        assert re.search(r"1 → 2 tokens  queued \d\.\d{3} s  first \d\.\d{3} s  total \d\.\d{3} s", line)
    refused = server.post("/v1/completions", {}, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert refused.status_code == 400
    assert TRACE in refused.headers["traceresponse"]
    new = [server.post("/v1/completions", {}, headers={"traceparent": f"01{TRACE}"}).headers["traceresponse"] for _ in range(2)]
    assert new[0][:35] != new[1][:35]
    assert not any(TRACE in one for one in new)


def test_systemd_is_told_and_the_log_is_json(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        with serving("code-8m", "--log-json", env={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as server:
            assert manager.recv(100) == b"READY=1"
            answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
            assert answer.status_code == 200
            assert server.stop() == 0
            assert manager.recv(100) == b"STOPPING=1"
        lines = [json.loads(line) for line in server.lines]
    (one,) = [line for line in lines if line.get("id") == answer.headers["x-request-id"]]
    assert (one["trace_id"], one["span_id"], one["parent_span_id"]) == (TRACE, one["id"], SPAN)
    assert (one["route"], one["status"], one["prompt_tokens"], one["output_tokens"]) == ("/v1/completions", 200, 1, 2)
    assert 0 <= one["queue_seconds"] <= one["first_token_seconds"] <= one["seconds"] < 60
    assert any("event" in line for line in lines)


def cpu_ns(pid: int) -> int:
    """Processor time of all threads of a process, as the scheduler counts it."""
    return sum(int(Path(one, "schedstat").read_text().split()[0]) for one in Path(f"/proc/{pid}/task").iterdir())


@pytest.mark.timed
def test_an_idle_server_uses_less_than_a_hundredth_of_a_core(server, record_property):
    settled(server)
    pids = [server.process.pid, server.engine_pid()]
    time.sleep(1.0)
    before, began = [*map(cpu_ns, pids)], time.monotonic()
    time.sleep(4.0)
    shares = [(cpu_ns(pid) - used) / 1e9 / (time.monotonic() - began) for pid, used in zip(pids, before)]
    record_property("shares", shares)
    assert min(shares) > 0  # the counters count
    assert sum(shares) < 0.01, shares
