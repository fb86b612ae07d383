"""Malformed requests against one server, as many as asked: half made by schemathesis from the server's own OpenAPI description, half valid
bodies with bytes flipped, cut, spliced, and values of other types, depths and sizes put in. Nothing that breaks something is left out.

No answer may be a 5xx, but a 503 with Retry-After, and a 504 where the request sets a time of its own; no engine may end; no page may be
lost; the server must answer afterwards as it did before."""

import collections
import contextlib
import copy
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import requests as sender
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from benchmarks.ledger import Ledger
from tests.serve.scrape import scrape
from tests.serve.server import Server
from tests.soak.determinism import Difference

PER_CHUNK = 500
CONTEXT = 96
"""Tokens of the served model's context, so that what is answered after all is answered soon."""
SLOW_S = 10.0
KNOWN = {"prompt": "def f(x):\n", "max_tokens": 24, "temperature": 0}
CHAT = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": [{"type": "text", "text": "A lööp 🙂"}]}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"], "additionalProperties": False}
FUNCTION = {"name": "look_up", "description": "Looks.", "parameters": SCHEMA}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"a": 1}'}}
SAMPLED = {
    "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "stop": ["\n\n"], "seed": 1,
    "logit_bias": {"5": 1.0},
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [7], "timeout_s": 9,
    "stream": True, "stream_options": {"include_usage": True}, "metadata": {"a": "b"}, "prompt_logprobs": 1, "user": "me",
}  # fmt: skip
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": ["x", [1, 2, 3]], "logprobs": 2, "echo": True, "best_of": 3, **SAMPLED, "stream": False}),
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 3, "regex": "[ab]{1,3}|é+", "temperature": 0}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 3, "grammar": 'start: "a" | /[b-d]{2}/', "ignore_eos": False}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 3, "beam_width": 3, "length_penalty": 0.5, "early_stopping": "never",
    "temperature": 0}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 3, "choices": ["ab", "é"]}),
    ("/v1/chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 2, **SAMPLED}),
    ("/v1/chat/completions", {
        "messages": [*CHAT, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "2"}],
        "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required", "max_completion_tokens": 40,
    }),
    ("/v1/chat/completions", {
        "messages": CHAT, "max_tokens": 20, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    }),
    ("/v1/responses", {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]}, {"type": "function_call", "call_id": "1", "name": "f",
            "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "2"},
        ],
        "instructions": "Write.", "max_output_tokens": 5, "stream": True, "tools": [{"type": "function", **FUNCTION}],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, "metadata": {"a": "b"}, "temperature": 0.5,
    }),
    ("/v1/messages", {
        "max_tokens": 5, "system": [{"type": "text", "text": "Write."}], "stop_sequences": ["\n"], "top_k": 3, "stream": True,
        "messages": [
            {"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "look_up",
            "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "2"}]},
        ],
        "tools": [{"name": "look_up", "input_schema": SCHEMA}], "tool_choice": {"type": "auto"},
    }),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}], "system": "y"}),
    ("/v1/embeddings", {"input": ["x", [1, 2]], "encoding_format": "base64", "user": "me", "timeout_s": 9}),
    ("/tokenize", {"messages": CHAT, "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [1, 2, 300], "skip_special_tokens": True}),
]  # fmt: skip
ODD = [
    None, True, False, 0, -1, 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e308, 5e-324, "", "x", "é🙂",
    "\x00", "\ud800",
    "x" * 70_000, "(" * 30_000, "(a+)+$", [], [[]], [None], {}, {"type": "text"}, {"$ref": "#"}, {"type": "object", "properties": {}},
    [0] * 5000,
    {"a" * 300: 1}, "__proto__", "{{ 7 * 7 }}", "../../etc/passwd", "null", "NaN",
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One request, as bytes."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Served:
    """A server, and what it answers to KNOWN."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory()
        os.environ["HASTEN_CACHE"] = self._kept.name
        self.server = Server("code-8m", "--max-sequences", "8", "--max-waiting", "64", "--max-model-len", str(CONTEXT))
        self.server.until(self.server.ready)
        self.answer = self.server.post("/v1/completions", KNOWN).json()["choices"]
        self.document = httpx.get(f"{self.server.url}/openapi.json").json()

    def end(self) -> None:
        """However it went."""
        self.server.process.kill()
        self.server.process.wait()
        self._kept.cleanup()


def made_by_schemathesis(document: dict[str, Any], count: int, seed: int) -> list[Asked]:
    """So many, most of them of what the description does not allow, from all operations in turn."""
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    each, asked = -(-count // len(operations)), list[Asked]()
    for place, operation in enumerate(operations):
        for mode, share in ((GenerationMode.NEGATIVE, each - each // 4), (GenerationMode.POSITIVE, each // 4)):

            @seeded(seed * 1000 + place)
            @settings(
                max_examples=max(1, share),
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def take(case: schemathesis.Case) -> None:
                asked.append(_of(case))

            with contextlib.suppress(Unsatisfiable):  # nothing of a bare GET can be wrong
                take()
    random.Random(seed).shuffle(asked)
    return asked[:count]


def _of(case: schemathesis.Case) -> Asked:
    given = case.as_transport_kwargs(base_url="http://server")
    names = ("method", "url", "headers", "params", "cookies", "json", "data", "files")
    ready = sender.Request(**{name: value for name, value in given.items() if name in names}).prepare()
    body = ready.body or b""
    headers = {name: value if isinstance(value, str) else value.decode("latin-1") for name, value in ready.headers.items()}
    return Asked(ready.method or "GET", ready.path_url, headers, body.encode() if isinstance(body, str) else bytes(body))


def mutated(chance: random.Random) -> Asked:
    """A valid body with something done to it, as JSON or as bytes."""
    path, body = chance.choice(VALID)
    value = copy.deepcopy(body)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        _change(value, chance)
    raw = bytearray(json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass"))
    if chance.random() < 0.45:
        for _ in range(chance.choice((1, 1, 2, 5))):
            _damage(raw, chance)
    headers = {"content-type": "application/json"}
    if chance.random() < 0.03:
        headers |= chance.choice([
            {"content-type": "text/plain"},
            {"content-encoding": "gzip"},
            {"x-request-id": "\t" * 50},
            {"traceparent": "00-x"},
        ])
    return Asked("POST", path, headers, bytes(raw))


def _change(value: Any, chance: random.Random) -> None:
    """One place of a JSON value, somewhere in it."""
    holder = chance.choice(list(_holders(value)))
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return
    key = chance.choice(keys)
    match chance.randrange(6):
        case 0 | 1:
            holder[key] = copy.deepcopy(chance.choice(ODD))
        case 2:
            del holder[key]
        case 3:
            for _ in range(chance.choice((1, 2, 60, 400))):
                holder[key] = [holder[key]] if chance.random() < 0.5 else {"a": holder[key]}
        case 4:
            if isinstance(holder, dict):
                holder[chance.choice((str(key) + "s", str(key).upper(), "extra_body", "schema", "type"))] = holder.pop(key)
            else:
                holder *= chance.choice((2, 30, 300))
        case 5:
            path, other = chance.choice(VALID)
            holder[key] = copy.deepcopy(chance.choice(list(other.values())))


def _holders(value: Any) -> Iterator[Any]:
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict | list):
            yield one
            todo += one.values() if isinstance(one, dict) else one


def _damage(raw: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(raw) + 1)
    match chance.randrange(6):
        case 0:
            del raw[at:]
        case 1 if raw:
            raw[at % len(raw)] ^= 1 << chance.randrange(8)
        case 2:
            raw[at:at] = bytes(chance.choices(b'{}[]",:0123456789-.eE\\u\x00\xff \n', k=chance.randrange(1, 9)))
        case 3:
            del raw[at : at + chance.randrange(1, 20)]
        case 4:
            other = chance.randrange(len(raw) + 1)
            raw[at:at] = raw[other : other + chance.randrange(1, 80)]
        case _:
            raw[at:at] = chance.choice((b"[" * 5000, b'{"a":' * 2000, b"9" * 400, b"1e999", b"NaN", b"\xed\xa0\x80", b"\\ud83d"))


def run_chunk(served: Served, number: int, count: int, seed: int) -> dict[str, Any]:
    """``count`` requests drawn from ``seed`` and ``number``, and what came of them. Raises Difference with the first that is wrong."""
    chance, server = random.Random(f"{seed} {number}"), served.server
    engine, statuses, slowest, seen = server.engine_pid(), collections.Counter[int](), 0.0, len(server.lines)
    asked = made_by_schemathesis(served.document, count // 2, seed * 10_000 + number)
    asked += [mutated(chance) for _ in range(count - len(asked))]
    chance.shuffle(asked)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for one in asked:
            began = time.monotonic()
            try:
                answer = client.request(one.method, one.path, headers=one.headers, content=one.body)
            except httpx.LocalProtocolError:  # what HTTP cannot say was never sent
                statuses[0] += 1
                continue
            except httpx.HTTPError as error:
                raise Difference(f"{one}: no answer: {type(error).__name__} {error}") from None
            statuses[answer.status_code] += 1
            slowest = max(slowest, time.monotonic() - began)
            if why := wrong(one, answer):
                raise Difference(f"{why}: {one}: {answer.text[:500]}")
        if slowest > SLOW_S:
            raise Difference(f"an answer took {slowest:.1f} s; {SLOW_S:g} s are allowed")
        again = client.post("/v1/completions", json=KNOWN).json().get("choices")
    if again != served.answer:
        raise Difference(f"the server answers {again} after them, {served.answer} before")
    if server.engine_pid() != engine:
        raise Difference("the engine's process is another one after them")
    counted = settled(server)
    for name in (
        "hasten_num_requests_running",
        "hasten_num_requests_waiting",
        "hasten_kv_cache_usage_perc",
        "hasten_engine_restarts_total",
    ):
        if counted[name]:
            raise Difference(f"{name} is {counted[name]} after them")
    if traced := [line for line in server.lines[seen:] if "Traceback" in line]:
        raise Difference(f"the log has a traceback: {server.lines[server.lines.index(traced[0]) :][:30]}")
    if sum(statuses[status] for status in range(400, 500)) < len(asked) // 2 or not statuses[200]:
        raise Difference(f"few were malformed, or none was not: {dict(statuses)}")
    paths = sorted({one.path.partition("?")[0] for one in asked})
    found = {str(status): times for status, times in sorted(statuses.items())}
    return {"requests": len(asked), "paths": paths, "statuses": found, "slowest_s": slowest}


def settled(server: Server) -> Any:
    """What the server counts once the engine has nothing to do, or after two seconds."""
    end = time.monotonic() + 2
    while (found := scrape(server.url))["hasten_num_requests_running"] + found["hasten_kv_cache_usage_perc"] and time.monotonic() < end:
        time.sleep(0.05)
    return found


def wrong(asked: Asked, answer: httpx.Response) -> str:
    """What is wrong with an answer; '' where nothing is."""
    status = answer.status_code
    if status == 503:
        return "" if answer.headers.get("retry-after") else "a 503 without Retry-After"
    if status >= 500:
        return "" if status == 504 and b"timeout_s" in asked.body else f"status {status}"
    if status >= 400:
        try:
            said = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = ""
        return "" if said or asked.method == "HEAD" else "an error that does not say what is wrong"
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        failed = [line for line in answer.text.split("\n") if '"server_error"' in line or '"api_error"' in line]
        return f"a stream that ends with {failed[0][:300]}" if failed and b"timeout_s" not in asked.body else ""
    return ""


def requests(ledger: Ledger, digest: str, count: int, seed: int) -> None:
    """Malformed requests, a chunk after the other against one server; raises Difference."""
    served, statuses, slowest = None, collections.Counter[str](), 0.0
    try:
        for number in range(-(-count // PER_CHUNK)):
            key = ("requests", digest, PER_CHUNK, number, seed)
            kept = ledger.get(*key)
            if kept is None:
                served = served or Served()
                kept = run_chunk(served, number, PER_CHUNK, seed)
                ledger.note(*key, value=kept)
                print(f"requests, {(number + 1) * PER_CHUNK:,} of {count:,}: {kept['statuses']}", flush=True)
            statuses.update(kept["statuses"])
            slowest = max(slowest, kept["slowest_s"])
    finally:
        if served is not None:
            served.end()
    print(f"\nrequests, {statuses.total():,}, most of them malformed: answers by status; 0 is what HTTP cannot say, and was not sent")
    print(", ".join(f"{status}: {times:,}" for status, times in sorted(statuses.items())))
    print(f"0 engines ended, 0 pages lost, the slowest answer took {slowest:.2f} s")
