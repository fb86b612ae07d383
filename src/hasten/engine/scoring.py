"""Scoring: the log-probabilities of a prompt's own tokens, taken from the rows that its chunks compute anyway."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.engine.draw import TokenLogprob
from hasten.engine.sampler import Sampler


class PromptScores:
    """Of one prompt, each token but the first, and the ``top`` likeliest ids at its place. What was scored before a preemption stays."""

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        self._prompt, self._top = prompt, top
        self.entries: list[TokenLogprob] = []

    def wanted(self, start: int, count: int) -> range:
        """Of ``count`` positions from ``start`` on, those whose logits are needed: they lie together."""
        return range(max(start, len(self.entries)), min(start + count, len(self._prompt) - 1))

    def take(self, logits: NDArray[np.float32], sampler: Sampler) -> None:
        """Logits [R, vocab] of the positions wanted next. Raises ValueError where they hold NaN or +inf."""
        begin = len(self.entries) + 1
        if len(logits):
            self.entries += sampler.score(logits, self._prompt[begin : begin + len(logits)], self._top)
