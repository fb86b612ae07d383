"""The response cache behind HTTP: what it answers is, byte for byte, what is computed, and nothing else is answered from it."""

import json
import os
import re
import signal
import time

import httpx
import numpy as np
import pytest

from hasten.serve.responses import HEADER
from tests.cli import assert_refused, main, run
from tests.serve.redis_server import RedisServer
from tests.serve.scrape import scrape
from tests.serve.server import Server, events, serving

CLIENT = httpx.Client(timeout=60, trust_env=False)  # making one takes longer than most answers
PROMPT = "def read_config(path):\n"
GREEDY = {"temperature": 0, "max_tokens": 16}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OF_BOTH = {
    "greedy": GREEDY,
    "three": {"seed": 7, "max_tokens": 12, "n": 3},
    "stop": {"temperature": 0, "max_tokens": 60, "stop": ["\n\n", "return"]},
    "schema": {**GREEDY, "max_tokens": 40, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "regex": {"seed": 3, "max_tokens": 20, "regex": "[0-9]{3}"},
    "ids": {**GREEDY, "max_tokens": 14, "return_token_ids": True},  # of another length than the first, whose answer it would get
    "prompt logprobs": {**GREEDY, "max_tokens": 3, "prompt_logprobs": 1},
    "beams": {"max_tokens": 8, "n": 2, "beam_width": 4},
}
OF_COMPLETIONS = {
    "logprobs": {**GREEDY, "logprobs": 3},
    "echo": {**GREEDY, "echo": True, "logprobs": 2},
    "best": {"seed": 3, "max_tokens": 8, "n": 2, "best_of": 4},
    "many": {**GREEDY, "seed": 5, "temperature": 1.0, "n": 2, "prompt": [PROMPT, [5, 6, 7], "x"]},
    "one token": {**GREEDY, "prompt": [9], "prompt_logprobs": 1, "echo": True, "logprobs": 1},
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
OF_CHATS = {
    "logprobs": {**GREEDY, "logprobs": True, "top_logprobs": 3},
    "tool": {**GREEDY, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"},
}
ASKED = [("/v1/completions", {"prompt": PROMPT, **body}) for body in [*OF_BOTH.values(), *OF_COMPLETIONS.values()]]
ASKED += [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "add two numbers"}], **body})
    for body in [*OF_BOTH.values(), *OF_CHATS.values()]
]


@pytest.fixture(scope="module")
def cached():
    with serving("code-8m", "--max-sequences", "4", "--max-waiting", "64", "--response-cache", "memory", "--log-json") as running:
        is_open(running)
        yield running
        assert running.stop() == 0


def is_open(server) -> None:
    until_said(server, "response cache is open")


def until_said(server, words: str) -> None:
    server.until(lambda: any(words in line for line in server.lines))


def ask(server, path: str, body: dict, **settings) -> tuple[str | None, bytes]:
    """The header of the cache, and the body without what is another's each time."""
    answer = CLIENT.post(server.url + path, json=body, **settings)
    assert answer.status_code == 200, answer.text
    return answer.headers.get(HEADER), re.sub(rb'"id":"(chat)?cmpl-\w+"|"id":"call_\w+"|"created":\d+', b"", answer.content)


def joined(parts: list) -> object:
    """A stream's values for one field as one value."""
    parts = [part for part in parts if part is not None]
    if not parts:
        return None
    if isinstance(parts[0], str):
        return "".join(parts)
    if isinstance(parts[0], list):
        return [one for part in parts for one in part]
    if isinstance(parts[0], dict):
        return {name: joined([part.get(name) for part in parts]) for name in sorted({name for part in parts for name in part})}
    return parts


def streamed(server, path: str, body: dict) -> tuple[str | None, int, object]:
    """The header, how many events came, and what they come to, by choice."""
    header, raw = ask(server, path, {**body, "stream": True, "stream_options": {"include_usage": True}})
    found = events(raw.decode().replace("{,", "{").replace(",,", ","))
    choices = [choice for event in found for choice in event["choices"]]
    whole = {
        index: joined([{k: v for k, v in choice.items() if k != "index"} for choice in choices if choice["index"] == index])
        for index in sorted({choice["index"] for choice in choices})
    }
    return header, len(found), [whole, [event["usage"] for event in found if event["usage"]]]


