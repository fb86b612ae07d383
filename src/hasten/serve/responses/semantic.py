"""The semantic cache: a prompt is answered with what a prompt like it got. Nothing says that it is the right answer: it is for those who
ask for it, and every answer from it is marked (`Hit.header`)."""

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, one_line
from hasten.serve.responses.answer import Answer
from hasten.serve.responses.cache import Hit
from hasten.serve.responses.key import Asked, group_of, must_repeat
from hasten.serve.responses.store import ENTRY_OVERHEAD, Limits

Embed = Callable[[Sequence[int]], Awaitable[NDArray[np.float32]]]
"""Token ids → one vector [width], of any length but 0."""

_LOG = logging.getLogger("hasten")


@dataclass(frozen=True, slots=True)
class _Entry:
    put_at: float
    group: bytes
    answer: Answer
    size: int


class SemanticCache:
    """The nearest prompt of the same model, tenant and parameters, by the cosine of their embeddings; an answer where that is at least
    ``threshold``. At most ``entries`` prompts are kept, and answers within ``limits``; those longest unused make room. Search is one
    product of a matrix [entries, width] with a vector.

    Requests that need not repeat and those whose answer holds the prompt (``echo``, ``prompt_logprobs``) are left alone. An embedding that
    fails is a miss."""

    def __init__(
        self, embed: Embed, model: bytes, *, limits: Limits, threshold: float = 0.97, entries: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        check_threshold(threshold)
        if entries < 1:
            raise ConfigError(f"the semantic cache is to hold {entries} prompts: give 1 or more, or leave it off")
        self._embed, self._model, self._threshold, self._entries, self._limits = embed, model, threshold, entries, limits
        self._clock = clock
        self._vectors: NDArray[np.float32] = np.empty((0, 0), np.float32)  # [entries, width] once the width is known
        self._groups = np.full(entries, -1, np.int64)  # the number of each slot's group, -1 for an empty slot
        self._numbers: dict[bytes, tuple[int, int]] = {}  # a group's number, and how many slots are its
        self._next = 0  # the number of the next group
        self._slots: OrderedDict[int, _Entry] = OrderedDict()  # the one used last comes last
        self._free: list[int] = []  # empty slots below the end
        self._end = self._bytes = 0
        self._hits = self._misses = self._failed = 0

    async def get(self, asked: Asked) -> Hit | None:
        """The answer to the nearest prompt, where it is near enough."""
        if not _may_be_shared(asked):
            return None
        vector = await self._embedded(asked.prompt)
        found = None if vector is None else self._nearest(group_of(self._model, asked), vector)
        self._hits, self._misses = self._hits + (found is not None), self._misses + (found is None)
        return found

    async def put(self, asked: Asked, answer: Answer) -> None:
        """Keep an answer for prompts like this one."""
        size = len(msgspec.msgpack.encode(answer)) + ENTRY_OVERHEAD
        if not _may_be_shared(asked) or size > min(self._limits.value_bytes, self._limits.bytes):
            return
        if (vector := await self._embedded(asked.prompt)) is None:
            return
        if self._vectors.shape[1] != len(vector):
            self.clear()
            self._vectors = np.zeros((self._entries, len(vector)), np.float32)
        while self._bytes + size > self._limits.bytes or len(self._slots) == self._entries:
            self._let_go(next(iter(self._slots)))
        if not self._free:
            self._free.append(self._end)
            self._end += 1
        slot, group = self._free.pop(), group_of(self._model, asked)
        number, count = self._numbers.get(group, (self._next, 0))
        self._next += not count
        self._numbers[group] = number, count + 1
        self._vectors[slot], self._groups[slot] = vector, number
        self._slots[slot] = _Entry(self._clock(), group, answer, size)
        self._bytes += size

    def clear(self) -> None:
        """Forget all prompts."""
        self._slots.clear()
        self._numbers.clear()
        self._free.clear()
        self._groups[:] = -1
        self._end = self._bytes = 0

    def counts(self) -> dict[str, int]:
        """What happened so far, and how many prompts and bytes of answers are there, by name."""
        there = {"entries": len(self._slots), "bytes": self._bytes}
        return {"hits": self._hits, "misses": self._misses, "failed": self._failed, **there}

    def _nearest(self, group: bytes, vector: NDArray[np.float32]) -> Hit | None:
        if group not in self._numbers or self._vectors.shape[1] != len(vector):
            return None
        cosines = self._vectors[: self._end] @ vector
        cosines[self._groups[: self._end] != self._numbers[group][0]] = -np.inf
        now = self._clock()
        near = np.flatnonzero(cosines >= self._threshold)
        for slot in near[np.argsort(-cosines[near], kind="stable")].tolist():
            entry = self._slots[slot]
            if now - entry.put_at < self._limits.seconds:
                self._slots.move_to_end(slot)
                return Hit(entry.answer, "semantic", min(1.0, float(cosines[slot])))
        return None

    def _let_go(self, slot: int) -> None:
        entry = self._slots.pop(slot)
        self._bytes -= entry.size
        self._groups[slot] = -1
        self._free.append(slot)
        number, count = self._numbers.pop(entry.group)
        if count > 1:
            self._numbers[entry.group] = number, count - 1

    async def _embedded(self, prompt: Sequence[int]) -> NDArray[np.float32] | None:
        """The prompt's embedding at length 1."""
        try:
            vector = np.asarray(await self._embed(prompt), np.float32).reshape(-1)
        except Exception as error:  # of whoever gave the function: it must cost a request nothing but the hit
            self._failed += 1
            _LOG.warning("hasten: a prompt could not be embedded for the semantic cache: %s", one_line(str(error)))
            return None
        length = float(np.linalg.norm(vector))
        if not 0.0 < length < float("inf"):
            self._failed += 1
            return None
        unit: NDArray[np.float32] = vector / np.float32(length)
        return unit


def check_threshold(threshold: float) -> None:
    """Raise ConfigError for a similarity that is none."""
    if not 0.0 < threshold < 1.0:
        raise ConfigError(f"similarity threshold is {threshold}: give a number between 0 and 1; the exact cache has what is the same")


def _may_be_shared(asked: Asked) -> bool:
    return must_repeat(asked.params) and not asked.params.echo and asked.params.prompt_logprobs is None
