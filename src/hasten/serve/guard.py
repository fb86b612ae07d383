"""The guard: what every HTTP request passes before any route sees it. It works on the raw path, and refuses what it does not know."""

import asyncio
import ipaddress
import secrets
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.base.errors import one_line
from hasten.serve.counts import Counts
from hasten.serve.errors import FAILED, ApiError
from hasten.serve.keys import Keys, key_in
from hasten.serve.log import Log, Note
from hasten.serve.reply import Sender
from hasten.serve.responses.cache import HEADER
from hasten.serve.trace import trace_in

PUBLIC = frozenset({"/health", "/ready"})
"""Paths that need no key to be got: they say nothing but whether the server is well."""
BODILESS = frozenset({"GET", "HEAD"})
"""Methods whose bodies are not read."""
QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Paths that are asked every few seconds, and logged only where they fail otherwise than by what they say."""

OTHER = "other"
"""What paths are counted under that are none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of what a client may send."""

    body_bytes: int = 4 << 20
    body_s: float = 30.0
    """Seconds for a body to arrive."""
    all_bytes: int = 256 << 20
    """Of the bodies of all requests whose answers have not begun, together; one that is as long as a body may be always fits alone."""
    headers: int = 100
    header_bytes: int = 32 << 10
    path_bytes: int = 2048


class _Held:
    """The bytes of one body, counted among those of all, in ``held``, while it is read and until it is let go."""

    def __init__(self, held: list[int], most: int) -> None:
        self._held, self._most, self._own = held, most, 0

    def take(self, count: int) -> None:
        """So many more have come. Raises ApiError 503 where all are too many."""
        if self._held[0] + count > self._most:
            raise ApiError(503, "too many long bodies at a time; try again in 1 s", code="overloaded", retry_s=1)
        self._held[0] += count
        self._own += count

    def let_go(self) -> None:
        """They are read, or nobody wants them; once more is nothing more."""
        self._held[0] -= self._own
        self._own = 0


class Guard:
    """An ASGI application around ``app``: keys, hosts, limits, the request's number, and its line in the log.

    ``hosts`` are the names under which a server without keys may be asked, so that a web page that a user looks at cannot reach it under a
    name of its own (DNS rebinding); None takes any. What becomes of requests to ``routes`` is counted in ``counts`` by route, all others
    together."""

    def __init__(
        self, app: ASGIApp, log: Log, *, keys: Keys, hosts: Collection[str] | None, limits: Limits | None = None,
        routes: Collection[str] = (), counts: Counts | None = None,
    ) -> None:  # fmt: skip
        self._routes, self._counts = routes, Counts() if counts is None else counts
        self._app, self._log, self._keys, self._hosts, self._limits = app, log, keys, hosts, limits or Limits()
        self._held = [0]  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # nothing here speaks WebSocket
        note = Note(secrets.token_hex(8), scope["method"][:16], one_line(scope["path"], 80)[1:-1], time.monotonic())
        note.trace = trace = trace_in(scope["headers"])
        more = [(b"x-request-id", note.id.encode()), (b"traceresponse", trace.answer(note.id).encode())]
        started = False
        held = _Held(self._held, max(self._limits.all_bytes, self._limits.body_bytes))

        async def told(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                held.let_go()
                note.status = message["status"]
                own = [(HEADER.encode(), note.cached.encode())] if note.cached else []
                message = {**message, "headers": [*message.get("headers", ()), *more, *own]}
            await send(message)

        try:
            try:
                self._check(scope, note)
                body = await self._body(scope, receive, held)
                scope["state"] = {**scope.get("state", {}), "note": note, "tenant": note.tenant, "body": body}
                await self._app(scope, _replayed(body, receive), told)
            except ApiError as error:
                note.said = error.message
                if not started:
                    await Sender(told, scope["path"]).error(error)
            except Exception as error:
                traceback.print_exc()
                note.said = f"{type(error).__name__}: {one_line(str(error))}"
                if not started:
                    await Sender(told, scope["path"]).error(ApiError(500, FAILED))
        finally:
            held.let_go()
            self._counts.answered(self._route(scope), note.status)
            if scope["path"] not in QUIET or note.status not in {200, 503}:
                self._log.request(note, time.monotonic() - note.began)

    def _route(self, scope: Scope) -> str:
        """The server's own name for what was asked; none of it is the client's."""
        path = str(getattr(scope.get("route"), "path", scope["path"]))
        return path if path in self._routes else OTHER

    def _check(self, scope: Scope, note: Note) -> None:
        limits, headers = self._limits, scope["headers"]
        if len(scope.get("raw_path") or b"") > limits.path_bytes or len(scope["query_string"]) > limits.path_bytes:
            raise ApiError(414, f"the path is longer than {limits.path_bytes} bytes")
        if len(headers) > limits.headers or sum(len(name) + len(value) for name, value in headers) > limits.header_bytes:
            raise ApiError(431, f"more than {limits.headers} headers, or {limits.header_bytes} bytes of them")
        raw = scope.get("raw_path")
        if scope["path"] in PUBLIC and scope["method"] in BODILESS and (raw is None or raw == scope["path"].encode()):
            return
        if self._keys:
            tenant = self._keys.tenant(key_in(headers))
            if tenant is None:
                raise ApiError(401, "a key is needed, and this is none: send Authorization: Bearer KEY", code="invalid_api_key")
            note.tenant = tenant
        elif self._hosts is not None:
            host = next((value for name, value in headers if name == b"host"), b"").decode("latin-1")
            if not _is_one(host, self._hosts):
                raise ApiError(
                    403, f"this server is not {one_line(host, 80)}; ask it as {', '.join(sorted(self._hosts))}, or allow the name"
                )

    async def _body(self, scope: Scope, receive: Receive, held: _Held) -> bytes:
        """The whole body, of a size and within a time."""
        headers = dict(scope["headers"])
        most = self._limits.body_bytes
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > most:
            raise ApiError(413, f"the body is longer than {most:,} bytes; send less at a time")
        if headers.get(b"content-encoding", b"identity").lower() not in {b"", b"identity"}:
            raise ApiError(415, "the body is encoded; send it as it is")
        if scope["method"] in BODILESS:
            return b""
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "the body is not of content-type application/json; send JSON and say so")
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client went away before its body was there")
                    part = message.get("body", b"")
                    if len(body) + len(part) > most:
                        raise ApiError(413, f"the body is longer than {most:,} bytes; send less at a time")
                    held.take(len(part))
                    body += part
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body was not there after {self._limits.body_s:g} s") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` once more, of a body that has been read."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


def _is_one(host: str, names: Collection[str]) -> bool:
    """Is this Host header, whatever its port, one of ``names`` or a loopback address?"""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return ipaddress.ip_address(name).is_loopback or name in names
    except ValueError:
        return name.lower().rstrip(".") in names
