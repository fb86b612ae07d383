"""What is read of a request before anything is known of it: nothing without a key, and so much of all bodies together."""

import asyncio
import json
from collections.abc import Sequence

import pytest

from hasten.serve.guard import Guard, Limits
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
