"""Which of a request's outputs are returned."""

from collections.abc import Sequence
from math import inf


def best_choices(logprobs: Sequence[Sequence[float] | None], n: int) -> list[int]:
    """The ``n`` outputs with the highest log-probability per token (OpenAI's ``best_of``), best first, the first of equals.

    ``logprobs`` are each output's tokens'; None stands for one that failed, which comes last. An empty output counts as certain."""

    def worth(choice: int) -> float:
        tokens = logprobs[choice]
        if tokens is None:
            return inf
        return -sum(tokens) / len(tokens) if tokens else 0.0

    return sorted(range(len(logprobs)), key=worth)[:n]
