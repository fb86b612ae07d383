"""What a step of a Program must read and compute, counted from its ops: the numerators of every share of a limit."""

import math
from collections.abc import Sequence

from hasten.program import Program, RecurrentGroup, StateGroup, ops


def operations(program: Program, starts: Sequence[int], new: int, logit_rows: int) -> int:
    """Multiplications and additions of products (linear layers and attention; norms, gates and other scans are left out) for ``new``
    tokens of each sequence that begins at a position of ``starts``, with logits for ``logit_rows`` rows."""
    tokens, total = new * len(starts), 0
    pairs = {
        group.name: sum(_visible(group, position) for start in starts for position in range(start, start + new)) for group in program.states
    }  # (query, key) of one layer and head
    for op in program.ops:
        match op:
            case ops.Linear() | ops.HeadLinear():
                rows = logit_rows if program.values[op.x].rows == "R" else tokens
                total += 2 * math.prod(program.params[op.weight]) * rows
            case ops.ExpertLinear():
                chosen = program.values[op.experts].features[-1]
                total += 2 * math.prod(program.params[op.weight][1:]) * chosen * tokens
            case ops.Attend():
                total += 2 * op.heads * (op.head_dim + op.value_dim) * pairs[op.state.group]
            case ops.LinearScan():
                total += 4 * (op.heads + op.kv_heads) * op.head_dim * (op.value_dim + 1) * tokens
            case _:
                pass
    return total


def cache_bytes(program: Program, starts: Sequence[int]) -> int:
    """Bytes of state that one more token of each sequence reads, the first at a position of ``starts``."""
    return sum(
        group.bytes_per_token() * _visible(group, start) + group.bytes_per_sequence() for group in program.states for start in starts
    )


def weight_elements(program: Program) -> int:
    """Weights that a step reads whole: all but tables, of which it reads a row a token."""
    read = {name for op in program.ops if not isinstance(op, ops.Embed | ops.EmbedPositions) for name in op.params}
    return sum(math.prod(program.params[name]) for name in read)


def linear_weights(program: Program) -> tuple[str, ...]:
    """The weights of linear layers, in the order they are used; head and routers left out, which are rarely rounded."""
    routers: set[str] = {op.logits for op in program.ops if isinstance(op, ops.Route)}
    linear = [op for op in program.ops if isinstance(op, ops.Linear | ops.HeadLinear | ops.ExpertLinear)]
    return tuple(dict.fromkeys(op.weight for op in linear if op.y != "logits" and op.y not in routers))


def read_share(program: Program, tokens: int) -> float:
    """The share of the weights that a step of ``tokens`` tokens is expected to read: all, but for experts, of which each token chooses
    some, here with equal chances."""
    whole, read = 0.0, 0.0
    for op in program.ops:
        if isinstance(op, ops.Linear | ops.HeadLinear | ops.ExpertLinear):
            shape, share = program.params[op.weight], 1.0
            if isinstance(op, ops.ExpertLinear):
                share = 1 - (1 - program.values[op.experts].features[-1] / shape[0]) ** tokens
            whole += math.prod(shape)
            read += math.prod(shape) * share
    return read / whole if whole else 1.0


def _visible(group: StateGroup, position: int) -> int:
    """Cached positions that a query at ``position`` sees, its own among them; none where state is recurrent."""
    return 0 if isinstance(group, RecurrentGroup) else position - group.oldest_visible(position) + 1
