"""Mailbox: where one HTTP request's news wait for it."""

import asyncio
from collections import deque

from hasten.serve.messages import Piece


class EngineGoneError(Exception):
    """The engine's process ended before the request did."""


class Mailbox:
    """One reader. However many pieces a step brings, the reader wakes once."""

    def __init__(self) -> None:
        self._pieces: deque[Piece] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._gone = False
        self.waited_s: dict[int, float] = {}
        """How long each request that has joined the batch had waited for that."""

    def put(self, piece: Piece) -> None:
        """Leave a piece for the reader."""
        self._pieces.append(piece)
        self._wake()

    def close(self) -> None:
        """Nothing more will come, though something should have."""
        self._gone = True
        self._wake()

    async def take(self) -> list[Piece]:
        """All that is there, at least one piece. Raises EngineGoneError where nothing is and nothing will come."""
        while not self._pieces:
            if self._gone:
                raise EngineGoneError
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pieces = list(self._pieces)
        self._pieces.clear()
        return pieces

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
