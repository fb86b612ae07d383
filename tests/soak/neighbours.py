"""Hostile requests beside others, through the server: no byte of the others' answers changes."""

import asyncio
import json
import random
from collections import Counter

from hasten import load
from tests.serve.scrape import scrape
from tests.serve.server import Server
from tests.soak.watch import LATE_SHARE, Stalls, memory, require, until_rest
from tests.soak.wire import Wire, request

PLANNED = 128 << 20
"""Bytes that the engine is given."""
ARGUMENTS = ("code-8m", "--memory", str(PLANNED), "--max-sequences", "16", "--max-waiting", "512")
HOSTILE = 6
"""Clients that ask one hostile request after the other."""
TURNS = [{"role": "user", "content": "write a class that counts"}]
CANARIES = {
    "greedy": ("/v1/completions", {"prompt": "def f(x):\n", "max_tokens": 60, "temperature": 0, "logprobs": 3, "stream": True}),
    "seeded": ("/v1/completions", {"prompt": "class A:\n", "max_tokens": 60, "seed": 7, "logprobs": 2, "return_token_ids": True}),
    "two": ("/v1/completions", {"prompt": ["import os", [9, 8, 7]], "n": 2, "max_tokens": 40, "seed": 3, "temperature": 0.8, "top_p": 0.9}),
    "penalized": ("/v1/completions", {
        "prompt": "x = ", "max_tokens": 60, "seed": 5, "frequency_penalty": 0.7, "logit_bias": {"65": 4, "66": -100}, "stream": True,
    }),
    "regex": ("/v1/completions", {"prompt": "n = ", "max_tokens": 30, "seed": 11, "regex": "[0-9]{4,20}"}),
    "chat": ("/v1/chat/completions", {"messages": TURNS, "max_tokens": 50, "temperature": 0, "stream": True}),
    "messages": ("/v1/messages", {"messages": TURNS, "max_tokens": 50, "seed": 4, "model": "code-8m"}),
    "responses": ("/v1/responses", {"input": TURNS, "max_output_tokens": 50, "seed": 2}),
    "embedding": ("/v1/embeddings", {"input": ["def f(x):", "import os"]}),
}  # fmt: skip
OWN = {"id", "created", "created_at", "item_id", "object_id"}
"""What an answer has of its own each time."""


def hostile() -> list[tuple[str, dict, float | None]]:
    """Path, body, and after how many seconds the client leaves, if it does."""
    model = load("code-8m")
    tokens, width = len(model.text_tokenizer().vocabulary), model.spec.vocab
    edges = sorted({0, *(at + off for at in (tokens, width) for off in (-1, 0, 1)), 2**31 - 1, 2**31, 2**63, -1})
    fields: list[dict] = []
    for id in edges:
        fields += [{"logit_bias": {str(id): 100}}, {"logit_bias": {str(id): -100}}, {"stop_token_ids": [id]}]
    fields += [
        {"n": 64}, {"n": 10**9}, {"best_of": 64, "n": 1}, {"beam_width": 8}, {"beam_width": 10**6}, {"temperature": 1e-9, "top_p": 1e-9},
        {"temperature": 100.0, "min_p": 1.0}, {"top_k": 1, "repetition_penalty": 100.0},
        {"repetition_penalty": 0.01, "presence_penalty": -2.0}, {"min_tokens": 30, "stop": ["e", " ", "\n"]}, {"seed": 2**63},
        {"seed": 7, "logprobs": 128}, {"prompt_logprobs": 128}, {"timeout_s": 0.01}, {"stop_token_ids": list(range(1000))},
        {"logit_bias": {str(id): 100 for id in range(0, width, 30)}}, {"max_tokens": 10**9, "timeout_s": 0.5},
        {"regex": "(a+)+b"}, {"regex": "(" * 30_000}, {"regex": "(x{1,1000}){1,1000}"}, {"regex": "(.*a){25}"},
        {"grammar": "start: " + "(" * 30_000}, {"grammar": 'start: "a" start | "b"'}, {"grammar": "start: start start | start"},
        {"choices": ["a" * 1000 + str(place) for place in range(1000)]}, {"response_format": {"type": "json_object"}},
        *({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}} for schema in (
            _deep(200), {"$ref": "#"}, {"enum": list(range(20_000))},
        )),
    ]  # fmt: skip
    made: list[tuple[str, dict, float | None]] = [("/v1/completions", {"prompt": "x", "max_tokens": 40, **more}, None) for more in fields]
    made += [("/v1/completions", {"prompt": [id] * 5, "max_tokens": 20}, None) for id in edges]
    made += [("/v1/embeddings", {"input": [[id] * 5, [1]]}, None) for id in edges]
    made += [("/detokenize", {"tokens": [id]}, None) for id in edges]
    made += [("/v1/completions", {"prompt": [3] * length, "max_tokens": 5}, None) for length in (1, 2046, 2047, 2048, 2049, 100_000)]
    made += [
        ("/v1/completions", {"prompt": [3] * 1500, "n": 3, "max_tokens": 400, "stream": True}, after) for after in (0.0, 0.02, 0.1, 0.3)
    ]
    made += [("/v1/chat/completions", {"messages": TURNS * 2, "max_tokens": 400}, after) for after in (0.01, 0.2)]
    made += [("/v1/messages", {"messages": TURNS, "max_tokens": 400, "stream": True, "model": "code-8m"}, 0.1)]
    made += [("/v1/responses", {"input": TURNS, "max_output_tokens": 400, "stream": True}, 0.1)]
    return made


