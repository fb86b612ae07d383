"""What goes into the scheduler and comes out of it, as data."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from hasten.base.errors import ConfigError, UserError
from hasten.engine.batching import Batching, Continuous, FirstCome, Order
from hasten.program import Move, PageLists


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What computing and moving take. A sequence of n tokens in b bytes is computed again for n · ``token_s`` seconds, or goes out and
    comes back for 2 · b · ``byte_s``. The defaults are a model of 1 G parameters at 100 GFLOP/s, and 5 GB/s.

    A step of ``rows`` sequences with one token each takes ``step_s``, 0 where that is not known; ``tried`` is how many tokens a step had
    when ``token_s`` was measured, 0 where it was not."""

    token_s: float = 0.02
    byte_s: float = 2e-10
    rows: int = 0
    step_s: float = 0.0
    tried: int = 0

    def swap_pays(self, tokens: int, size: int) -> bool:
        """Is moving ``size`` bytes out and in cheaper than computing ``tokens`` again?"""
        return 2 * size * self.byte_s < tokens * self.token_s

    def fits(self, rows: int) -> bool:
        """Was ``step_s`` measured with about as many rows?"""
        return 4 * abs(self.rows - rows) <= rows

    def tokens_beside(self, rows: int, behind: int, stretch: float) -> int:
        """How many tokens ``behind`` sequences may compute beside ``rows`` with one token each, so that the step takes ``stretch`` times as
        long; where more are behind than not, their share is as much larger. 0 where a step without them has to be timed first.

        A token costs hardly more than twice one of the rows, whatever else a busy machine made of its time."""
        if not self.step_s or not self.fits(rows):
            return 0
        step_s = self.step_s * min(1.0, rows / self.rows)
        token_s, most = (self.token_s, 2 * self.tried) if self.tried else (step_s / rows, rows)  # no leaps into the unknown
        share = (stretch - 1) * max(1.0, behind / rows)
        return max(1, int(share * rows / 2), min(int(share * step_s / token_s), most))


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """``step_tokens`` is the budget of one step, and ``scored_tokens`` how many of them may be of prompts that are scored, for each brings
    a row of logits. A request is let in where the pages are there for its prompt and ``output_share`` of the most it may put out, beside
    what those already in are counted with so: 1 means that nobody is ever preempted for pages.

    Prompts beside running sequences take what the budget leaves, or less, so that a step becomes about ``stretch`` times as long by them;
    1.8 keeps the time between two tokens below twice what it is without. Infinite, the plan hangs on no clock. ``costs`` are measured
    unless given."""

    step_tokens: int = 512
    batching: Batching = Continuous()
    order: Order = FirstCome()
    output_share: float = 0.5
    costs: Costs | None = None
    stretch: float = math.inf
    scored_tokens: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.batching.slots <= self.step_tokens:
            raise ConfigError(f"a step of {self.step_tokens} tokens cannot serve {self.batching.slots} sequences; give at least as many")
        if not 0 <= self.output_share <= 1:
            raise ConfigError(f"output_share is {self.output_share}; accepted are 0 to 1")
        if self.scored_tokens < 1:
            raise ConfigError(f"scored_tokens is {self.scored_tokens}; at least 1 is needed")
        if not self.stretch > 1:
            raise ConfigError(f"stretch is {self.stretch}; accepted is more than 1")


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
    """One sequence's part of a step: ``tokens`` at positions from ``start`` on, with ``pages`` as they are until the commit. The last of
    them is below 0 where it is being drawn."""

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
