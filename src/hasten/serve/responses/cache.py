"""The exact cache: same model, same tenant, same tokens, same parameters, same answer."""

from dataclasses import dataclass
from typing import Literal

from hasten.serve.responses.answer import Answer, decode_answer, encode_answer
from hasten.serve.responses.key import Asked, key_of, must_repeat
from hasten.serve.responses.store import Store

HEADER = "x-hasten-response-cache"
"""The response header that says an answer was not computed for its request."""


@dataclass(frozen=True, slots=True)
class Hit:
    """An answer that is there. ``similarity`` is the cosine between this prompt's embedding and that of the prompt it was computed for."""

    answer: Answer
    kind: Literal["exact", "semantic"] = "exact"
    similarity: float = 1.0

    @property
    def header(self) -> str:
        """The value of `HEADER`."""
        return "exact" if self.kind == "exact" else f"semantic; similarity={self.similarity:.4f}"


class ResponseCache:
    """Answers over a ``store``. Closed, which makes every request a miss, until `open` tells the model's digest."""

    def __init__(self, store: Store, value_bytes: int) -> None:
        self.store, self._value_bytes = store, value_bytes
        self._model: bytes | None = None
        self._hits = self._misses = self._damaged = self._kept = self._too_large = 0

    def open(self, model: bytes) -> None:
        """From now on answers are those of the model of this digest (`model_digest`)."""
        self._model = model

    @property
    def model(self) -> bytes | None:
        """The digest, None while closed."""
        return self._model

    async def get(self, asked: Asked) -> Hit | None:
        """The answer it gave before, if it must give it again and that is there."""
        if self._model is None or not must_repeat(asked.params):
            return None
        key = key_of(self._model, asked)
        value = await self.store.get(key)
        answer = None if value is None else decode_answer(key, value)
        self._hits, self._misses = self._hits + (answer is not None), self._misses + (answer is None)
        self._damaged += value is not None and answer is None
        return None if answer is None else Hit(answer)

    async def put(self, asked: Asked, answer: Answer) -> None:
        """Keep what was computed; nothing where it need not come again. Not to be waited for before the answer is sent."""
        if self._model is None or not must_repeat(asked.params):
            return
        key = key_of(self._model, asked)
        value = encode_answer(key, answer)
        if len(value) > self._value_bytes:
            self._too_large += 1
            return
        self._kept += await self.store.put(key, value)

    async def close(self) -> None:
        """Close the store."""
        self._model = None
        await self.store.close()

    def counts(self) -> dict[str, int]:
        """What happened so far by name; the store's own begin with ``store_``. Damaged entries are misses too."""
        return {
            "hits": self._hits, "misses": self._misses, "damaged": self._damaged, "kept": self._kept, "too_large": self._too_large,
            **{f"store_{name}": count for name, count in self.store.counts().items()},
        }  # fmt: skip