def _deep(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema if depth < 8 else {}}, "required": ["a"]}
    return schema


def run(server: Server, rounds: int, seed: int, late: float = LATE_SHARE) -> dict:
    """Ask the canaries alone, and then so many times beside hostile clients. Raises Difference."""
    return asyncio.run(_run(server, rounds, seed, late))


async def _run(server: Server, rounds: int, seed: int, late: float) -> dict:
    wire, chance = Wire(server.url), random.Random(seed)
    alone = {name: await _answer(wire, name) for name in CANARIES}
    require(len({*map(str, alone.values())}) == len(alone), "two canaries are answered alike, so equal answers say nothing")
    requests, statuses = hostile(), Counter[int]()
    await until_rest(server, 5.0)
    before, stalls, tokens, deaths = memory(server), Stalls(server), scrape(server.url)["hasten_generation_tokens_total"], _deaths(server)
    left: list[tuple[str, dict, float | None]] = []
    over = asyncio.Event()

    async def attack() -> None:
        while not over.is_set():
            if not left:
                left.extend(chance.sample(requests, len(requests)))
            path, body, after = left.pop()
            asked = await wire.begin(request(path, body))
            await asyncio.wait({asked.done}, timeout=30.0 if after is None else after)
            if after is not None and not asked.done.done():
                statuses[0] += 1
                asked.leave(chance.random() < 0.5)
                continue
            statuses[asked.status] += 1
            require(
                asked.status in {200, 504} or 400 <= asked.status < 500,
                f"{path} {str(body)[:200]}: status {asked.status} {asked.body[:200]!r}",
            )

    attackers = [asyncio.create_task(attack()) for _ in range(HOSTILE)]
    compared = 0
    try:
        for number in range(rounds):
            names = chance.sample(list(CANARIES), len(CANARIES))
            answers = asyncio.gather(*(_answer(wire, name) for name in names))
            await asyncio.wait({answers, *attackers}, return_when=asyncio.FIRST_COMPLETED)
            for one in attackers:
                if one.done():
                    one.result()
            for name, found in zip(names, await answers):
                require(found == alone[name], f"round {number}, {name}: {found} beside hostile requests, {alone[name]} alone")
                compared += len(json.dumps(found))
        while statuses.total() < len(requests):  # each of them at least once
            await asyncio.sleep(0.05)
            for one in attackers:
                if one.done():
                    one.result()
    finally:
        over.set()
        await asyncio.gather(*attackers, return_exceptions=True)
    require(_deaths(server) == deaths, "the engine died of it")
    require(statuses[200] > 0 and statuses[400] > 0 and statuses[0] > 0, f"hostile requests ended with {dict(statuses)}")
    await until_rest(server, 5.0)
    again = {name: await _answer(wire, name) for name in CANARIES}
    require(again == alone, "canaries are answered otherwise afterwards")
    generated = scrape(server.url)["hasten_generation_tokens_total"] - tokens
    return {
        "rounds": rounds, "canaries": rounds * len(CANARIES), "bytes": compared, "hostile": statuses.total(),
        "statuses": {str(status) if status else "left": count for status, count in sorted(statuses.items())}, "tokens": int(generated),
    } | memory(server).growth(before, PLANNED) | stalls.told(late)  # fmt: skip


def _deaths(server: Server) -> float:
    return scrape(server.url)["hasten_engine_restarts_total"]


async def _answer(wire: Wire, name: str) -> object:
    """A canary's answer, without what it has of its own each time. Of a stream, what its events say one after the other: how many tokens
    one of them holds hangs on the clock."""
    path, body = CANARIES[name]
    asked = await wire.ask(request(path, body))
    require(asked.status == 200, f"canary {name}: status {asked.status} {asked.body[:300]!r}")
    if not body.get("stream"):
        return _plain(asked.json())
    joined: dict[str, object] = {}
    for event in asked.events():
        for choice in event["choices"]:
            said = choice.get("delta", choice)
            for key, value in {"text": said.get("text") or said.get("content") or "", **_lists(choice.get("logprobs"))}.items():
                joined[key] = joined.get(key, "" if isinstance(value, str) else []) + value
            joined["finish_reason"] = choice["finish_reason"]
    return joined


def _lists(logprobs: dict | None) -> dict[str, list]:
    return {key: value for key, value in (logprobs or {}).items() if isinstance(value, list)}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key not in OWN}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def told(found: dict) -> str:
    """The figures, for people."""
    statuses = ", ".join(f"{count:,} × {status}" for status, count in found["statuses"].items())
    return (
        f"neighbours: {found['canaries']:,} answers of {found['bytes']:,} bytes in {found['rounds']:,} rounds beside {found['hostile']:,} "
        f"hostile requests ({statuses}): 0 bytes changed; event loop late at {found['late']} of {found['ticks']:,} moments"
    )
