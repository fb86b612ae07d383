"""Compiling: a Program and its weights → a native tape. Kernels resolved, places fixed, weights packed, once."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from hasten import _native
from hasten.backends.cpu.arena import Arena
from hasten.backends.cpu.packed import PackedWeights
from hasten.base.errors import UnsupportedError
from hasten.formats.weights import Array, Weights
from hasten.program import KvGroup, Program, ops
from hasten.spec import Causal, SlidingWindow

LOGITS = -1  # the place that is the caller's array
GROUP = 128  # k per int4 scale
KERNELS = (
    ops.Embed, ops.RmsNorm, ops.QuantizeRows, ops.Linear, ops.Rotate, ops.AppendKv, ops.Attend, ops.Add, ops.Gate, ops.SelectRows,
)  # fmt: skip
NATIVE_DTYPES = {"float32", "int8", "int32"}


def unsupported_ops(program: Program) -> tuple[str, ...]:
    """What ``program`` needs and no native kernel does, each once, with the reason; empty where it can be compiled."""
    reasons = dict.fromkeys(reason for op in program.ops if (reason := _refusal(program, op)))
    return tuple(reasons)


def _refusal(program: Program, op: ops.Op) -> str:
    name = type(op).__name__
    if not isinstance(op, KERNELS):
        return name
    match op:
        case ops.Gate(activation=activation) if not isinstance(activation, str):
            return f"Gate with {type(activation).__name__}"
        case ops.Gate() if program.values[op.gate].features != program.values[op.up].features:
            return "Gate with one number a row"
        case ops.Attend(visible=visible) if not isinstance(visible, Causal | SlidingWindow):
            return f"Attend under {type(visible).__name__}"
        case ops.Attend() | ops.AppendKv() if not isinstance(program.state(op.state.group), KvGroup):
            return f"{name} over latent rows"
    if any(program.values[value].dtype not in NATIVE_DTYPES for value in op.outputs):
        return f"{name} in {program.values[op.outputs[0]].dtype}"
    return ""


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A tape and the page pools it writes to, in the order of the Program's state groups; ``weight_bytes`` are read by every step.

    ``packed`` weights were packed anew, the others came from the cache."""

    tape: _native.Tape
    pools: tuple[_native.PagePool, ...]
    weight_bytes: int
    packed: int


def compile_program(
    program: Program, weights: Weights, packed: PackedWeights, pool: _native.ThreadPool, *, isa: str, most_tokens: int, page: int,
    pages: Mapping[str, int],
) -> Compiled:  # fmt: skip
    """The tape of ``program`` for steps of up to ``most_tokens`` tokens. ``pages`` gives each state group's number of pages.

    Raises UnsupportedError naming the ops that have no native kernel."""
    refused = unsupported_ops(program)
    if refused:
        raise UnsupportedError(f"the cpu backend has no kernel for {', '.join(refused)}; use backend 'reference'")
    return _Compiler(program, weights, packed, pool, most_tokens).compile(isa, page, pages)


