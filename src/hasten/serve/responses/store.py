"""Where answers are kept: bytes by key, bounded."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hasten.base.errors import ConfigError, MissingExtraError, one_line

ENTRY_OVERHEAD = 400
"""Bytes that an entry takes beside its value: key, table, and what Python adds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept. Redis bounds ``bytes`` by its own ``maxmemory``."""

    bytes: int = 256 << 20
    """Of all values together."""
    value_bytes: int = 4 << 20
    """Of one value; a longer answer is not kept."""
    seconds: float = 3600.0
    """An entry's age at which it is gone."""

    def __post_init__(self) -> None:
        for name in ("bytes", "value_bytes", "seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of the response cache is {getattr(self, name)}: give more than 0, or leave the cache off")


class Store(Protocol):
    """Keys are 32 bytes. A store that cannot answer has nothing: it does not raise."""

    async def get(self, key: bytes) -> bytes | None:
        """The value kept under ``key``, of at most ``Limits.value_bytes``."""
        ...

    async def put(self, key: bytes, value: bytes) -> bool:
        """Keep it, if that is possible, and say whether it was; whatever was under ``key`` is gone."""
        ...

    async def close(self) -> None:
        """Let go of connections; not used after."""
        ...

    def counts(self) -> dict[str, int]:
        """What happened so far, and what is there now, by name."""
        ...


class MemoryStore:
    """Values in this process; the ones longest unused make room. ``clock`` gives seconds that only grow.

    An entry's age counts from when it was put, however often it is read."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self._entries: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()  # the one used last comes last
        self._bytes = self._evicted = self._expired = 0

    async def get(self, key: bytes) -> bytes | None:
        """The value kept under ``key``."""
        found = self._entries.get(key)
        if found is None:
            return None
        put_at, value = found
        if self._clock() - put_at >= self.limits.seconds:
            self._drop(key)
            self._expired += 1
            return None
        self._entries.move_to_end(key)
        return value

    async def put(self, key: bytes, value: bytes) -> bool:
        """Keep it; what alone is more than the bounds is not."""
        self._drop(key)
        size = len(value) + ENTRY_OVERHEAD
        if len(value) > self.limits.value_bytes or size > self.limits.bytes:
            return False
        now = self._clock()
        while self._bytes + size > self.limits.bytes:
            oldest = next(iter(self._entries))
            gone = now - self._entries[oldest][0] >= self.limits.seconds
            self._drop(oldest)
            self._expired, self._evicted = self._expired + gone, self._evicted + (not gone)
        self._entries[key] = now, value
        self._bytes += size
        return True

    async def close(self) -> None:
        """Let go of everything."""
        self._entries.clear()
        self._bytes = 0

    def counts(self) -> dict[str, int]:
        """entries and bytes there are, and how many went to make room or by age."""
        return {"entries": len(self._entries), "bytes": self._bytes, "evicted": self._evicted, "expired": self._expired}

    def _drop(self, key: bytes) -> None:
        if found := self._entries.pop(key, None):
            self._bytes -= len(found[1]) + ENTRY_OVERHEAD


def open_store(where: str, limits: Limits) -> Store:
    """The store of that name: "memory", or the URL of a Redis: redis://HOST:PORT/NUMBER, rediss:// or unix://. Nothing is connected to yet.

    Raises ConfigError for what is neither, MissingExtraError without the client library."""
    if where == "memory":
        return MemoryStore(limits)
    scheme, separator, _ = where.partition("://")
    if not separator or scheme not in {"redis", "rediss", "unix"}:
        # a URL may hold a password, so only its beginning is shown
        raise ConfigError(f"response cache {one_line(scheme, 40)}; accepted: memory, redis://HOST:PORT/NUMBER, rediss://…, unix://PATH")
    try:
        from hasten.serve.responses.redis import RedisStore
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "redis":
            raise
        raise MissingExtraError("a response cache in Redis", "redis") from None
    return RedisStore(where, limits)
