"""The memory planner: what weights, caches and arenas will take, of one model or of several, before anything is loaded."""

import dataclasses
from collections.abc import Sequence

from hasten.base.errors import UserError
from hasten.program import Program
from hasten.program.pages import MOST_SEQUENCES, scored_bytes, sequence_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes. ``cache`` holds ``cache_tokens`` in its pages, ``outside`` is for those swapped out of them, ``arena`` for a step's values
    and logits."""

    weights: int
    cache: int
    arena: int
    outside: int
    cache_tokens: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.cache + self.arena + self.outside

    def __str__(self) -> str:
        parts = [f"weights {self.weights:,}", f"cache {self.cache:,} ({self.cache_tokens:,} tokens)", f"arena {self.arena:,}"]
        return f"memory: {', '.join(parts + [f'swap {self.outside:,}'] * bool(self.outside))}; together {self.total:,} bytes"


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What is to lie in memory: ``program``, its ``weights`` and the ``values`` of a step in bytes, with what its tokens are drawn by, its
    cache in pages of ``page`` tokens, and ``outside`` bytes for those swapped out of it. A step asks for ``rows`` rows of logits at most;
    ``name`` is what errors call it."""

    name: str
    program: Program
    weights: int
    values: int
    rows: int
    page: int
    outside: int = 0

    @property
    def arena(self) -> int:
        """Bytes of a step's values and of its logits, float32."""
        return self.values + 4 * self.rows * self.program.values["logits"].features[-1]

    @property
    def sequence(self) -> int:
        """Bytes of the cache of one sequence of full length."""
        return sequence_bytes(self.program, self.page)

    @property
    def scored(self) -> int:
        """Bytes of the cache besides, for a sequence that gives no pages back."""
        return scored_bytes(self.program, self.page)


def plan_memory(loads: Sequence[Load], *, memory: int | None, free: int) -> tuple[MemoryPlan, ...]:
    """What each of ``loads`` takes, all in at most ``memory`` bytes together; the caches alone in a quarter of what is ``free``, or in
    what the rest leaves of it, unless ``memory`` is given. What the caches share is divided so that each holds as many sequences of its
    full length.

    Raises UserError, with the number that would do, where ``memory`` has no room for one sequence of each."""
    arenas, sequences = [load.arena for load in loads], [load.sequence for load in loads]
    fixed, each = sum(load.weights + load.outside + load.scored for load in loads) + sum(arenas), sum(sequences)
    rest = min(free // 4, free - fixed) if memory is None else memory - fixed
    if memory is not None and rest < each:
        wanted = "; ".join(
            f"weights{_of(load, loads)} take {load.weights:,}, the arena {arena:,} and the cache of one sequence of {load.program.context} "
            f"tokens {sequence + load.scored:,}" + f", swapped pages {load.outside:,}" * bool(load.outside)
            for load, arena, sequence in zip(loads, arenas, sequences)
        )
        raise UserError(
            f"{memory:,} bytes of memory are not enough: {wanted}; give at least {fixed + each:,}, or a smaller --max-model-len"
        )
    together = max(each, min(rest, MOST_SEQUENCES * each))
    caches = [load.scored + together * sequence // max(1, each) for load, sequence in zip(loads, sequences)]
    return tuple(
        MemoryPlan(load.weights, cache, arena, load.outside, _tokens(load, cache)) for load, arena, cache in zip(loads, arenas, caches)
    )


def added(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """What several take together."""
    return MemoryPlan(*(sum(numbers) for numbers in zip(*map(dataclasses.astuple, plans))))


def _tokens(load: Load, cache: int) -> int:
    """How many a cache of so many bytes holds; 0 where its bytes do not depend on them."""
    if not any(group.bytes_per_token() for group in load.program.states):
        return 0
    return (cache - load.scored) * load.program.context // load.sequence


def _of(load: Load, loads: Sequence[Load]) -> str:
    return "" if len(loads) == 1 else f" of {load.name}"
