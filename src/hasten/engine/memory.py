"""The memory planner: what weights, caches and arenas will take, of one model or of several, before anything is loaded."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from hasten.base.errors import UserError
from hasten.program import Program, Value
from hasten.program.pages import MOST_SEQUENCES, sequence_bytes

ELEMENT_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2}
"""Of values; others have 4."""


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
    """What is to lie in memory: ``program`` with ``weights`` bytes of weights, for at most ``slots`` sequences in steps of up to
    ``step_tokens`` tokens, of which ``scored_rows`` of prompts are scored, its cache in pages of ``page`` tokens, and ``outside`` bytes for
    those swapped out of it. ``name`` is what errors call it."""

    name: str
    program: Program
    weights: int
    slots: int
    step_tokens: int
    scored_rows: int = 0
    page: int = 16
    outside: int = 0

    @property
    def arena(self) -> int:
        """Bytes of a step's values."""
        return arena_bytes(self.program, min(self.step_tokens, self.program.context), self.slots, self.scored_rows)

    @property
    def sequence(self) -> int:
        """Bytes of the cache of one sequence of full length."""
        return sequence_bytes(self.program, self.page)


def plan_memory(loads: Sequence[Load], *, memory: int | None, free: int) -> tuple[MemoryPlan, ...]:
    """What each of ``loads`` takes, all in at most ``memory`` bytes together; the caches alone in a quarter of what is ``free``, unless
    ``memory`` is given. What the caches share is divided so that each holds as many sequences of its full length.

    Raises UserError, with the number that would do, where ``memory`` has no room for one sequence of each."""
    arenas, sequences = [load.arena for load in loads], [load.sequence for load in loads]
    fixed, each = sum(load.weights + load.outside for load in loads) + sum(arenas), sum(sequences)
    rest = free // 4 if memory is None else memory - fixed
    if memory is not None and rest < each:
        wanted = "; ".join(
            f"weights{_of(load, loads)} take {load.weights:,}, the arena {arena:,} and the cache of one sequence of {load.program.context} "
            f"tokens {sequence:,}" + f", swapped pages {load.outside:,}" * bool(load.outside)
            for load, arena, sequence in zip(loads, arenas, sequences)
        )
        raise UserError(
            f"{memory:,} bytes of memory are not enough: {wanted}; give at least {fixed + each:,}, or a smaller --max-model-len"
        )
    together = max(each, min(rest, MOST_SEQUENCES * each))
    caches = [together * sequence // max(1, each) for sequence in sequences]
    return tuple(
        MemoryPlan(load.weights, cache, arena, load.outside, _tokens(load, cache)) for load, arena, cache in zip(loads, arenas, caches)
    )


def added(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """What several take together."""
    return MemoryPlan(*(sum(numbers) for numbers in zip(*map(dataclasses.astuple, plans))))


def arena_bytes(program: Program, tokens: int, slots: int, scored_rows: int) -> int:
    """Bytes of the values that live at the same time in a step of ``tokens`` tokens, at their most, and of its logits: a row for each of
    ``slots`` sequences and once more for the sampler, and so many that prompts are scored by."""
    vocab = program.values["logits"].features[-1]
    rows = {"T": tokens, "S": slots, "R": tokens}
    sizes = {name: 0 if _is_logits(value, vocab) else _bytes(program, value, rows) for name, value in program.values.items()}
    last = {name: index for index, op in enumerate(program.ops) for name in (*op.inputs, *op.outputs)}
    live, most = 0, 0
    for index, op in enumerate(program.ops):
        live += sum(sizes[name] for name in op.outputs)
        most = max(most, live)
        live -= sum(sizes[name] for name in {*op.inputs, *op.outputs} if last[name] == index)
    return most + 4 * vocab * (2 * slots + min(scored_rows, tokens))


def _is_logits(value: Value, vocab: int) -> bool:
    """Is it as wide as the vocabulary, a row for each that was asked for?"""
    return value.rows == "R" and value.features[-1:] == (vocab,)


def _bytes(program: Program, value: Value, rows: Mapping[str, int]) -> int:
    features = math.prod(program.context if size < 0 else size for size in value.features)
    return rows[value.rows] * features * ELEMENT_BYTES.get(value.dtype, 4)


def _tokens(load: Load, cache: int) -> int:
    """How many a cache of so many bytes holds; 0 where its bytes do not depend on them."""
    if not any(group.bytes_per_token() for group in load.program.states):
        return 0
    return cache * load.program.context // load.sequence


def _of(load: Load, loads: Sequence[Load]) -> str:
    return "" if len(loads) == 1 else f" of {load.name}"