@pytest.mark.parametrize(("path", "body"), ASKED, ids=[f"{path[4:]} {i}" for i, (path, _) in enumerate(ASKED)])
def test_a_hit_is_what_is_computed(path, body, server, cached):
    """`server` has no cache."""
    computed, streaming = ask(server, path, body), streamed(server, path, body)
    assert computed[0] is streaming[0] is None
    first, second = ask(cached, path, body), until_hit(cached, path, body)
    assert first == computed
    assert second == ("exact", computed[1])
    again = streamed(cached, path, body)
    assert again[0] == "exact"
    assert again[2] == streaming[2]
    if len(json.dumps(streaming[2])) > 300:
        assert again[1] <= streaming[1]


OF_OTHERS = [
    ("/v1/messages", {"max_tokens": 16, "temperature": 0, "messages": [{"role": "user", "content": "add three numbers"}]}),
    ("/v1/messages", {"max_tokens": 50, "temperature": 0, "stop_sequences": ["e"], "messages": [{"role": "user", "content": "a list"}]}),
    (
        "/v1/messages",
        {
            "max_tokens": 60, "temperature": 0, "messages": [{"role": "user", "content": "add 1"}], "tool_choice": {"type": "any"},
            "tools": [{"name": "add", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}],
        },
    ),
    ("/v1/responses", {"input": "add four numbers", "max_output_tokens": 16, "temperature": 0}),
    (
        "/v1/responses",
        {
            "input": "a", "max_output_tokens": 40, "temperature": 0,
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        },
    ),
]  # fmt: skip
EACH_TIME = re.compile(r'"(id|item_id|call_id|created_at|completed_at|sequence_number)":("[^"]*"|[0-9.]+),?')


@pytest.mark.timed
@pytest.mark.parametrize(("path", "body"), OF_OTHERS, ids=[f"{path[4:]} {i}" for i, (path, _) in enumerate(OF_OTHERS)])
def test_a_hit_is_what_is_computed_under_other_apis_too(path, body, server, cached):
    def told(on, **more) -> tuple[str | None, str]:
        answer = CLIENT.post(on.url + path, json={**body, **more})
        assert answer.status_code == 200, answer.text
        return answer.headers.get(HEADER), EACH_TIME.sub("", answer.text)

    header, computed = told(server)
    assert header is None
    assert told(cached) == (None, computed)
    end = time.monotonic() + 2
    while (second := told(cached))[0] is None:
        assert time.monotonic() < end
    assert second == ("exact", computed)
    streaming, again = told(server, stream=True), told(cached, stream=True)
    assert (streaming[0], again[0]) == (None, "exact")
    assert spoken(again[1]) == spoken(streaming[1])
    assert spoken(again[1])[0]


def spoken(stream: str) -> tuple[str, dict]:
    """What a stream's pieces come to, and its last event that holds everything or how it ended."""
    found = [
        json.loads(line.removeprefix("data: ").replace("{,", "{").replace(",}", "}")) for line in stream.splitlines() if "data: {" in line
    ]
    deltas = [event["delta"] for event in found if "delta" in event]
    pieces = [delta if isinstance(delta, str) else delta.get("text", "") + delta.get("partial_json", "") for delta in deltas]
    return "".join(pieces), next(
        event for event in reversed(found) if event["type"] in {"message_delta", "response.completed", "response.incomplete"}
    )


def until_hit(server, path: str, body: dict, seconds: float = 2.0, **settings) -> tuple[str | None, bytes]:
    """Nobody waits for an answer to be kept, so it may take a moment."""
    end = time.monotonic() + seconds
    while (found := ask(server, path, body, **settings))[0] is None:
        assert time.monotonic() < end
    return found


def test_what_was_streamed_is_kept_too(server, cached):
    body = {**GREEDY, "prompt": "streamed first", "logprobs": 1}
    assert streamed(cached, "/v1/completions", body)[0] is None
    assert until_hit(cached, "/v1/completions", body) == ("exact", ask(server, "/v1/completions", body)[1])


def test_what_need_not_come_again_is_computed(cached):
    for body in ({"prompt": PROMPT, "max_tokens": 4}, {"prompt": PROMPT, "max_tokens": 4, "temperature": 0.5, "n": 2}):
        assert [ask(cached, "/v1/completions", body)[0] for _ in range(3)] == [None] * 3


