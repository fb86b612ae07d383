"""Requests made to burst what reads them, on every route: refused in the words of the route's API, and nothing of them stays in memory."""

import asyncio
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator

from hasten.serve.anthropic_bodies import CountBody, MessagesBody
from hasten.serve.bodies import ChatBody, CompletionBody, DetokenizeBody, Strict, TokenizeBody
from hasten.serve.embeddings import EmbeddingsBody
from hasten.serve.responses_bodies import ResponsesBody
from tests.serve.server import Server
from tests.soak.watch import GROWTH_BYTES, LATE_SHARE, Stalls, forget_peaks, memory, require
from tests.soak.wire import Asked, Wire, request

ARGUMENTS = ("code-8m", "--max-sequences", "8")
TURNS = [{"role": "user", "content": "x"}]
ROUTES: dict[str, tuple[type[Strict], dict]] = {
    "/v1/completions": (CompletionBody, {"prompt": "x", "max_tokens": 1}),
    "/v1/chat/completions": (ChatBody, {"messages": TURNS, "max_tokens": 1}),
    "/v1/messages": (MessagesBody, {"messages": TURNS, "max_tokens": 1, "model": "code-8m"}),
    "/v1/messages/count_tokens": (CountBody, {"messages": TURNS, "model": "code-8m"}),
    "/v1/responses": (ResponsesBody, {"input": "x", "max_output_tokens": 1}),
    "/v1/embeddings": (EmbeddingsBody, {"input": "x"}),
    "/tokenize": (TokenizeBody, {"prompt": "x"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
}
GETS = ("/v1/models", "/v1/models/code-8m", "/health", "/ready", "/metrics", "/openapi.json")
MANY, DEEP, HEADER = 1_000_000, 100_000, 1 << 20
LONGEST = (4 << 20) - 1000
"""Of a value in a body as long as one may be."""
ZIPPED = gzip.compress(bytes(64 << 20)) * 16
"""A GiB of zeros."""
LISTS = {"whole numbers": b"1", "large numbers": b"257", "texts": b'""', "objects": b"{}", "lists": b"[]", "nulls": b"null"}
VALUES: dict[str, Callable[[], bytes]] = {
    "depth": lambda: b"[" * DEEP + b"]" * DEEP,
    "less depth": lambda: b"[" * (DEEP // 3) + b"]" * (DEEP // 3),
    **{
        f"a list of {name}": lambda one=one: b"[" + b",".join([one] * min(MANY, LONGEST // (len(one) + 1))) + b"]"
        for name, one in LISTS.items()
    },
    "many names": lambda: b"{" + b",".join(b'"%x":1' % place for place in range(400_000)) + b"}",
    "fewer names": lambda: b"{" + b",".join(b'"%x":1' % place for place in range(90_000)) + b"}",
}
"""What stands for a field's value."""


def bombs(path: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """What is sent to a route, by name; made when it is wanted."""
    method = "GET" if path in GETS else "POST"

    def sent(*headers: str, target: str = path, body: bytes | None = None) -> Callable[[], bytes]:
        return lambda: request(target, body, method=method, headers=headers)

    for name in ("gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip"):
        yield f"{name} bomb", sent(f"content-encoding: {name}", body=ZIPPED)
    yield "a header of 1 MiB", sent("x-long: " + "y" * HEADER)
    yield "1 MiB of headers", sent(*(f"x-{place}: " + "y" * 1000 for place in range(HEADER // 1000)))
    yield "a path of 1 MiB", sent(target=path + "?" + "y" * HEADER)
    if path in GETS:
        return
    kind, good = ROUTES[path]
    for opening in (b"[", b'{"a":', b'{"prompt":[', b'[{"input":'):
        yield f"depth of {opening.decode()}", sent(body=opening * DEEP)
    for name, value in VALUES.items():
        yield f"{name} instead of an object", lambda value=value: request(path, value())
        for field, info in kind.model_fields.items():
            field = info.alias or field
            yield f"{name} in {field}", lambda field=field, value=value: request(path, _with(good, field, value()))


def _with(good: dict, field: str, value: bytes) -> bytes:
    rest = {name: one for name, one in good.items() if name != field} or {"model": "code-8m"}
    return json.dumps(rest)[:-1].encode() + b',"' + field.encode() + b'":' + value + b"}"


WORDS_OF_OPENAI, WORDS_OF_ANTHROPIC = {"message", "type", "param", "code"}, {"type", "message"}


def check_refused(path: str, name: str, asked: Asked) -> None:
    """Raises Difference where it is not an error in the API's own shape."""
    require(400 <= asked.status < 500, f"{path}, {name}: status {asked.status}: {asked.body[:200]!r}")
    told = asked.json()
    anthropic = path.startswith("/v1/messages")
    require(told.get("type") == ("error" if anthropic else None), f"{path}, {name}: {asked.body[:200]!r}")
    require(set(told["error"]) == (WORDS_OF_ANTHROPIC if anthropic else WORDS_OF_OPENAI), f"{path}, {name}: {asked.body[:200]!r}")
    require(len(asked.body) < 2000, f"{path}, {name}: {len(asked.body)} bytes of an error")


def run(server: Server, share: float, seed: int, late: float = LATE_SHARE) -> dict:
    """Send ``share`` of all bombs, drawn from ``seed``, and every one of those without a field. Raises Difference."""
    return asyncio.run(_run(server, share, seed, late))


async def _run(server: Server, share: float, seed: int, late: float) -> dict:
    wire, chance = Wire(server.url), random.Random(seed)
    known = set((await wire.ask(request("/openapi.json", method="GET"))).json()["paths"])
    require(known == {*ROUTES, *GETS} - {"/v1/models/code-8m", "/openapi.json"} | {"/v1/models/{name}"}, f"the server's routes are {known}")
    await _good(wire)
    before, statuses = memory(server), Counter[int]()
    forget_peaks(server)
    stalls = Stalls(server)
    for path in [*ROUTES, *GETS]:
        for name, made in bombs(path):
            if " in " in name and chance.random() >= share:
                continue
            asked = await wire.ask(made())
            check_refused(path, name, asked)
            statuses[asked.status] += 1
    await _good(wire)
    await asyncio.sleep(0.5)
    require(statuses[415] > 0 and statuses[431] > 0 and statuses[400] > 0, f"refused with {dict(statuses)}")
    after, most = memory(server), memory(server, "VmHWM")
    grown = after.growth(before)
    peak = {f"{name}_peak_mib": value for name, value in zip(("front", "engine"), most.growth(before, passing=GROWTH_BYTES).values())}
    return {"bombs": statuses.total(), "statuses": {str(k): v for k, v in sorted(statuses.items())}} | grown | peak | stalls.told(late)


async def _good(wire: Wire) -> None:
    for path, (_, body) in ROUTES.items():
        asked = await wire.ask(request(path, body))
        require(asked.status == 200, f"{path}: status {asked.status}: {asked.body[:200]!r}")


def told(found: dict) -> str:
    """The figures, for people."""
    statuses = ", ".join(f"{count} × {status}" for status, count in found["statuses"].items())
    return (
        f"bombs: {found['bombs']:,}, all refused ({statuses}); grown by {found['front_growth_mib']} MiB in front (peak "
        f"{found['front_peak_mib']}), {found['engine_growth_mib']} in the engine (peak {found['engine_peak_mib']}); event loop late at "
        f"{found['late']} of {found['ticks']:,} moments"
    )
