"""A cheap HTTP client: one connection a request, and nothing looked at that nobody asks for. It shares its processors with the server that
it loads."""

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from urllib.parse import urlsplit

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of a connection that ends with a reset."""


def request(path: str, body: object | bytes | None = None, *, method: str = "POST", headers: tuple[str, ...] = ()) -> bytes:
    """A whole request; ``body`` is JSON, or bytes as they are."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


class Asked(asyncio.Protocol):
    """A request on its way, and what came back. Times are the event loop's, of the request, of the answer's first byte after its head, and
    of its end; the latter two are None until then. ``on_data`` is called with this whenever something came."""

    def __init__(self, raw: bytes, on_data: "Callable[[Asked], None] | None" = None) -> None:
        loop = asyncio.get_running_loop()
        self._loop, self._raw, self._on_data = loop, raw, on_data
        self.began = loop.time()
        self.first: float | None = None
        self.ended: float | None = None
        self.data = bytearray()
        self.begun: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        """Whether it came to its end or not."""
        self._head = 0  # bytes of the answer's head
        self._length: int | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.write(self._raw)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self._head and (end := self.data.find(b"\r\n\r\n")) >= 0:
            self._head = end + 4
            length = self.header("content-length")
            self._length = None if length is None else int(length)
        if self._head and self.first is None and len(self.data) > self._head:
            self.first = self._loop.time()
            _tell(self.begun)
        if self._head and self._whole():
            self.ended = self._loop.time()
            self._transport.close()
            _tell(self.done)
        if self._on_data is not None:
            self._on_data(self)

    def connection_lost(self, exc: Exception | None) -> None:
        _tell(self.begun)
        _tell(self.done)

    def leave(self, reset: bool = False) -> None:
        """Go away, whatever there is."""
        if self._transport is not None:
            if reset and (sock := self._transport.get_extra_info("socket")) is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._transport.abort()

    @property
    def begun_to_send(self) -> bool:
        """Was there anything to send?"""
        return bool(self._raw)

    def send(self, data: bytes) -> None:
        """More of the request."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def status(self) -> int:
        """0 if there is no answer."""
        return int(self.data[9:12]) if self._head else 0

    def header(self, name: str) -> str | None:
        for line in bytes(self.data[: self._head]).decode("latin-1").split("\r\n"):
            if line.lower().startswith(name + ":"):
                return line.partition(":")[2].strip()
        return None

    @property
    def body(self) -> bytes:
        """Without what chunks are told apart by."""
        rest = bytes(self.data[self._head :])
        if self._length is not None:
            return rest
        parts = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        return b"".join(parts)

    def json(self) -> dict:
        return json.loads(self.body)

    def events(self) -> list[dict]:
        """What a stream's events hold, but for [DONE]."""
        lines = self.body.decode().split("\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]

    def _whole(self) -> bool:
        if self._length is not None:
            return len(self.data) - self._head >= self._length
        return self.data.endswith(b"\r\n0\r\n\r\n")


def _tell(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class Wire:
    """To the server at ``url``."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self.host, self.port = place.hostname, place.port

    async def begin(self, raw: bytes, on_data: Callable[[Asked], None] | None = None) -> Asked:
        """Send a request. Raises OSError where nobody listens."""
        _, asked = await asyncio.get_running_loop().create_connection(lambda: Asked(raw, on_data), self.host, self.port)
        return asked

    async def ask(self, raw: bytes, seconds: float = 60.0) -> Asked:
        """Send a request and wait for the answer's end."""
        asked = await self.begin(raw)
        async with asyncio.timeout(seconds):
            await asked.done
        return asked
