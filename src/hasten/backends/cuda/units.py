"""What one kernel plays of a Program: ops that follow one another and whose values in between need not be written."""

from collections.abc import Sequence

from hasten.program import Fused, Products, Program, RowChain, fuse, ops, parts_of


def units_of(program: Program) -> tuple[Fused, ...]:
    """``program``, which is not fused, in order: linear layers that read the same rows; an addition, a norm and its rounding; a gate and
    its rounding; the turns of queries and keys and what goes to the cache; all else op by op."""
    readers: dict[str, int] = dict.fromkeys(program.outputs, 1)
    for op in program.ops:
        for name in op.inputs:
            readers[name] = readers.get(name, 0) + 1
    made: list[Fused] = []
    for op in fuse(program).ops:
        if isinstance(op, Products):
            made += [Fused(parts=same) for same in _alike(op.parts)]
        elif isinstance(op, RowChain):
            made += _of_chain(program, op.parts, readers)
        else:
            made += [Fused(parts=parts_of(op))]
    return tuple(made)


def _alike(parts: Sequence[ops.Op]) -> list[tuple[ops.Op, ...]]:
    """Linear layers whose weights can lie in one: of one format, into one dtype, all with a bias or none."""
    kinds: dict[object, list[ops.Op]] = {}
    for part in parts:
        if not isinstance(part, ops.Linear):
            raise TypeError(f"{type(part).__name__} among products")
        kinds.setdefault((part.weight_format, part.dtype, part.bias is None), []).append(part)
    return [tuple(same) for same in kinds.values()]


def _of_chain(program: Program, parts: Sequence[ops.Op], readers: dict[str, int]) -> list[Fused]:
    made: list[Fused] = []
    start = 0
    while start < len(parts):
        rest = parts[start:]
        count, hidden = _turns(rest, readers) or _rounded(program, rest, readers)
        made.append(Fused(parts=tuple(rest[:count]), inner=tuple((name, program.values[name]) for name in hidden)))
        start += count
    return made


def _turns(parts: Sequence[ops.Op], readers: dict[str, int]) -> tuple[int, list[str]] | None:
    """Queries and keys turned alike, and the keys' way to the cache."""
    match parts[:3]:
        case [ops.Rotate() as q, ops.Rotate() as k, ops.AppendKv() as kept] if (
            str(kept.k) == k.y and readers[k.y] == 1 and _turn(q) == _turn(k)
        ):
            return 3, [k.y]
    return None


def _turn(op: ops.Rotate) -> tuple[object, ...]:
    return op.dims, op.frequencies, op.start, op.interleaved, op.magnitude


def _rounded(program: Program, parts: Sequence[ops.Op], readers: dict[str, int]) -> tuple[int, list[str]]:
    """A norm or a gate with the addition before it and the rounding behind it."""
    count, main = 0, parts[0]
    match parts[:2]:
        case [ops.Add() as add, (ops.RmsNorm() | ops.LayerNorm()) as norm] if str(norm.x) == add.y:
            count, main = 1, norm
    if not isinstance(main, ops.RmsNorm | ops.LayerNorm | ops.Gate):
        return 1, []
    behind = parts[count + 1] if len(parts) > count + 1 else None
    if isinstance(behind, ops.QuantizeRows | ops.QuantizeFp8) and str(behind.x) == main.y:
        short = isinstance(main, ops.RmsNorm | ops.LayerNorm) and main.group != program.values[main.x].features[-1]
        return count + 2, [main.y] if readers[main.y] == 1 and not short else []
    return count + 1, []
