"""An HTTP/1.1 client for measuring: it adds as little as it can to what it measures, and says when each piece came.

asyncio's own transports, one protocol object a connection. Connections are kept and used again."""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from hasten.base.errors import UserError, one_line

LONGEST_HEAD = 64 << 10
LONGEST_PIECE = 16 << 20
"""Bytes of a head, and of a chunk or a body without chunks, that are taken."""

OnBody = Callable[[bytes, float], None]
"""A piece of a body, and when it came, in seconds of `time.perf_counter`."""


class HttpError(OSError):
    """What came is no answer, or not all of one."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Status and headers (names in small letters) of an answer whose body has come."""

    status: int
    headers: Mapping[str, str]


class HttpClient:
    """Posts to one server. ``timeout`` bounds each request from its first to its last byte, in seconds."""

    def __init__(self, base_url: str, timeout: float = 600.0) -> None:
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise UserError(f"URL {one_line(base_url)} cannot be used; give http://HOST:PORT or https://HOST:PORT")
        self._host, self._ssl = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._ssl else 80)
        self._path, self._authority, self._timeout = parts.path.rstrip("/"), parts.netloc.rpartition("@")[2], timeout
        self._idle: list[_Connection] = []

    async def get(self, path: str, headers: Mapping[str, str], on_body: OnBody) -> Reply:
        """As `post`, without a body."""
        return await self._ask(f"GET {self._path}{path} HTTP/1.1", b"", headers, on_body)

    async def post(self, path: str, body: bytes, headers: Mapping[str, str], on_body: OnBody) -> Reply:
        """Post JSON; every piece of the answer's body goes to ``on_body`` as it comes.

        Raises OSError, of which `HttpError` is one, or TimeoutError."""
        with_type = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        return await self._ask(f"POST {self._path}{path} HTTP/1.1", body, with_type, on_body)

    async def _ask(self, line: str, body: bytes, headers: Mapping[str, str], on_body: OnBody) -> Reply:
        head = [line, f"Host: {self._authority}", *(f"{name}: {value}" for name, value in headers.items())]
        request = "\r\n".join([*head, "", ""]).encode("latin-1") + body
        async with asyncio.timeout(self._timeout):
            connection = self._used()
            if connection is not None:
                try:
                    return await self._send(connection, request, on_body)
                except OSError:
                    if connection.answered:
                        raise
            # a server may close an idle connection at the moment it is used; that is nobody's error
            return await self._send(await self._connect(), request, on_body)

    async def close(self) -> None:
        """Close the connections."""
        while self._idle:
            self._idle.pop().abort()

    def _used(self) -> "_Connection | None":
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
        return None

    async def _connect(self) -> "_Connection":
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        return connection

    async def _send(self, connection: "_Connection", request: bytes, on_body: OnBody) -> Reply:
        try:
            reply = await connection.send(request, on_body)
        except BaseException:
            connection.abort()
            raise
        if connection.usable:
            self._idle.append(connection)
        return reply


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries an API key; none without one. Raises UserError for what no header can hold, without telling it."""
    if key and not (key.isascii() and key.isprintable()):
        raise UserError("the API key holds characters that no HTTP header can; check OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class _Connection(asyncio.Protocol):
    """One request at a time. ``answered`` tells whether a byte of the last one's answer has come."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._done: asyncio.Future[Reply] | None = None
        self._on_body: OnBody = _ignored
        self._read: Callable[[float], bool] = self._read_head  # reads on; False where more must come first
        self._reply = Reply(0, {})
        self._left = 0
        self._keep = self.answered = False

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing() and self._done is None

    def abort(self) -> None:
        """Close at once."""
        self._done = None
        if self._transport is not None:
            self._transport.abort()

    async def send(self, request: bytes, on_body: OnBody) -> Reply:
        """Send it, and wait for the end of the answer."""
        if self._transport is None:
            raise HttpError("not connected")
        self._done, self._on_body = asyncio.get_running_loop().create_future(), on_body
        self._read, self.answered = self._read_head, False
        self._transport.write(request)
        return await self._done

    # --- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):  # it is one of a stream
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        self.answered = True
        try:
            while self._done is not None and self._read(now):
                pass
        except (ValueError, OSError) as error:
            self._end(error if isinstance(error, OSError) else HttpError(f"the answer is not HTTP/1.1: {one_line(str(error))}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._keep = False
        if self._read == self._read_to_end and error is None:
            self._end(None)
        else:
            self._end(error if isinstance(error, OSError) else HttpError("the server closed the connection before the end of its answer"))

    # --- the parts of an answer

    def _read_head(self, now: float) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > LONGEST_HEAD:
                raise HttpError(f"the answer's head has more than {LONGEST_HEAD:,} bytes")
            return False
        status_line, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = status_line.partition(" ")
        if not version.startswith("HTTP/1."):
            raise HttpError(f"the answer begins with {one_line(status_line)}, which is not HTTP/1.1")
        status = int(rest[:3])
        if status < 200:
            return True  # an interim answer; the answer follows
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._reply = Reply(status, headers)
        self._keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if status in {204, 304}:
            self._end(None)
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            self._read = self._read_chunk
        elif "content-length" in headers:
            self._left = _size(headers["content-length"], 10)
            self._read = self._read_length
        else:
            self._keep, self._read = False, self._read_to_end
        return True

    def _read_chunk(self, now: float) -> bool:
        buffer = self._buffer
        line_end = buffer.find(b"\r\n")
        if line_end < 0:
            return self._wait(4096)
        size = _size(buffer[:line_end].partition(b";")[0].decode("latin-1"), 16)
        begin = line_end + 2
        if size == 0:
            return self._read_trailers(begin)
        if len(buffer) < begin + size + 2:
            return self._wait(LONGEST_PIECE)
        piece = bytes(buffer[begin : begin + size])
        del buffer[: begin + size + 2]
        self._on_body(piece, now)
        return True

    def _read_trailers(self, begin: int) -> bool:
        if self._buffer[begin : begin + 2] == b"\r\n":
            end = begin + 2
        elif (found := self._buffer.find(b"\r\n\r\n", begin)) >= 0:
            end = found + 4
        else:
            return self._wait(LONGEST_HEAD)
        del self._buffer[:end]
        self._end(None)
        return False

    def _read_length(self, now: float) -> bool:
        piece = bytes(self._buffer[: self._left])
        self._left -= len(piece)
        del self._buffer[: len(piece)]
        if piece:
            self._on_body(piece, now)
        if self._left == 0:
            self._end(None)
        return False

    def _read_to_end(self, now: float) -> bool:
        piece = bytes(self._buffer)
        self._buffer.clear()
        if piece:
            self._on_body(piece, now)
        return False

    def _wait(self, most: int) -> bool:
        if len(self._buffer) > most:
            raise HttpError(f"a part of the answer has more than {most:,} bytes")
        return False

    def _end(self, error: Exception | None) -> None:
        done, self._done = self._done, None
        if error is not None or not self._keep:
            self.abort()
        if done is not None and not done.done():
            if error is None:
                done.set_result(self._reply)
            else:
                done.set_exception(error)


def _size(text: str, base: int) -> int:
    if (size := int(text, base)) < 0:
        raise ValueError(f"a size of {size}")
    return size


def _ignored(piece: bytes, now: float) -> None:
    """Of an answer nobody asked for."""


class Events:
    """Server-sent events from pieces of a body, cut anywhere: the ``data`` of each."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that are whole now. Lines end in a newline, with or without a carriage return before it."""
        *lines, self._rest = (self._rest + piece).split(b"\n") if self._rest else piece.split(b"\n")
        if len(self._rest) > LONGEST_PIECE:
            raise HttpError(f"an event has more than {LONGEST_PIECE:,} bytes")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events
