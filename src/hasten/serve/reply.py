"""Reply: an HTTP answer that is computed while the client waits for it, and given up when the client goes away."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from hasten.serve.errors import ApiError
from hasten.serve.log import Note

DONE = b"data: [DONE]\n\n"
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


STALLED_S = 30.0
"""How long a client may leave a full line unread."""


class StalledError(Exception):
    """The client is there and does not read."""


def encoded(value: Any) -> bytes:
    """JSON."""
    return msgspec.json.encode(value)


class Sender:
    """One answer on its way out: one JSON body, or a stream of server-sent events."""

    def __init__(self, send: Send) -> None:
        self._out = send
        self.streaming = False

    async def body(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        """The whole answer."""
        data = encoded(value)
        more = [(name.encode(), text.encode()) for name, text in (headers or {}).items()]
        length = (b"content-length", str(len(data)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [*_JSON, length, *more]})
        await self._send({"type": "http.response.body", "body": data})

    async def events(self, frames: bytes) -> None:
        """Frames, whole ones, at once. The first begin the answer, with status 200."""
        if not self.streaming:
            self.streaming = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        await self._send({"type": "http.response.body", "body": frames, "more_body": True})

    async def end(self, frames: bytes) -> None:
        """The last frames of a stream."""
        await self.events(frames)
        await self._send({"type": "http.response.body", "body": b""})

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(STALLED_S):
                await self._out(message)
        except TimeoutError:
            raise StalledError from None

    async def error(self, error: ApiError) -> None:
        """An error as the answer, or as the last event of a stream that has begun."""
        if self.streaming:
            await self.end(b"data: " + encoded(error.body) + b"\n\n")
        else:
            await self.body(error.status, error.body, error.headers)


class Reply(Response):
    """What ``work`` sends. An ApiError of it is the answer then; ``work`` is cancelled when the client goes."""

    def __init__(self, work: Callable[[Sender], Awaitable[None]], note: Note) -> None:
        super().__init__()
        self._work, self._note = work, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        working = asyncio.create_task(self._answer(Sender(send)))
        going = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            else:
                self._note.said = "the client went away"
        finally:
            for task in (working, going):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working

    async def _answer(self, sender: Sender) -> None:
        try:
            await self._work(sender)
        except StalledError:
            self._note.said = "the client does not read"
        except ApiError as error:
            self._note.said = error.message
            with contextlib.suppress(StalledError):
                await sender.error(error)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
