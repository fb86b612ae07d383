"""HTTP/1.1 as uvicorn speaks it through h11, which is written in Python, with a time limit on a request's head."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0
"""Seconds until a connection must have sent a request's head: since it was made, or since the head's first byte."""


class Http(H11Protocol):
    """A connection. One that trickles its head, or never sends any, is closed (slowloris)."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It begins."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._limit = self.loop.call_later(HEAD_S, self._late)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._limit is None and not self._answering:
            self._limit = self.loop.call_later(HEAD_S, self._late)
        super().data_received(data)
        if self._answering:
            self._forget_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """It ended."""
        self._forget_limit()
        super().connection_lost(exc)

    @property
    def _answering(self) -> bool:
        """Is there a request whose answer is not out yet?"""
        return self.cycle is not None and not self.cycle.response_complete

    def _forget_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _late(self) -> None:
        self._limit = None
        if not self._answering:
            self.transport.close()
