"""Compiling: a Program and its weights → a native tape. Kernels resolved, places fixed, weights packed, once."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

import numpy as np

from hasten import _native
from hasten.backends.cpu.experts import ExpertPlaces
from hasten.backends.cpu.packed import PackedWeights, Stack
from hasten.backends.cpu.recurrent import emit_recurrent
from hasten.backends.cpu.rows import ELEMENT_BYTES, FEEDS, format_of, padded_width, row_stride
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.formats.cache import CACHE_FORMATS
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Array, Weights
from hasten.program import KvGroup, LatentGroup, Products, Program, RecurrentGroup, RowChain, StateGroup, Value, ops, unfuse
from hasten.program.arena import ALIGNMENT, Arena
from hasten.spec import Causal, ClampedSwiglu, SlidingWindow

FED = ".fed"  # beside the values of an op: its own copy of what it reads
LOGITS = -1  # the place that is the caller's array
BLOCK = -2  # and down: places in a thread's own block, inside a chain
KERNELS = (
    ops.Embed, ops.EmbedPositions, ops.RmsNorm, ops.LayerNorm, ops.QuantizeRows, ops.QuantizeFixed, ops.Linear, ops.HeadLinear,
    ops.Rotate, ops.AppendKv, ops.Attend, ops.Add, ops.Scale, ops.Clip, ops.SoftCap, ops.Activate, ops.Gate, ops.Split, ops.HeadSplit,
    ops.Concat, ops.Cast, ops.SelectRows, ops.Route, ops.ExpertLinear, ops.Combine, ops.CausalConv, ops.SelectiveScan, ops.DualScan,
    ops.GatedDeltaScan, ops.LinearScan,
)  # fmt: skip
IN_CHAINS = (
    ops.Embed, ops.EmbedPositions, ops.RmsNorm, ops.LayerNorm, ops.QuantizeRows, ops.QuantizeFixed, ops.Cast, ops.Rotate,
    ops.AppendKv, ops.Add, ops.Scale, ops.Clip, ops.SoftCap, ops.Activate, ops.Gate, ops.Split, ops.HeadSplit, ops.Concat, ops.SelectRows,
)  # fmt: skip
"""Ops that the tape can play on a block of rows (RowOp in native/src/row_op.hpp)."""
CHAIN_BYTES = 64 << 10  # of a block's inner values: they and the rows around them stay in a core's second-level cache
CHAIN_ROWS = 16  # most rows of a block
Pool = _native.PagePool | _native.StatePool
NATIVE_DTYPES = {"float32", "int8", "int32"}


def unsupported_ops(program: Program) -> tuple[str, ...]:
    """What ``program`` needs and no native kernel does, each once, with the reason; empty where it can be compiled."""
    plain = unfuse(program)
    reasons = dict.fromkeys(reason for op in plain.ops if (reason := _refusal(plain, op)))
    return tuple(reasons)


def _refusal(program: Program, op: ops.Op) -> str:
    name = type(op).__name__
    if not isinstance(op, KERNELS):
        return name
    match op:
        case ops.Gate(activation=ClampedSwiglu()) if program.values[op.gate].features != program.values[op.up].features:
            return "Gate with ClampedSwiglu of one number a row"
        case ops.Cast() if program.values[op.x].dtype != "float32" or op.dtype not in {"float32", "bfloat16"}:
            return f"Cast from {program.values[op.x].dtype} to {op.dtype}"
        case ops.Attend(visible=visible) if not isinstance(visible, Causal | SlidingWindow):
            return f"Attend under {type(visible).__name__}"
    if not isinstance(op, ops.Cast) and any(program.values[value].dtype not in NATIVE_DTYPES for value in op.outputs):
        return f"{name} in {program.values[op.outputs[0]].dtype}"
    return ""


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A tape and the page pools it writes to, in the order of the Program's state groups; ``weight_bytes`` are read by every step.

    ``packed`` weights of ``store`` were packed anew, the others came from the cache. ``arena_bytes`` hold a step's values."""

    tape: _native.Tape
    pools: tuple[Pool, ...]
    weight_bytes: int
    packed: int
    arena_bytes: int
    store: PackedWeights


