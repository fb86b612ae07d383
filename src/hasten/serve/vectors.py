"""Vectors: what the engine's process embeds, under the server's numbers, between the steps of its requests."""

import traceback

from hasten.base.errors import UserError
from hasten.engine import LLM
from hasten.engine.embedder import Embedder, Embedding
from hasten.serve.messages import Embed, Vector


class Vectors:
    """Runs an Embedder beside each engine of ``llm`` that it needs. What fails is one request's, never the loop's."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._embedders: dict[int, Embedder] = {}  # by context
        self._owners: dict[tuple[int, int], tuple[int, int]] = {}  # by context and the embedder's number: the server's, and which prompt

    @property
    def busy(self) -> bool:
        """Is there anything to compute?"""
        return bool(self._owners)

    def take(self, order: Embed) -> list[Vector]:
        """Take prompts; what is to be said of them at once, which is nothing unless they are refused."""
        try:
            contexts = [self._context(prompt) for prompt in order.prompts]
            for context in sorted({*contexts} - {*self._embedders}):
                self._embedders[context] = Embedder(self._llm.engine(context), self._llm.model.spec.width)
        except UserError as error:
            return [Vector(order.id, 0, b"", str(error), "request")]
        except Exception as error:
            traceback.print_exc()
            return [Vector(order.id, 0, b"", f"{type(error).__name__}: {error}", "engine")]
        for place, (context, prompt) in enumerate(zip(contexts, order.prompts)):
            self._owners[context, self._embedders[context].submit(prompt)] = order.id, place
        return []

    def _context(self, prompt: list[int]) -> int:
        """Of the Program that a prompt is for by its own length, whatever it came with."""
        length = len(self._llm.preparer.prompt_ids(prompt))
        return next(context for context in self._llm.preparer.contexts if length <= context)

    def abort(self, id: int) -> None:
        """Nobody waits for this request any more; an unknown one has ended already."""
        for key in [key for key, (owner, _) in self._owners.items() if owner == id]:
            self._embedders[key[0]].abort(key[1])
            del self._owners[key]

    def step(self) -> list[Vector]:
        """Compute a step of each embedder that has work; what is done by it."""
        told: list[Vector] = []
        for context, embedder in self._embedders.items():
            if embedder.busy:
                told += [self._vector(self._owners.pop((context, one.number)), one) for one in embedder.step()]
        return told

    def _vector(self, owner: tuple[int, int], one: Embedding) -> Vector:
        if one.vector is None:
            return Vector(*owner, b"", one.error, "engine")
        return Vector(*owner, one.vector.astype("<f4").tobytes())
