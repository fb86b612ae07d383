"""Answers in Redis, or whatever speaks its protocol, so that several servers share them.

Redis may be slow, gone or full, and no request fails for it: a command has `TIMEOUT` seconds in all, and after three in a row without an
answer nothing is read until a write was answered. Nobody waits for writes, so nobody waits to find out."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from hasten.base.errors import ConfigError, one_line
from hasten.serve.responses.breaker import Breaker
from hasten.serve.responses.store import Limits

TIMEOUT = 0.2
"""Seconds a command may take, with its connection."""

NAMESPACE = "hasten:answer:1:"
"""What every key begins with; the number counts up with what values mean."""

CONNECTIONS = 16
"""Most at a time."""

_LOG = logging.getLogger("hasten")


class RedisStore:
    """Values under `NAMESPACE` and the key in hex, for ``limits.seconds``; how many bytes, Redis' ``maxmemory`` bounds."""

    def __init__(self, url: str, limits: Limits, *, timeout: float = TIMEOUT, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._timeout, self._breaker = limits, timeout, Breaker(clock=clock)
        try:
            pool = BlockingConnectionPool.from_url(
                url, max_connections=CONNECTIONS, timeout=timeout, socket_timeout=timeout, socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 0), decode_responses=False, client_name="hasten",
            )  # fmt: skip
        except (ValueError, TypeError) as error:  # of a port that is no number, or an unknown option
            raise ConfigError(f"the URL of the response cache cannot be used: {one_line(str(error))}") from None
        self._redis = Redis.from_pool(pool)
        self._where = _shown(url)
        self._errors = self._refused = self._skipped = self._outages = 0

    async def get(self, key: bytes) -> bytes | None:
        """The value kept under ``key``; None at once while Redis does not answer."""
        if self._breaker.open:
            self._skipped += 1
            return None
        # No more than a value may have is ever read, whatever lies there; a longer one then lacks its end, and is none.
        found = await self._ask(lambda: self._redis.getrange(_name(key), 0, self.limits.value_bytes - 1))
        return found if isinstance(found, bytes) and found else None

    async def put(self, key: bytes, value: bytes) -> bool:
        """Keep it for as long as the limits say."""
        if len(value) > self.limits.value_bytes:
            return False
        if not self._breaker.attempt():
            self._skipped += 1
            return False
        lifetime = max(1, round(1000 * self.limits.seconds))
        return await self._ask(lambda: self._redis.set(_name(key), value, px=lifetime)) is not None

    async def close(self) -> None:
        """Close the connections."""
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(self._timeout):
                await self._redis.aclose()

    def counts(self) -> dict[str, int]:
        """Commands without an answer and with a refusal for one, those not sent because of that, and times the connection was lost."""
        return {
            "errors": self._errors, "refused": self._refused, "skipped": self._skipped, "outages": self._outages,
            "down": int(self._breaker.open),
        }  # fmt: skip

    async def _ask(self, command: Callable[[], Awaitable[object]]) -> object:
        try:
            async with asyncio.timeout(self._timeout):
                answer = await command()
        except ResponseError as error:  # Redis is there: full, or a replica that takes no writes
            self._refused += 1
            if self._refused == 1:
                _LOG.warning("hasten: the response cache at %s refuses: %s", self._where, one_line(str(error)))
            answer = None
        except (RedisError, OSError, TimeoutError) as error:
            self._errors += 1
            if self._breaker.failed():
                self._outages += 1
                reason = type(error).__name__
                _LOG.warning("hasten: the response cache at %s does not answer (%s); requests are computed meanwhile", self._where, reason)
            return None
        if self._breaker.succeeded():
            _LOG.warning("hasten: the response cache at %s answers again", self._where)
        return answer


def _name(key: bytes) -> str:
    return NAMESPACE + key.hex()


def _shown(url: str) -> str:
    """The URL without user and password."""
    parts = urlsplit(url)
    return one_line(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")[1:-1]
