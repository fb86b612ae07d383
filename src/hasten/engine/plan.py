"""What goes into the scheduler and comes out of it, as data."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from hasten.base.errors import ConfigError, UserError
from hasten.engine.batching import Batching, Continuous, FirstCome, Order
from hasten.program import Move, PageLists


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What preemption costs. A sequence of n tokens in b bytes is computed again for n · ``token_s`` seconds, or goes out and comes back
    for 2 · b · ``byte_s``. The defaults are a model of 1 G parameters at 100 GFLOP/s, and 5 GB/s."""

    token_s: float = 0.02
    byte_s: float = 2e-10

    def swap_pays(self, tokens: int, size: int) -> bool:
        """Is moving ``size`` bytes out and in cheaper than computing ``tokens`` again?"""
        return 2 * size * self.byte_s < tokens * self.token_s


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """``step_tokens`` is the budget of one step, and ``scored_tokens`` how many of them may be of prompts that are scored, for each brings
    a row of logits. A request is let in where the pages are there for its prompt and ``output_share`` of the most it may put out, beside
    what those already in are counted with so: 1 means that nobody is ever preempted for pages."""

    step_tokens: int = 512
    batching: Batching = Continuous()
    order: Order = FirstCome()
    output_share: float = 0.5
    scored_tokens: int = 64
    costs: Costs = Costs()

    def __post_init__(self) -> None:
        if not 1 <= self.batching.slots <= self.step_tokens:
            raise ConfigError(f"a step of {self.step_tokens} tokens cannot serve {self.batching.slots} sequences; give at least as many")
        if not 0 <= self.output_share <= 1:
            raise ConfigError(f"output_share is {self.output_share}; accepted are 0 to 1")
        if self.scored_tokens < 1:
            raise ConfigError(f"scored_tokens is {self.scored_tokens}; at least 1 is needed")


class NeverFitsError(UserError):
    """A request that could not run even if it were alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A request as the scheduler sees it: ``prompt`` may become up to ``sequences`` sequences, of ``most`` tokens of output each.

    ``key`` is what prefixes must have in common to be shared, None for a request that shares none; is its prompt ``scored``?"""

    id: int
    prompt: tuple[int, ...]
    most: int
    sequences: int = 1
    priority: int = 0
    key: Hashable | None = None
    scored: bool = False


class Entry(NamedTuple):
    """One sequence's part of a step: ``tokens`` at positions from ``start`` on, with ``pages`` as they are until the commit."""

    sequence: int
    start: int
    tokens: Sequence[int]
    pages: PageLists
    draws: bool
    """Is a token to be drawn from the last one's logits?"""


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """``moves`` are carried out first, then all ``entries`` are computed together."""

    moves: tuple[Move, ...]
    entries: tuple[Entry, ...]


Draws = Mapping[int, Sequence[tuple[int, int]]]
"""By drawing sequence, how it goes on: (sequence, next token) for itself and for each that forks from it. Not naming itself ends it."""


@dataclasses.dataclass(slots=True)
class Counters:
    """What happened so far. Tokens computed again after a preemption are counted apart from prompts, and never as prefix hits."""

    steps: int = 0
    prompt_tokens: int = 0
    """Of requests let in."""
    hit_tokens: int = 0
    """Of those, found in the cache."""
    computed_tokens: int = 0
    drawn_tokens: int = 0
    padding_tokens: int = 0
    recomputed: int = 0
    """Requests whose pages were given up."""
    swapped: int = 0
    """Requests whose pages were moved out."""
    forks: int = 0
    shared_steps: int = 0
    """Steps of several sequences."""
