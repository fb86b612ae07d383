"""What a step learns from: examples in an order that is a function of the seed and the step's number alone."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and from which one on they are learned (1: all but the first, which nothing predicts; later for prompts)."""

    ids: tuple[int, ...]
    learned_from: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.learned_from < len(self.ids):
            raise ConfigError(f"an example of {len(self.ids)} tokens cannot be learned from token {self.learned_from} on; give it more")

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return len(self.ids) - self.learned_from


@dataclasses.dataclass(frozen=True, slots=True)
class Batches:
    """``size`` examples a step. Every example comes once before one comes again, each time in another order."""

    examples: tuple[Example, ...]
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError("there is no text to learn from; give more, or shorter sequences")
        if self.size < 1:
            raise ConfigError(f"a step of {self.size} examples learns nothing; give 1 or more")

    def at(self, step: int) -> tuple[Example, ...]:
        """The examples of step number ``step``, from 0."""
        count = len(self.examples)
        places = range(step * self.size, (step + 1) * self.size)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return tuple(self.examples[orders[place // count][place % count]] for place in places)

    def epochs(self, steps: int) -> float:
        """How often every example has come after so many steps."""
        return steps * self.size / len(self.examples)

    @property
    def sha256(self) -> str:
        """Of all examples in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.asarray([len(example.ids), example.learned_from, *example.ids], np.int64).tobytes())
        return digest.hexdigest()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))


def examples_of(documents: Iterable[Sequence[int]], sequence: int) -> tuple[Example, ...]:
    """Documents of token ids, cut into examples that learn up to ``sequence`` tokens; none crosses from one document into the next.

    What is left of a document is an example where it has a quarter of that, or is all there is of it."""
    if sequence < 1:
        raise ConfigError(f"sequence is {sequence}; accepted is 1 or more")
    made = []
    for ids in documents:
        for begin in range(0, len(ids) - 1, sequence):
            piece = tuple(ids[begin : begin + sequence + 1])
            if begin == 0 or len(piece) > sequence // 4:
                made.append(Example(piece))
    return tuple(made)