class _Compiler:
    """One pass over the ops: places are taken when a value is made and given back after its last use."""

    def __init__(self, program: Program, weights: Weights, packed: PackedWeights, pool: _native.ThreadPool, most_tokens: int) -> None:
        self.program, self.weights, self.store, self.pool, self.most_tokens = program, weights, packed, pool, most_tokens
        self.arena = Arena()
        self.places: dict[str, int] = {"logits": LOGITS}
        self.fed: dict[str, int] = {}  # value → where its bf16 rows lie
        self.tables: dict[tuple[tuple[float, ...], float], tuple[int, int]] = {}
        self.last_use = {name: index for index, op in enumerate(program.ops) for name in (*op.inputs, *op.outputs)}
        self.packed: dict[tuple[str, str], _native.WeightBuffer] = {}
        self.done: set[str] = set()  # values whose bf16 rows are on the tape
        self.weight_bytes = 0

    def compile(self, isa: str, page: int, pages: Mapping[str, int]) -> Compiled:
        program = self.program
        for op in program.ops:  # tables are written before the first op, so nothing may have lain where they lie
            if isinstance(op, ops.Rotate) and (key := (op.frequencies, op.magnitude)) not in self.tables:
                size = self.most_tokens * (op.dims // 2) * 4
                self.tables[key] = self.arena.take(size), self.arena.take(size)
        places = [self._plan(index, op) for index, op in enumerate(program.ops)]
        vocab = program.values["logits"].features[-1]
        tape = _native.Tape(self.pool, isa, self.arena.size, self.most_tokens, vocab, program.context)
        groups = [group for group in program.states if isinstance(group, KvGroup)]
        pools = tuple(
            _native.PagePool(group.layers, pages[group.name], page, group.kv_heads, group.key_dim, group.value_dim) for group in groups
        )
        self.group_index = {group.name: tape.group(pool) for group, pool in zip(groups, pools, strict=True)}
        for (frequencies, magnitude), (cos, sin) in self.tables.items():
            tape.rotary_table(list(frequencies), magnitude, cos, sin)
        for op, where in zip(program.ops, places, strict=True):
            self._emit(tape, op, where)
        return Compiled(tape, pools, self.weight_bytes, self.store.fill())

    # --- first: where everything lies

    def _plan(self, index: int, op: ops.Op) -> dict[str, int]:
        """Take places for what ``op`` makes; give back those of values nobody reads any more."""
        made = {name: self._take(name) for name in op.outputs if name not in self.places}
        self.places.update(made)
        if isinstance(op, ops.Linear) and op.scale is None and op.x not in self.fed:
            self.fed[op.x] = self.arena.take(self._tile_rows() * _stride(self._width(op.x), 2) * 2)
        where = {name: self.places[name] for name in (*op.inputs, *op.outputs)}
        for name in {*op.inputs, *op.outputs}:
            if self.last_use[name] == index and self.places[name] != LOGITS:
                self.arena.give_back(self.places[name])
                if name in self.fed:
                    self.arena.give_back(self.fed[name])
        return where

    def _take(self, name: str) -> int:
        if self.program.values[name].dtype == "int8":
            return self.arena.take(self._tile_rows() * _stride(self._width(name), 1))
        return self.arena.take(self._tile_rows() * self._width(name) * 4)

    def _width(self, name: str) -> int:
        return self.program.values[name].features[-1]

    def _tile_rows(self) -> int:
        """A tile reads 16 rows, whatever the batch."""
        return -(-self.most_tokens // 16) * 16

    # --- then: the ops

    def _emit(self, tape: _native.Tape, op: ops.Op, at: dict[str, int]) -> None:
        values, params = self.program.values, self.program.params
        match op:
            case ops.Embed():
                tape.embed(self.store.table(op.weight, self.weights[op.weight]), op.scale, at[op.y])
            case ops.RmsNorm():
                n = values[op.x].features[-1]
                tape.rms_norm(
                    values[op.x].rows == "R", at[op.x], at[op.y], n, op.group, _floats(self.weights.array(op.weight)), op.eps, op.offset
                )
            case ops.QuantizeRows():
                n = self._width(op.x)
                tape.feed(values[op.x].rows == "R", at[op.x], at[op.q], at[op.scale], n, _padded(n), _stride(n, 1), True)
            case ops.Linear():
                self._emit_linear(tape, op, at)
            case ops.Rotate():
                cos, sin = self.tables[op.frequencies, op.magnitude]
                head_dim = values[op.x].features[-1] // op.heads
                tape.rotate(at[op.x], at[op.y], cos, sin, op.heads, head_dim, op.start, op.dims, op.interleaved)
            case ops.AppendKv():
                tape.append_kv(self.group_index[op.state.group], op.state.slot, at[op.k], at[op.v or op.k])
            case ops.Attend():
                tape.attend(
                    self.group_index[op.state.group], op.state.slot, at[op.q], at[op.y], op.heads, op.kv_heads, op.head_dim, op.value_dim,
                    op.scale, op.visible.size if isinstance(op.visible, SlidingWindow) else 0, op.softcap or 0.0, list(op.slopes or ()),
                    [] if op.sinks is None else _floats(self.weights.array(op.sinks)),
                )  # fmt: skip
            case ops.Add():
                tape.add(at[op.a], at[op.b], at[op.y], values[op.y].features[-1])
            case ops.Gate():
                tape.gate(str(op.activation), at[op.gate], at[op.up], at[op.y], values[op.y].features[-1])
            case ops.SelectRows():
                tape.select_rows(at[op.x], at[op.y], values[op.y].features[-1])
            case _:
                raise TypeError(f"{type(op).__name__} for {params} was let through by unsupported_ops")

    def _emit_linear(self, tape: _native.Tape, op: ops.Linear, at: dict[str, int]) -> None:
        logit_rows = self.program.values[op.x].rows == "R"
        width = self._width(op.x)
        rows, scales = (self.fed[op.x], 0) if op.scale is None else (at[op.x], at[op.scale])
        if op.scale is None and op.x not in self.done:  # products that read one value share its bf16 rows
            self.done.add(op.x)
            tape.feed(logit_rows, at[op.x], rows, 0, width, _padded(width), _stride(width, 2), False)
        bias = [] if op.bias is None else _floats(self.weights.array(op.bias))
        tape.linear(logit_rows, self._weight(op), rows, scales, at[op.y], _stride(width, 2 if op.scale is None else 1), bias)

    def _weight(self, op: ops.Linear) -> _native.WeightBuffer:
        key = op.weight, op.weight_format
        if key not in self.packed:
            form = "bf16" if op.weight_format == "dense" else op.weight_format
            if (form == "bf16") != (op.scale is None):
                raise UnsupportedError(
                    f"{op.weight}: no kernel has weights in {form} with activations {'as they come' if op.scale is None else 'in int8'}; "
                    "bf16 takes activations as they come, int8 and int4 take int8"
                )
            out, width = self.weights[op.weight].shape
            packed = self.store.linear(op.weight, form, GROUP if form == "int4" else 0, out, width, self.weights[op.weight].load)
            self.packed[key] = packed
            self.weight_bytes += packed.nbytes
        return self.packed[key]


def _padded(width: int) -> int:
    """The row length every packed weight can read: whole tiles of the widest kind."""
    return -(-width // GROUP) * GROUP


def _stride(width: int, element: int) -> int:
    """Elements from one row to the next: an odd number of cache lines, so that the 16 rows of a tile do not fall into one cache set."""
    lines = _padded(width) * element // 64
    return (lines + 1 - lines % 2) * 64 // element


def _floats(array: Array) -> list[float]:
    values: list[float] = array.astype(np.float32).ravel().tolist()
    return values
