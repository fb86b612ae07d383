"""What is malformed, out of range or too large: 4xx that names the field, on every route, and a server that goes on as before."""

import asyncio
import gzip
import http.client
import json
import socket
import time
from unittest.mock import Mock
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from hasten.serve.http import Http
from tests.serve.scrape import scrape

GOOD = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
}
HUGE = 2**63
INTS = [-1, HUGE, 10**30, 1.5, "1", True, [1], {"a": 1}]
REALS = [-1e9, 1e9, HUGE, "0.5", True, [0.5], {}]
TEXTS = [1, True, ["x"], {}]
LONG = list(range(500_000))
FIELDS = {
    "max_tokens": [*INTS, 0], "n": [*INTS, 0, 65], "temperature": REALS, "top_p": [*REALS, 1.01], "min_p": [*REALS, 1.01],
    "top_k": [*INTS, None], "seed": INTS, "presence_penalty": [*REALS, 2.01], "frequency_penalty": [*REALS, -2.01],
    "repetition_penalty": [*REALS, 0, None], "min_tokens": [*INTS, 2], "stop": [1, True, {}, [1], [""], "", ["x"] * 65, "x" * 1025, LONG],
    "stop_token_ids": [1, "1", [-1], [HUGE], [1.5], ["1"], [2**31], LONG, [10**6]],
    "logit_bias": [1, [1], {"x": 1}, {"1": "1"}, {"-1": 1}, {"1": 101}, {str(HUGE): 1}, {"1": True}, {"1000000": 1}],
    "stream": [1, "true", []], "stream_options": [1, [], {"include_usage": 1}, {"what": True}],
    "response_format": [1, "json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 1}}],
    "user": TEXTS, "model": TEXTS, "regex": [*TEXTS, "", "x" * 200_000], "grammar": [*TEXTS, ""],
    "choices": ["x", [], [1], [""], ["x"] * 1025],
    "beam_width": [*INTS, 0, 65, 9], "ignore_eos": [1, "x", None], "prompt_logprobs": [*INTS, 129], "timeout_s": [0, -1, "1", True, 1e9],
    "no_such_field": [None, 1],
    "metadata": [1, ["x"], {"a": 1}, {str(place): "x" for place in range(1025)}],
}  # fmt: skip
OWN = {
    "/v1/completions": {
        "prompt": [None, 1, True, {}, [], [[]], [1.5], [-1], [HUGE], [[1], 2], ["x", 1], [True], [10**6], LONG, ["x"] * 257],
        "logprobs": [*INTS, 129], "best_of": [*INTS, 0, 65], "echo": [1, "x"], "suffix": ["x", 1],
    },
    "/v1/chat/completions": {
        "messages": [
            None, "x", [], [1], [{}], [{"role": "user"}], [{"role": "USER ", "content": "x"}], [{"role": "user", "content": 1}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": "http://169.254.169.254/"}]}],
            [{"role": "user", "content": "x", "what": 1}], [{"role": "user", "content": "x"}] * 4097,
        ],
        "logprobs": [1, "x", []], "top_logprobs": [*INTS, 21, 1], "max_completion_tokens": [-1, 0, 1.5, "1", True, [1], {"a": 1}],
        "tools": [1, [1], [{}], {}], "tool_choice": [1, "any", {}, "required"],
        "chat_template": ["{{ 7*7 }}"],
        "chat_template_kwargs": [{}],
    },
}  # fmt: skip
MUST_FAIL = [
    (route, field, value) for route in GOOD for field, values in {**FIELDS, **OWN[route]}.items() for value in values
]  # fmt: skip


@pytest.mark.row("numbers and lists", "boundary table")
@pytest.mark.parametrize("route", GOOD)
def test_every_field_is_bounded_and_named(route, server):
    asked = [(field, value) for where, field, value in MUST_FAIL if where == route]
    assert len(asked) > 150
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.post(route, json=GOOD[route]).status_code == 200
        for field, value in asked:
            answer = client.post(route, json={**GOOD[route], field: value})
            told = answer.json()["error"]
            assert 400 <= answer.status_code < 500, (field, str(value)[:60], answer.text[:300])
            assert field in {told["param"] or "", (told["param"] or "").split("[")[0].split(".")[0]} or field in told["message"], (
                field,
                told,
            )
            assert told["type"] in {"invalid_request_error", "not_found_error"}
            assert len(told["message"]) < 1000
        assert client.post(route, json=GOOD[route]).status_code == 200


TEXT_ROUTES = {
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
TEXT_FIELDS = {
    "/tokenize": {
        "prompt": [1, True, ["x"], {}], "messages": [[], [1], "x", [{"role": "user", "content": "x"}]], "add_special_tokens": [1, "x"],
    },
    "/detokenize": {"tokens": [None, 1, "x", [-1], [1.5], [HUGE], [10**6], ["1"], {}], "skip_special_tokens": [1, "x"]},
}  # fmt: skip


@pytest.mark.parametrize("route", TEXT_ROUTES)
def test_every_field_of_the_text_routes_too(route, server):
    for field, values in {**TEXT_FIELDS[route], "model": TEXTS, "no_such_field": [None, 1]}.items():
        for value in values:
            answer = server.post(route, {**TEXT_ROUTES[route], field: value})
            assert 400 <= answer.status_code < 500, (field, value)
            assert field in answer.json()["error"]["message"], (field, value, answer.text)
    assert server.post(route, TEXT_ROUTES[route]).status_code == 200
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


RAW = {
    "nothing": b"", "no JSON": b"{", "not UTF-8": b'{"prompt": "\xff"}', "half a surrogate": b'{"prompt": "\\ud800"}',
    "a list": b"[]", "a text": b'"x"',
    "NaN": b'{"prompt": "x", "temperature": NaN}', "infinity": b'{"prompt": "x", "temperature": 1e999}', "deep": b"[" * 100_000,
    "deep inside": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "many objects": b'{"prompt": "x", "metadata": [' + b"{}," * 100_000 + b"{}]}",
    "many names": b"{" + b",".join(b'"%x":1' % place for place in range(200_000)) + b"}",
    "deep objects": b'{"response_format":' * 3000 + b"1" + b"}" * 3000,
    "a pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
}  # fmt: skip


@pytest.mark.row("payloads and cancels", "compressed, deep and chunked")
@pytest.mark.parametrize("path", [*GOOD, "/tokenize", "/detokenize", "/v1/responses", "/v1/embeddings"])
def test_bodies_that_are_none(path, server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for name, raw in RAW.items():
            answer = client.post(path, content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert client.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        zipped = {"content-type": "application/json", "content-encoding": "gzip"}
        assert client.post(path, content=gzip.compress(b" " * 10_000_000), headers=zipped).status_code == 415
        assert client.post(path, content=b" " * (4 << 20) + b"{}", headers={"content-type": "application/json"}).status_code == 413
        pieces = (b" " * 65536 for _ in range(128))  # no length is told
        assert client.post(path, content=pieces, headers={"content-type": "application/json"}).status_code == 413


def test_texts_may_be_full_of_brackets(server):
    for text in ('{"a": [' * 40_000, '\\"{' * 60_000, "\\\\" + '"[:' * 60_000):
        answer = server.post("/tokenize", {"prompt": text})
        assert answer.status_code == 200, answer.text[:200]
        assert server.post("/detokenize", {"tokens": answer.json()["tokens"], "skip_special_tokens": True}).json()["prompt"] == text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v1/models/../health", 404),
        ("GET", "/docs", 404), ("POST", "/v1/completions/", 404), ("GET", "/v1//models", 404), ("DELETE", "/health", 415),
        ("GET", "/v1/models/other", 404), ("GET", "/" + "x" * 3000, 414),
    ],
)  # fmt: skip
def test_paths_that_are_none(method, path, status, server):
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    connection.request(method, path, headers={"content-type": "application/json"} if method == "POST" else {})
    answer = connection.getresponse()
    assert answer.status == status
    assert json.loads(answer.read())["error"]["message"]


@pytest.mark.row("http and keys", "headers are bounded")
def test_headers_are_bounded(server):
    answer = httpx.get(f"{server.url}/health", headers={"x": "y" * (1 << 20)})
    assert (answer.status_code, answer.json()["error"]["type"]) == (431, "invalid_request_error")
    assert httpx.get(f"{server.url}/health", headers=[(f"x{i}", "y") for i in range(200)]).status_code == 431


@pytest.mark.parametrize(("path", "outer"), [("/v1/messages", {"type", "error"}), ("/v1/completions", {"error"})])
def test_what_is_no_request_is_told_so_in_the_words_of_its_api(path, outer, server):
    place = urlsplit(server.url)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n".encode()
    for sent, status in (
        (head + b"no header\r\n\r\n", 400),
        (head + b"x: " + b"y" * (1 << 20), 431),
        (head + b"content-length: x\r\n\r\n", 400),
    ):
        with socket.create_connection((place.hostname, place.port), timeout=10) as client:
            client.sendall(sent)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert (answer.status, set(json.loads(answer.read()))) == (status, outer)


@pytest.mark.timed
def test_who_sends_the_next_request_early_and_goes_is_noticed(server):
    place = urlsplit(server.url)
    body = json.dumps({"prompt": [5, 6], "max_tokens": 1900, "ignore_eos": True, "n": 8}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    for together in (True, False):
        with socket.create_connection((place.hostname, place.port), timeout=10) as client:
            client.sendall(head + body + b"GET /health HTTP/1.1\r\n" * together)
            server.until(lambda: scrape(server.url)["hasten_num_requests_running"], 10)
            client.sendall(b"host: localhost\r\n\r\n")
        began = time.monotonic()
        server.until(lambda: not scrape(server.url)["hasten_num_requests_running"], 10)
        assert time.monotonic() - began < 1.0


def test_who_sends_the_next_request_early_gets_one_answer(server):
    place = urlsplit(server.url)
    body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection((place.hostname, place.port), timeout=10) as client:
        client.sendall(2 * (head + body))
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert (answer.status, len(json.loads(answer.read())["choices"])) == (200, 1)
        assert client.recv(1) == b""


@pytest.mark.row("http and keys", "names of the host")
def test_a_name_of_somebody_elses_is_refused(server):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 403, host
    for host in ("localhost:1", "127.0.0.1", "[::1]:9", "LOCALHOST"):
        assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200, host


@pytest.mark.row("request ids and state", "server-made ids")
def test_a_clients_request_id_is_not_taken(server):
    for id in ("x\r\ny: z", "a" * 200, "1"):
        with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=5) as client:
            client.sendall(f"GET /health HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\n\r\n".encode())
            assert f"x-request-id: {id}\r\n".encode() not in client.recv(65536)


@pytest.mark.timed
def test_a_hundred_idle_sockets_change_nothing(server):
    place = urlsplit(server.url)
    idle = [socket.create_connection((place.hostname, place.port)) for _ in range(100)]
    for one in idle[:50]:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
    began = time.monotonic()
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
    assert time.monotonic() - began < 2
    for one in idle:
        one.close()


@pytest.mark.row("http and keys", "headers are bounded")
def test_half_a_head_is_not_waited_for_for_ever():
    """By a clock of the test's own making: the protocol without a network."""

    async def trickle() -> list[bool]:
        closed = []
        loop = asyncio.get_running_loop()
        for sent in (b"", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"):
            config = uvicorn.Config(waits, http=Http, lifespan="off", log_config=None)
            config.load()
            made = Http(config, ServerState(), {}, loop)
            transport = Mock(asyncio.Transport)
            transport.get_extra_info.return_value = None
            transport.is_closing.return_value = False
            made.connection_made(transport)
            if sent:
                made.data_received(sent)
            if made._limit is not None:
                assert made._limit.when() - loop.time() < 21
                made._late()
            closed.append(transport.close.called)
        return closed

    async def waits(scope, receive, send) -> None:
        await asyncio.sleep(60)

    assert asyncio.run(trickle()) == [True, True, False]
