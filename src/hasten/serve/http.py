"""HTTP/1.1 as uvicorn speaks it through h11, which is written in Python, with a time limit on a request's head, and words for one that is
none."""

import asyncio
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hasten.serve.errors import ApiError
from hasten.serve.reply import encoded
from hasten.serve.shapes import error_body

HEAD_S = 20.0
"""Seconds until a connection must have sent a request's head: since it was made, or since the head's first byte."""
HEAD_SHOWN = 256
LINGER_S = 2.0
"""How long what a client goes on to send is thrown away after its request was refused in the middle: a connection that is closed with
bytes unread takes the answer with it."""


class Http(H11Protocol):
    """A connection. One that trickles its head, or never sends any, is closed (slowloris). One that sends its next request before it has
    its answer is closed after that: to read no further, as uvicorn does, is not to notice that the client has gone."""

    _limit: asyncio.TimerHandle | None = None
    _refused = False
    _begun = b""  # of a head, so much as shows its path

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It begins."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._limit = self.loop.call_later(HEAD_S, self._late)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._refused:
            return
        if self._early:
            self.cycle.keep_alive = False
            return
        if self._limit is None and not self._answering:
            self._limit = self.loop.call_later(HEAD_S, self._late)
        self._begun = (self._begun + data[:HEAD_SHOWN])[:HEAD_SHOWN]
        super().data_received(data)
        if self._answering:
            self._forget_limit()
            self._begun = b""
        if self._early and self.conn.trailing_data[0]:
            self.cycle.keep_alive = False
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """It ended."""
        self._forget_limit()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 calls no request, in the words of the API that its path belongs to, as far as that is there."""
        if self._answering:  # what came is the middle of a request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.close()
            return
        cause = sys.exc_info()[1]
        if isinstance(cause, h11.RemoteProtocolError) and cause.error_status_hint == 431:
            error = ApiError(431, f"the head is longer than {self.config.h11_max_incomplete_event_size:,} bytes")
        else:
            error = ApiError(400, "this is no HTTP/1.1 request")
        words = self._begun.decode("latin-1").partition("\r\n")[0].split(" ")
        path = self.scope["path"] if self._answering else words[1] if len(words) > 1 else ""
        body = encoded(error_body(path, error))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        self._forget_limit()
        self._limit = self.loop.call_later(LINGER_S, self.transport.close)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    @property
    def _answering(self) -> bool:
        """Is there a request whose answer is not out yet?"""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _early(self) -> bool:
        """Is that request there whole, so that what comes is the next one?"""
        return self._answering and not self.cycle.more_body

    def _forget_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _late(self) -> None:
        self._limit = None
        if not self._answering:
            self.transport.close()