def compile_program(
    program: Program, weights: Weights, packed: PackedWeights, pool: _native.ThreadPool, *, isa: str, most_tokens: int, page: int,
    pages: Mapping[str, int], pools: tuple[Pool, ...] | None = None,
) -> Compiled:  # fmt: skip
    """The tape of ``program`` for steps of up to ``most_tokens`` tokens. ``pages`` gives each state group's number of pages, unless it is
    to write to the ``pools`` of another tape. What ``program`` returns first are a step's logits.

    Raises UnsupportedError naming the ops that have no native kernel."""
    refused = unsupported_ops(program)
    if refused:
        raise UnsupportedError(f"the cpu backend has no kernel for {', '.join(refused)}; use backend 'reference'")
    return _Compiler(program, weights, packed, pool, most_tokens).compile(isa, page, pages, pools)


def arena_bytes(program: Program, most_tokens: int) -> int:
    """Bytes that the tape of ``program`` takes for the values of a step, its logits left out."""
    layout = _Layout(program, most_tokens)
    layout.lay_out()
    return layout.arena.size


class _Layout:
    """One pass over the ops: places are taken when a value is made and given back after its last use."""

    def __init__(self, program: Program, most_tokens: int) -> None:
        self.program, self.most_tokens = program, most_tokens
        self.plain = unfuse(program)
        self.values = self.plain.values  # those inside chains too
        self.arena = Arena()
        self.tables: dict[tuple[tuple[float, ...], float], tuple[int, int]] = {}
        self.last_use = {name: index for index, op in enumerate(program.ops) for name in (*op.inputs, *op.outputs)}
        self.places = dict.fromkeys(self._become_logits(), LOGITS)
        self.experts = ExpertPlaces(program, self.arena, most_tokens)

    def lay_out(self) -> list[dict[str, int]]:
        """Where each op finds what it reads and writes."""
        for op in self.plain.ops:  # tables are written before the first op, so nothing may have lain where they lie
            if isinstance(op, ops.Rotate) and (key := (op.frequencies, op.magnitude)) not in self.tables:
                size = self.most_tokens * (op.dims // 2) * 4
                self.tables[key] = self.arena.take(size), self.arena.take(size)
        return [self._plan(index, op) for index, op in enumerate(self.program.ops)]

    def _become_logits(self) -> list[str]:
        """The logits, and what they are made from in place: a row of them may be a megabyte."""
        names, last_use = [self.program.outputs[0]], {name: index for index, op in enumerate(self.plain.ops) for name in op.inputs}
        for index, op in reversed([*enumerate(self.plain.ops)]):
            if isinstance(op, ops.Scale | ops.SoftCap) and op.y == names[-1] and last_use[op.x] == index:
                names.append(op.x)
        return names

    def _plan(self, index: int, op: ops.Op) -> dict[str, int]:
        """Take places for what ``op`` makes; give back those of values nobody reads any more."""
        made = {name: self._take(name) for name in op.outputs if name not in self.places}
        self.places.update(made)
        self.experts.plan(op)
        where = {name: self.places[name] for name in (*op.inputs, *op.outputs)}
        if isinstance(op, RowChain):
            where |= _block(op).places
        if isinstance(op, ops.HeadLinear):  # its bf16 rows are padded head by head, so nobody else reads them
            where[FED] = self.arena.take(self._tile_rows() * op.heads * row_stride(self._width(op.x) // op.heads, 2) * 2)
            self.arena.give_back(where[FED])
        for name in {*op.inputs, *op.outputs}:
            if self.last_use[name] == index and self.places[name] != LOGITS:
                self.arena.give_back(self.places[name])
                self.experts.give_back(name)
        return where

    def _take(self, name: str) -> int:
        return self.arena.take(self._tile_rows() * _row_bytes(self.values[name]))

    def _width(self, name: str) -> int:
        return self.values[name].features[-1]

    def _numbers(self, name: str) -> int:
        return math.prod(self.values[name].features)

    def _tile_rows(self) -> int:
        """A tile reads 16 rows, whatever the batch."""
        return -(-self.most_tokens // 16) * 16


class _Compiler(_Layout):
    """A layout, and the tape that is emitted for it."""

    def __init__(self, program: Program, weights: Weights, packed: PackedWeights, pool: _native.ThreadPool, most_tokens: int) -> None:
        super().__init__(program, most_tokens)
        self.weights, self.store, self.pool = weights, packed, pool
        self.packed: dict[tuple[str, str], _native.WeightBuffer] = {}
        self.weight_bytes = 0

    def compile(self, isa: str, page: int, pages: Mapping[str, int], pools: tuple[Pool, ...] | None) -> Compiled:
        program, places = self.program, self.lay_out()
        if "logits" in program.outputs:
            vocab = program.values["logits"].features[-1]
        else:  # a Program that ends before them is handed rows as wide as they would be
            vocab = next(program.params[op.weight][0] for op in self.plain.ops if isinstance(op, ops.Embed))
        tape = _native.Tape(self.pool, isa, self.arena.size, self.most_tokens, vocab, program.context)
        if pools is None:
            pools = tuple(_pool(group, pages[group.name], page) for group in program.states)
        self.group_index = {group.name: tape.group(pool) for group, pool in zip(program.states, pools, strict=True)}
        for (frequencies, magnitude), (cos, sin) in self.tables.items():
            tape.rotary_table(list(frequencies), magnitude, cos, sin)
        for op, where in zip(program.ops, places, strict=True):
            self._emit(tape, op, where)
        return Compiled(tape, pools, self.weight_bytes, self.store.fill(), self.arena.size, self.store)

    def _emit(self, tape: _native.Tape, op: ops.Op, at: dict[str, int]) -> None:
        values, params = self.values, self.program.params
        match op:
            case RowChain():
                tape.open_chain(_block(op).rows, _block(op).size)
                for part in op.parts:
                    self._emit(tape, part, at)
                tape.close()
            case Products():
                tape.open_products()
                for part in op.parts:
                    self._emit(tape, part, at)
                tape.close()
            case ops.Embed():
                tape.embed(self.store.table(op.weight, self.weights[op.weight]), op.scale, at[op.y])
            case ops.RmsNorm():
                n = values[op.x].features[-1]
                tape.rms_norm(
                    values[op.x].rows == "R", at[op.x], at[op.y], n, op.group, _floats(self.weights.array(op.weight)), op.eps, op.offset
                )
            case ops.EmbedPositions():
                tape.embed_positions(self._positions(op), at[op.y])
            case ops.LayerNorm():
                weight, bias = _floats(self.weights.array(op.weight)), [] if op.bias is None else _floats(self.weights.array(op.bias))
                tape.layer_norm(values[op.x].rows == "R", at[op.x], at[op.y], self._width(op.x), op.group, weight, bias, op.eps)
            case ops.QuantizeRows():
                self._emit_feed(tape, op.x, at[op.x], at[op.q], at[op.scale])
            case ops.QuantizeFixed():
                n = self._width(op.x)
                runs, padded, stride = math.prod(values[op.x].features[:-1]), padded_width(n), row_stride(n, 1)
                tape.feed_fixed(values[op.x].rows == "R", at[op.x], at[op.q], at[op.scale], runs, n, padded, stride, op.step)
            case ops.Cast(dtype="bfloat16"):
                self._emit_feed(tape, op.x, at[op.x], at[op.y], None)
            case ops.Linear():
                self._emit_linear(tape, op, at)
            case ops.HeadLinear():
                n = self._width(op.x) // op.heads
                tape.feed_heads(at[op.x], at[FED], op.heads, n, padded_width(n), row_stride(n, 2))
                tape.head_linear(self._head_weights(op), at[FED], at[op.y], row_stride(n, 2))
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
            case ops.Scale():
                tape.scale(values[op.x].rows == "R", at[op.x], at[op.y], self._numbers(op.x), op.factor)
            case ops.Clip():
                tape.clip(values[op.x].rows == "R", at[op.x], at[op.y], self._numbers(op.x), op.limit)
            case ops.SoftCap():
                tape.soft_cap(values[op.x].rows == "R", at[op.x], at[op.y], self._numbers(op.x), op.cap)
            case ops.Activate():
                tape.activate(values[op.x].rows == "R", op.activation, at[op.x], at[op.y], self._numbers(op.x))
            case ops.Gate(activation=ClampedSwiglu() as swiglu):
                tape.clamped_swiglu(at[op.gate], at[op.up], at[op.y], self._numbers(op.y), swiglu.alpha, swiglu.limit)
            case ops.Gate() if values[op.gate].features != values[op.up].features:
                tape.gate_rows(str(op.activation), at[op.gate], at[op.up], at[op.y], self._numbers(op.y))
            case ops.Gate():
                tape.gate(str(op.activation), at[op.gate], at[op.up], at[op.y], self._numbers(op.y))
            case ops.Split() | ops.HeadSplit():
                starts = itertools.accumulate(op.sizes, initial=0)
                parts = [(at[op.x], at[y], size, sum(op.sizes), start, size, 0) for y, size, start in zip(op.ys, op.sizes, starts)]
                tape.copy_features(values[op.x].rows == "R", op.heads if isinstance(op, ops.HeadSplit) else 1, parts)
            case ops.Concat():
                sizes = [self._width(x) // op.heads for x in op.xs]
                starts = itertools.accumulate(sizes, initial=0)
                parts = [(at[x], at[op.y], size, size, 0, sum(sizes), start) for x, size, start in zip(op.xs, sizes, starts)]
                tape.copy_features(values[op.y].rows == "R", op.heads, parts)
            case ops.Cast():  # to the float32 that it is in
                n = self._numbers(op.x)
                tape.copy_features(values[op.x].rows == "R", 1, [(at[op.x], at[op.y], n, n, 0, n, 0)])
            case ops.SelectRows():
                tape.select_rows(at[op.x], at[op.y], values[op.y].features[-1])
            case ops.Route():
                correction = [] if op.correction is None else _floats(self.weights.array(op.correction))
                self.experts.emit_route(tape, op, at, correction)
            case ops.ExpertLinear():
                self._check_feed(op)
                bias, scales = [] if op.bias is None else _floats(self.weights.array(op.bias)), None if op.scale is None else at[op.scale]
                self.experts.emit_linear(tape, op, self._expert_weights(op), at[op.x], scales, at[op.y], bias)
            case ops.Combine():
                self.experts.emit_combine(tape, op, at)
            case ops.CausalConv() | ops.SelectiveScan() | ops.DualScan() | ops.GatedDeltaScan() | ops.LinearScan():
                group = self.program.state(op.state.group)
                if not isinstance(group, RecurrentGroup):
                    raise TypeError(f"{type(op).__name__} keeps its state in {group}")
                emit_recurrent(tape, op, at, self.group_index[group.name], group, self.weights.array)
            case _:
                raise TypeError(f"{type(op).__name__} for {params} was let through by unsupported_ops")

    def _emit_linear(self, tape: _native.Tape, op: ops.Linear, at: dict[str, int]) -> None:
        self._check_feed(op)
        bias, scales = [] if op.bias is None else _floats(self.weights.array(op.bias)), None if op.scale is None else at[op.scale]
        stride = _stride(self.values[op.x])
        tape.linear(self.values[op.x].rows == "R", self._weight(op), at[op.x], scales, at[op.y], stride, bias)

    def _check_feed(self, op: ops.Linear | ops.ExpertLinear) -> None:
        """Raises UnsupportedError where the Program feeds a product what its weight's format is not multiplied with."""
        fed, accepted = FEEDS[self.values[op.x].dtype], format_of(op).activations
        if fed not in accepted:
            raise UnsupportedError(
                f"{op.weight}: weights in {format_of(op)} are not multiplied with activations in {fed}; accepted are {', '.join(accepted)}"
            )

    def _emit_feed(self, tape: _native.Tape, x: str, at: int, rows: int, scales: int | None) -> None:
        """float32 rows of ``x`` → rows as products read them: int8 where there are ``scales``, else bf16."""
        value, width = self.values[x], self._width(x)
        stride = row_stride(width, 2 if scales is None else 1)
        tape.feed(value.rows == "R", at, rows, scales, math.prod(value.features[:-1]), width, padded_width(width), stride)

    def _head_weights(self, op: ops.HeadLinear) -> list[_native.WeightBuffer]:
        if op.weight_format != "dense":
            raise UnsupportedError(f"{op.weight}: products head by head have weights in bf16 only, not {op.weight_format}")
        packed = self._slices(op)
        self.weight_bytes += sum(weight.nbytes for weight in packed)
        return packed

    def _positions(self, op: ops.EmbedPositions) -> Array:
        """The rows of positions that can come, float32: exact, and one row a token costs nothing."""
        rows = self.weights.array(op.weight)[op.offset : op.offset + self.program.context]
        if len(rows) < self.program.context:
            raise ConfigError(
                f"{op.weight} has {len(rows)} positions, fewer than the context of {self.program.context}; choose a shorter one"
            )
        return np.ascontiguousarray(rows, np.float32)

    def _weight(self, op: ops.Linear) -> _native.WeightBuffer:
        key = op.weight, op.weight_format
        if key not in self.packed:
            out, width = self.program.params[op.weight]
            weight, form = self.weights[op.weight], format_of(op)
            if isinstance(weight, QuantizedWeight) and weight.form == form:
                self.packed[key] = self.store.stored(op.weight, form, out, width, weight.quantized)
            else:
                self.packed[key] = self.store.linear(op.weight, form, out, width, weight.load)
            self.weight_bytes += self.packed[key].nbytes
        return self.packed[key]

    def _expert_weights(self, op: ops.ExpertLinear) -> _native.ExpertWeights:
        packed = _native.ExpertWeights(self._slices(op))
        self.weight_bytes += packed.nbytes * self._width(op.experts) // self.program.params[op.weight][0]
        return packed

    def _slices(self, op: ops.HeadLinear | ops.ExpertLinear) -> list[_native.WeightBuffer]:
        """The weights of all heads or experts, which lie stacked in one."""
        count, out, width = self.program.params[op.weight]
        weight, form = self.weights[op.weight], format_of(op)
        names = [f"{op.weight}[{i}]" for i in range(count)]
        if isinstance(weight, QuantizedWeight) and weight.form == form:
            codes = Stack(weight.quantized, count)
            return [self.store.stored(name, form, out, width, functools.partial(codes.take, i)) for i, name in enumerate(names)]
        stack = Stack(weight.load, count)
        return [self.store.linear(name, form, out, width, functools.partial(stack.take, i)) for i, name in enumerate(names)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Block:
    """``rows`` that a thread takes through a chain at a time, and where the inner values of so many lie in its ``size`` bytes."""

    rows: int
    places: dict[str, int]
    size: int


def _block(chain: RowChain) -> _Block:
    rows = max(1, min(CHAIN_ROWS, CHAIN_BYTES // max(1, sum(_row_bytes(value) for _, value in chain.inner))))
    places, size = {}, 0
    for name, value in chain.inner:
        places[name] = BLOCK - size
        size += -(-rows * _row_bytes(value) // ALIGNMENT) * ALIGNMENT
    return _Block(rows, places, size)


def _stride(value: Value) -> int:
    """Elements from one run of a value's last features to the next: what products read narrower than float32 is padded."""
    return row_stride(value.features[-1], ELEMENT_BYTES[value.dtype]) if value.dtype in {"int8", "bfloat16"} else value.features[-1]


def _row_bytes(value: Value) -> int:
    """Bytes from one row of a value to the next."""
    return math.prod(value.features[:-1]) * _stride(value) * ELEMENT_BYTES.get(value.dtype, 4)


def _pool(group: StateGroup, pages: int, page: int) -> Pool:
    if isinstance(group, RecurrentGroup):
        return _native.StatePool(group.layers, pages, math.prod(group.shape))
    form = _native_cache(group)
    if isinstance(group, LatentGroup):  # one row a token, which begins with the values
        return _native.PagePool(form, group.layers, pages, page, 1, group.width, 0)
    return _native.PagePool(form, group.layers, pages, page, group.kv_heads, group.key_dim, group.value_dim)


def _native_cache(group: KvGroup | LatentGroup) -> str:
    """The group's format by the kernels' name. Raises UnsupportedError where no kernel reads it."""
    accepted = {form: name for name, form in CACHE_FORMATS.items() if name == "bf16" or isinstance(group, KvGroup)}
    if group.format not in accepted:
        names = ", ".join(accepted.values())
        raise UnsupportedError(f"no kernel keeps {group.name} rows in {group.format}; accepted here: {names}: choose one of them")
    return accepted[group.format]


def _floats(array: Array) -> list[float]:
    values: list[float] = array.astype(np.float32).ravel().tolist()
    return values