def test_two_hundred_near_misses(server, cached):
    rng = np.random.default_rng(11)
    base = {"prompt": list(range(20, 40)), "max_tokens": 4, "temperature": 1.0, "seed": 9, "logprobs": 1}
    ask(cached, "/v1/completions", base)
    until_hit(cached, "/v1/completions", base)
    changes = {
        "max_tokens": [3, 5], "temperature": [0.9, 1.1, 0], "top_p": [0.9, 0.5], "top_k": [5, 50], "min_p": [0.01], "seed": [8, 10, 90],
        "logprobs": [0, 2], "stop": [["q"], "zz"], "presence_penalty": [0.1], "frequency_penalty": [-0.1], "repetition_penalty": [1.1],
        "logit_bias": [{"5": 1}], "n": [2], "echo": [True], "ignore_eos": [True], "min_tokens": [1], "prompt_logprobs": [0],
        "stop_token_ids": [[4]], "regex": ["[a-z]+"], "best_of": [2],
    }  # fmt: skip
    seen = set()
    while len(seen) < 200:
        body = dict(base)
        if rng.random() < 0.3:
            name = str(rng.choice(list(changes)))
            body[name] = changes[name][rng.integers(len(changes[name]))]
        else:
            tokens, at = list(base["prompt"]), int(rng.integers(20))
            match rng.integers(4):
                case 0:
                    tokens[at] ^= 1 << int(rng.integers(11))
                case 1:
                    tokens.insert(at, int(rng.integers(4000)))
                case 2:
                    del tokens[at]
                case 3:
                    tokens[at], tokens[0] = tokens[0], tokens[at]
            body["prompt"] = tokens
        key = json.dumps(body, sort_keys=True)
        if key in seen or body == base:
            if len(seen) > 40 and body["prompt"] == base["prompt"]:
                base["seed"] += 1000  # the parameters' changes are used up: begin from another request
            continue
        seen.add(key)
        header, answer = ask(cached, "/v1/completions", body)
        assert header is None, body
        if len(seen) % 8 == 0:
            assert answer == ask(server, "/v1/completions", body)[1]


def test_who_leaves_and_who_is_late_leave_nothing_behind(cached):
    long = {"prompt": "left behind", "max_tokens": 160, "ignore_eos": True, "temperature": 0}
    with httpx.stream("POST", f"{cached.url}/v1/completions", json={**long, "stream": True}, timeout=30) as answer:
        next(answer.iter_lines())
    late = cached.post("/v1/completions", {**long, "timeout_s": 0.02})
    assert late.status_code == 504
    wrong = {**GREEDY, "prompt": "x", "grammar": "start: %regex"}
    assert [cached.post("/v1/completions", wrong).status_code for _ in range(2)] == [400, 400]
    short = {**long, "max_tokens": 80}
    assert ask(cached, "/v1/completions", short)[0] is None
    assert ask(cached, "/v1/completions", long)[0] is None


def test_known_answers_need_no_engine(cached):
    body = {**GREEDY, "prompt": "needs no engine"}
    ask(cached, "/v1/completions", body)
    kept = until_hit(cached, "/v1/completions", body)
    os.kill(cached.engine_pid(), signal.SIGKILL)
    cached.until(lambda: not cached.ready())
    assert ask(cached, "/v1/completions", body) == kept
    refused = cached.post("/v1/completions", {**GREEDY, "prompt": "needs one"})
    sampled = cached.post("/v1/completions", {"prompt": "needs no engine"})
    assert (refused.status_code, sampled.status_code) == (503, 503)
    assert int(refused.headers["retry-after"]) >= 1
    cached.until(cached.ready)
    assert until_hit(cached, "/v1/completions", body) == kept  # once it is seen that the model is the same
    assert cached.post("/v1/completions", {**GREEDY, "prompt": "needs one"}).status_code == 200


@pytest.mark.timed
def test_the_log_and_metrics_say_so(cached):
    body = {**GREEDY, "prompt": "logged"}
    ask(cached, "/v1/completions", body)
    until_hit(cached, "/v1/completions", body)

    def last() -> dict | None:
        lines = [json.loads(line) for line in cached.lines if '"route": "/v1/completions"' in line]
        return lines[-1] if "cached" in lines[-1] else None

    found = cached.until(last, 5)
    assert found["cached"] == "exact"
    counted = scrape(cached.url)
    assert counted.of("hasten_response_cache_hits_total", kind="exact") > 0
    assert counted.of("hasten_response_cache_misses_total", kind="exact") > 0
    assert found["output_tokens"] == 16
    assert 0 < found["first_token_seconds"] <= found["seconds"] < 0.1


