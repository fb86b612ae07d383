"""The memory planner: what weights, cache and arena will take, before anything is loaded."""

import dataclasses
import math

from hasten.base.errors import UserError
from hasten.program import Program
from hasten.program.pages import MOST_SEQUENCES

ELEMENT_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2}
"""Of values; others have 4."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes. ``cache`` holds ``cache_tokens`` in its pages, ``outside`` is for those swapped out of them, ``arena`` for a step's values."""

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


def plan_memory(
    program: Program, weights: int, *, slots: int, step_tokens: int, memory: int | None, free: int, outside: int = 0
) -> MemoryPlan:  # fmt: skip
    """What ``program`` takes with ``weights`` bytes of weights, in at most ``memory`` bytes; its cache alone in a quarter of what is
    ``free``, unless ``memory`` is given.

    Raises UserError, with the number that would do, where ``memory`` has no room for one sequence of full length."""
    arena = arena_bytes(program, min(step_tokens, program.context), slots)
    per_token = sum(group.bytes_per_token() for group in program.states)
    sequence = per_token * program.context + sum(2 * group.bytes_per_sequence() for group in program.states)
    rest = free // 4 if memory is None else memory - weights - arena - outside
    if memory is not None and rest < sequence:
        least = weights + arena + outside + sequence
        raise UserError(
            f"{memory:,} bytes of memory are not enough: weights take {weights:,}, the arena {arena:,} and the cache of one sequence of "
            f"{program.context} tokens {sequence:,}; give at least {least:,}, or a smaller --max-model-len"
        )
    cache = max(sequence, min(rest, MOST_SEQUENCES * sequence))
    return MemoryPlan(weights, cache, arena, outside, cache * program.context // sequence if per_token else 0)


def arena_bytes(program: Program, tokens: int, slots: int) -> int:
    """Bytes of the values that live at the same time in a step of ``tokens`` tokens, at their most, and of its logits."""
    rows = {"T": tokens, "S": slots, "R": slots}
    last = {name: index for index, op in enumerate(program.ops) for name in (*op.inputs, *op.outputs)}
    live, most = 0, 0
    for index, op in enumerate(program.ops):
        live += sum(_bytes(program, name, rows) for name in op.outputs)
        most = max(most, live)
        live -= sum(_bytes(program, name, rows) for name in {*op.inputs, *op.outputs} if last[name] == index)
    return most


def _bytes(program: Program, name: str, rows: dict[str, int]) -> int:
    value = program.values[name]
    features = math.prod(program.context if size < 0 else size for size in value.features)
    return rows[value.rows] * features * ELEMENT_BYTES.get(value.dtype, 4)
