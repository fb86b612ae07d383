"""What is read of a request before anything is known of it: nothing without a key, and so much of all bodies together."""

import asyncio
import hmac
import json
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from starlette.routing import Route

from hasten.serve.app import make_app
from hasten.serve.guard import PUBLIC, Guard, Limits
from hasten.serve.keys import Keys
from hasten.serve.log import Log

JSON = [(b"content-type", b"application/json"), (b"host", b"localhost")]


@pytest.fixture
def log():
    log = Log(as_json=False)
    yield log
    log.close()


class Client:
    """A request, whose body comes as the test says."""

    def __init__(self, guard: Guard, path: str, method: str = "POST", headers: Sequence[tuple[bytes, bytes]] = JSON) -> None:
        self.sent, self.parts, self.reads = [], asyncio.Queue(), 0
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [*headers]}
        self.task = asyncio.create_task(guard(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        self.reads += 1
        return await self.parts.get()

    async def _send(self, message: dict) -> None:
        self.sent.append(message)

    async def gives(self, size: int, more: bool = True) -> None:
        self.parts.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": more})
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None


async def served(scope, receive, send) -> None:
    body = scope["state"]["body"]
    if scope["path"] == "/late":
        await asyncio.sleep(3600)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})
    if scope["path"] == "/long":
        await asyncio.sleep(3600)


@pytest.mark.row("payloads and cancels", "compressed, deep and chunked")
def test_bodies_of_all_requests_are_bounded_together(log):
    async def run() -> None:
        guard = Guard(served, log, keys=Keys([]), hosts=None, limits=Limits(body_bytes=900, all_bytes=1000))
        first, second = Client(guard, "/x"), Client(guard, "/x")
        await first.gives(600)
        await second.gives(300)
        third = Client(guard, "/x")
        await third.gives(101)
        assert third.status == 503
        assert (b"retry-after", b"1") in third.sent[0]["headers"]
        assert json.loads(third.sent[1]["body"])["error"]["code"] == "overloaded"
        await second.gives(100)  # what others have is theirs
        await second.gives(0, more=False)
        assert (second.status, second.sent[1]["body"]) == (200, b"400")
        after = Client(guard, "/x")  # in whose place another one has room
        await after.gives(400, more=False)
        assert after.status == 200
        gone = Client(guard, "/x")
        await gone.gives(400)
        gone.parts.put_nowait({"type": "http.disconnect"})
        await gone.task
        late, long = Client(guard, "/late"), Client(guard, "/long")
        await late.gives(300, more=False)
        refused = Client(guard, "/x")
        await refused.gives(200)
        assert refused.status == 503  # a body is held until its answer begins
        late.task.cancel()
        await long.gives(400, more=False)
        assert long.status == 200
        streaming = Client(guard, "/x")
        await streaming.gives(400, more=False)
        assert streaming.status == 200  # and no longer
        await first.gives(0, more=False)
        assert first.status == 200
        long.task.cancel()
        alone = Client(guard, "/x")
        await alone.gives(900, more=False)
        assert alone.status == 200

    asyncio.run(run())


@pytest.mark.row("http and keys", "every route, deny by default")
@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_public_paths_are_public_to_be_got_alone(path, log):
    async def run() -> None:
        guard = Guard(served, log, keys=Keys(["k" * 32]), hosts=None)
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            client = Client(guard, path, method)
            await client.task
            assert (client.status, client.reads) == (401, 0)
        for method in ("GET", "HEAD"):
            client = Client(guard, path, method)
            await client.task
            assert (client.status, client.reads) == (200, 0)

    asyncio.run(run())


TRICKS = [
    "{}/", "/{}", "/.{}", "{}?x=/health", "{}#/health", "{}/../health", "/health/..{}", "/health%2f..{}", "{}%00", "{};/health",
    "/%2e{}", "{}\\..",
    "http://localhost/health{}",
]  # fmt: skip
HOSTS = [[b"localhost"], [b"evil.example"], [b"localhost/health?"], [b"localhost:80@evil"], [b""], [], [b"localhost", b"evil.example"]]
WRONG = [
    {}, {b"authorization": b""}, {b"authorization": b"Bearer"}, {b"authorization": b"Bearer "}, {b"authorization": b"Bearer x"},
    {b"authorization": b"Bearer " + b"k" * 31}, {b"authorization": b"Bearer " + b"k" * 33}, {b"authorization": b"Basic " + b"k" * 32},
    {b"authorization": b"Bearer " + b"k" * 32 + b"\x00"}, {b"x-api-key": b""}, {b"x-api-key": b"K" * 32}, {b"api-key": b"k" * 32},
    {b"cookie": b"key=" + b"k" * 32}, {b"x-forwarded-for": b"127.0.0.1"}, {b"x-original-url": b"/health"}, {b"x-rewrite-url": b"/health"},
    {b"authorization": b"Bearer x", b"x-api-key": b"k" * 32},
]  # fmt: skip


@pytest.mark.row("http and keys", "every route, deny by default")
def test_every_route_wants_a_key_whatever_its_path_and_host_look_like(log):
    """Routes are read off the application, so that a new one is asked for by itself. The application behind the guard answers anything."""

    async def run() -> int:
        guard, asked = Guard(served, log, keys=Keys(["k" * 32]), hosts={"localhost"}), 0
        routes = [route for route in make_app(SimpleNamespace(), SimpleNamespace()).routes if isinstance(route, Route)]
        assert len(routes) > 12
        for route in routes:
            for method in {"GET", "POST", "HEAD", "OPTIONS", "TRACE"}:
                plain = route.path.replace("{name:path}", "x")
                for path in (plain, *(trick.format(plain) for trick in TRICKS)):
                    if plain == path and plain in PUBLIC and method in {"GET", "HEAD"}:
                        continue
                    for wrong in WRONG:
                        for hosts in HOSTS if path == plain else HOSTS[:1]:
                            headers = [(b"content-type", b"application/json"), *((b"host", host) for host in hosts), *wrong.items()]
                            client = Client(guard, path, method, headers)
                            await client.task
                            assert (client.status, client.reads) == (401, 0), (method, path, headers)
                            asked += 1
            client = Client(guard, route.path, "GET", [(b"x-api-key", b"k" * 32), (b"host", b"any.example")])
            await client.task
            assert client.status == 200
        return asked

    assert asyncio.run(run()) > 10_000


@pytest.mark.row("http and keys", "compared in constant time")
def test_every_key_is_compared_whichever_is_given(monkeypatch):
    keys, compared, real = Keys(["a" * 20, "b" * 20, "c" * 20]), [], hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    for given, known in ((b"a" * 20, True), (b"c" * 20, True), (b"", False), (b"a", False), (b"a" * 10**6, False), (b"\xff\x00", False)):
        compared.clear()
        assert (keys.tenant(given) is not None) is known
        assert compared == [(32, 32)] * 3