@pytest.mark.row("prefix cache", "no hit across tenants")
def test_tenants_share_nothing_and_the_environment_names_the_cache(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key-of-two\nsecond-key-of-two\n")
    one, other = ({"authorization": f"Bearer {name}-key-of-two"} for name in ("first", "second"))
    body = {**GREEDY, "prompt": "mine"}
    with serving("code-8m", "--api-key-file", keys, env={"HASTEN_RESPONSE_CACHE": "memory"}) as server:
        is_open(server)
        ask(server, "/v1/completions", body, headers=one)
        kept = until_hit(server, "/v1/completions", body, headers=one)
        assert ask(server, "/v1/completions", body, headers=other) == (None, kept[1])
        assert server.stop() == 0


@pytest.mark.timed
def test_two_servers_share_a_redis_that_dies_and_returns(tmp_path):
    redis = RedisServer(tmp_path)
    redis.start()
    settings = {"env": {"HASTEN_RESPONSE_CACHE": redis.url}}
    servers: list[Server] = []
    try:
        one, other = servers[:] = [Server("code-8m", **settings) for _ in range(2)]
        for server in servers:
            is_open(server)
        bodies = [{**GREEDY, "prompt": f"shared {i}"} for i in range(3)]
        computed = [ask(one, "/v1/completions", body) for body in bodies]
        assert [until_hit(other, "/v1/completions", body) for body in bodies] == [("exact", answer) for _, answer in computed]
        redis.kill()
        for server in servers:
            began = time.monotonic()
            assert [ask(server, "/v1/completions", body) for body in bodies] == computed
            assert time.monotonic() - began < 3
            until_said(server, "does not answer")
        redis.start()
        for body, answer in zip(bodies, computed):
            end = time.monotonic() + 15
            while ask(one, "/v1/completions", body)[0] is None:  # a write has to find out that it is there again
                assert time.monotonic() < end
                time.sleep(0.05)
            assert until_hit(other, "/v1/completions", body, 15) == ("exact", answer[1])
        assert [server.stop() for server in servers] == [0, 0]
    finally:
        redis.kill()
        for server in servers:
            server.process.kill()
            server.process.wait()


def test_warm_fills_a_server(cached, tmp_path):
    bodies = [{**GREEDY, "prompt": f"warmed {i}"} for i in range(5)]
    bodies += [{**GREEDY, "messages": [{"role": "user", "content": "warmed"}]}, {"prompt": "left out", "max_tokens": 2}]
    (tmp_path / "requests").write_text("\n".join(map(json.dumps, bodies)))
    first, second = (run("warm", tmp_path / "requests", "--url", cached.url) for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    assert "7 answers computed, 0 there already, 0 failed" in first.err
    assert "1 answers computed, 6 there already, 0 failed" in second.err
    assert ask(cached, "/v1/completions", bodies[2])[0] == "exact"


def test_bad_settings(monkeypatch, capsys):
    for value in ("disk", "redis:/x", "http://user:secret@x"):
        refused = main(monkeypatch, capsys, "serve", "code-8m", "--response-cache", value)
        assert_refused(refused, "response cache", "accepted: ")
        assert "secret" not in refused.err
    assert_refused(main(monkeypatch, capsys, "serve", "code-8m", "--response-cache-age", "0"), "seconds of the response cache is 0")
    assert_refused(main(monkeypatch, capsys, "serve", "code-8m", "--response-cache-bytes", "many"), "--response-cache-bytes")


@pytest.mark.timed
def test_answers_are_not_held_back_on_their_way(cached):
    """An answer is sent as head and body; with Nagle's algorithm the second waits 40 ms for the client to acknowledge the first."""
    body = {**GREEDY, "prompt": "at once"}
    ask(cached, "/v1/completions", body)
    until_hit(cached, "/v1/completions", body)
    times = []
    with httpx.Client(base_url=cached.url) as client:
        for _ in range(20):
            began = time.perf_counter()
            assert client.post("/v1/completions", json=body).headers[HEADER] == "exact"
            times.append(time.perf_counter() - began)
    assert sorted(times)[10] < 0.03
