"""Reply: an HTTP answer that is computed while the client waits for it, and given up when the client goes away."""

import asyncio
import contextlib
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from hasten.base.errors import one_line
from hasten.serve.errors import FAILED, ApiError
from hasten.serve.log import Note
from hasten.serve.shapes import error_body, error_event

DONE = b"data: [DONE]\n\n"
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
STALLED_S = 30.0
"""How long a client may leave a full line unread."""


def encoded(value: Any) -> bytes:
    """JSON."""
    return msgspec.json.encode(value)


class Sender:
    """One answer on its way out to who asked for ``path``: one JSON body, or a stream of server-sent events."""

    def __init__(self, send: Send, path: str) -> None:
        self._out, self._path = send, path
        self.last: Callable[[ApiError], bytes] = lambda error: error_event(path, error)
        """The last frames of a stream that fails."""
        self._since: float | None = None  # when what is being sent began to be
        self.streaming = False
        self.over = False
        """Is the answer's last part on its way, so that nothing more can be said?"""

    async def body(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        """The whole answer."""
        await self.whole(status, encoded(value), headers)

    async def whole(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        """The whole answer, which is JSON already."""
        self.over = True
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
        self.over = True
        await self._send({"type": "http.response.body", "body": b""})

    @property
    def stalled(self) -> bool:
        """Is the client there, and does not read?"""
        return self._since is not None and time.monotonic() - self._since > STALLED_S

    async def _send(self, message: Message) -> None:
        self._since = time.monotonic()  # whoever runs the answer looks at it now and then, which costs less than a timer a message
        await self._out(message)
        self._since = None

    async def error(self, error: ApiError) -> None:
        """An error as the answer, or as the last event of a stream that has begun."""
        if self.streaming:
            await self.end(self.last(error))
        else:
            await self.body(error.status, error_body(self._path, error), error.headers)


class Reply(Response):
    """What ``work`` sends. An ApiError of it is the answer then, or the last event; so is any other error, as 500, with its traceback in
    the log. ``work`` is cancelled when the client goes."""

    def __init__(self, work: Callable[[Sender], Awaitable[None]], note: Note) -> None:
        super().__init__()
        self._work, self._note = work, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        sender = Sender(send, scope["path"])
        working = asyncio.create_task(self._answer(sender))
        going = asyncio.create_task(_gone(receive))
        try:
            while not working.done() and not going.done() and not sender.stalled:
                await asyncio.wait({working, going}, timeout=STALLED_S / 4, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            else:
                self._note.said = "the client went away" if going.done() else "the client does not read"
        finally:
            for task in (working, going):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working

    async def _answer(self, sender: Sender) -> None:
        try:
            await self._work(sender)
        except ApiError as error:
            self._note.said = error.message
            await sender.error(error)
        except Exception as error:
            if sender.over:
                raise
            traceback.print_exc()
            self._note.said = f"{type(error).__name__}: {one_line(str(error))}"
            await sender.error(ApiError(500, FAILED))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
