"""Each native kernel alone against its own limit: a tape of copies of one op, played and profiled, so that all of the time is native."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hasten import _native
from hasten.backends.cpu.backend import PAGE
from hasten.backends.cpu.rows import padded_width, row_stride
from hasten.base import hardware
from hasten.base.errors import ConfigError
from hasten.checkpoint import random_model
from hasten.formats.linear import ClusteredLinear, LinearFormat
from hasten.measure.roofline import Arithmetic, Limits
from hasten.program import KvGroup, Program, lower, ops
from hasten.spec import SlidingWindow

WEIGHTS = (("bf16", "bf16"), ("int8", "int8"), ("int4", "int8"), ("int8", "bf16"), ("int4", "bf16"), ("fp8", "bf16"), ("lut4", "int8"))
"""Weights and activations that linear layers are measured in."""

_COPIES = 16  # of an op that reads no weights: its values are as warm as in a step
_VOCAB = 64
_REPEATS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel on one shape. ``us`` is the slowest thread's time in one op, the median over copies and repeats; ``bytes`` and
    ``operations`` are what it must read, write and compute; ``of_limit`` is the least time for them over ``us``, by ``bound`` ('read' or
    'peak'), and exceeds 1 where what counts as read stays in a cache nearer than streaming over as large a buffer shows."""

    op: str
    format: str
    shape: str
    rows: int
    context: int | None
    us: float
    bytes: int
    operations: int
    gb_per_s: float
    tops: float
    bound: str
    of_limit: float
    isa: str
    threads: int | None
    """None on a device."""


@dataclasses.dataclass(frozen=True, slots=True)
class KernelCase:
    """A kernel to be timed: ``build`` makes a tape of copies of it, which read ``distinct`` different bytes between them."""

    op: str
    format: str
    shape: str
    rows: int
    context: int | None
    bytes: int
    operations: int
    arithmetic: Arithmetic
    distinct: int
    build: Callable[[_native.ThreadPool, str], "Player"]


@dataclasses.dataclass(frozen=True, slots=True)
class Player:
    """A tape, the arguments of the step it is played with, and how many ops come before those that are timed."""

    tape: _native.Tape
    step: tuple[Any, ...]
    before: int

    def profile(self) -> NDArray[np.int64]:
        """Nanoseconds [copies, threads]."""
        op_ns = np.zeros((self.tape.ops, self.tape.threads), np.int64)
        self.tape.profile(*(*self.step, op_ns))
        return op_ns[self.before :]


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """Which kernels to time: those of a model of ``shape`` (as in random:SHAPE), on ``rows`` rows, attention at ``contexts``; copies of a
    weight come to ``footprint`` bytes, which must be well above the last-level cache."""

    shape: str
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    footprint: int


def open_pool(threads: int | None, isa: str) -> tuple[_native.ThreadPool, str]:
    """``threads`` threads (all cores granted unless given), and the level that ``isa`` names. Raises ConfigError for what is not there."""
    try:
        return _native.ThreadPool(hardware.detect().cpu.cores if threads is None else threads), _native.isa_level(isa)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def kernel_cases(setup: Setup, isa: str) -> Iterator[KernelCase]:
    """Every kernel of ``setup`` at level ``isa``, on every size it has there. Raises UnsupportedError for an unknown shape."""
    shape, rows, contexts, footprint = setup.shape, setup.rows, setup.contexts, setup.footprint
    program = lower(random_model(shape).spec, cache="bfloat16")
    dots: Arithmetic = "bf16" if isa == "amx" else "f32"  # of attention
    seen = set[tuple[object, ...]]()
    for op in program.ops:
        for case in _cases(program, op, footprint, rows, contexts, dots):
            if (key := (case.op, case.format, case.shape, case.rows, case.context)) not in seen:
                seen.add(key)
                yield case


def time_kernel(case: KernelCase, pool: _native.ThreadPool, isa: str) -> KernelTime:
    """Play the case's tape some times, and measure its limit between."""
    player = case.build(pool, isa)
    player.profile()
    times, shares, bounds = [], [], []
    limits = Limits(pool.threads, isa, case.arithmetic, case.distinct)
    for _ in range(_REPEATS):
        ns = player.profile().max(axis=1)
        seconds = statistics.median(ns.tolist()) / 1e9
        limit = limits.slice(0.01)
        times.append(seconds)
        shares.append(limit.seconds(case.bytes, case.operations) / seconds)
        bounds.append(limit.seconds(case.bytes, 0) >= limit.seconds(0, case.operations))
    us = statistics.median(times) * 1e6
    return KernelTime(
        case.op, case.format, case.shape, case.rows, case.context, us, case.bytes, case.operations, case.bytes / us / 1e3,
        case.operations / us / 1e6, "read" if statistics.median(bounds) else "peak", statistics.median(shares), isa, pool.threads,
    )  # fmt: skip


def _cases(
    program: Program, op: ops.Op, footprint: int, rows: tuple[int, ...], contexts: tuple[int, ...], dots: Arithmetic
) -> Iterator[KernelCase]:  # fmt: skip
    """The cases of one op; ops of one size give the same ones."""
    match op:
        case ops.Embed():
            yield from (_embed(program.values[op.y].features[-1], count) for count in rows)
        case ops.Linear():
            out, width = program.params[op.weight]
            yield from (_feed(to, width, count) for to in ("bf16", "int8") for count in rows)
            for weights, activations in WEIGHTS:
                yield from _linear_cases(weights, activations, out, width, rows, footprint)
        case ops.RmsNorm():
            yield from (_norm(op, program.values[op.x].features[-1], count) for count in rows)
        case ops.Add():
            yield from (_add(program.values[op.y].features[-1], count) for count in rows)
        case ops.Gate() if isinstance(op.activation, str):
            yield from (_gate(str(op.activation), program.values[op.y].features[-1], count) for count in rows)
        case ops.Rotate():
            yield from (_rotate(op, program.values[op.x].features[-1], count) for count in rows)
        case ops.AppendKv() if isinstance(group := program.state(op.state.group), KvGroup):
            yield from (_append(group, count) for count in rows)
        case ops.Attend() if isinstance(group := program.state(op.state.group), KvGroup):
            chosen = [(count, context) for count in (1, max(rows)) for context in contexts if count <= context]
            yield from (_attend(op, group, count, context, footprint, dots) for count, context in chosen)
        case _:
            pass


# --- each kernel


def _bf16(shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Random bits of bf16 numbers about 2⁻⁷ in size."""
    bits = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    return (bits & np.uint16(0x807F)) | np.uint16(120 << 7)


def _step(rows: int, pages: int | None = None, begin: int = 0) -> tuple[Any, ...]:
    """Arguments of a tape's step of one sequence without logits, whose cache is the first ``pages`` pages of the tape's only group."""
    table = _native.PageTable([] if pages is None else [range(pages)])
    return (
        np.arange(rows, dtype=np.int32) % _VOCAB, np.arange(begin, begin + rows, dtype=np.int32), np.array([0, rows], np.int32),
        np.empty(0, np.int32), [table], np.empty((0, _VOCAB), np.float32),
    )  # fmt: skip


def _tape(pool: _native.ThreadPool, isa: str, rows: int, sizes: list[int], context: int = 1 << 20) -> tuple[_native.Tape, list[int]]:
    """A tape with places of ``sizes`` bytes in its arena."""
    lines = [-(-size // 4096) * 4096 + 64 for size in sizes]  # a line apart from the next: no two places in one set of a cache
    places = np.concatenate([[0], np.cumsum(lines)]).astype(int).tolist()
    return _native.Tape(pool, isa, places[-1], rows, _VOCAB, context), places[:-1]


def _tile_rows(rows: int) -> int:
    return -(-rows // 16) * 16


def _linear_cases(weights: str, activations: str, out: int, width: int, rows: tuple[int, ...], footprint: int) -> Iterator[KernelCase]:
    """All numbers of rows share the copies of the weight, packed when the first of them is built."""
    packed = list[_native.WeightBuffer]()
    form = LinearFormat.parse(weights)
    weight_bytes = _native.WeightBuffer(form.number, out, width, form.group).nbytes
    copies = max(2, -(-footprint // weight_bytes))
    for count in rows:

        def build(pool: _native.ThreadPool, isa: str, count: int = count) -> Player:
            if not packed:
                dense = _bf16((out, width))
                packed.extend(_native.WeightBuffer(form.number, out, width, form.group) for _ in range(copies))
                its = form.quantize(dense.view(ml_dtypes.bfloat16)) if form.has_codebook else None
                for weight in packed:
                    if isinstance(its, ClusteredLinear):
                        weight.pack_codes(pool, its.q, np.ascontiguousarray(its.scales), None, its.codebook)
                    else:
                        weight.pack(pool, dense)
            most, element = _tile_rows(count), 1 if activations == "int8" else 2
            stride = row_stride(width, element)
            tape, (x, fed, scales, y) = _tape(pool, isa, most, [most * width * 4, most * stride * element, most * 4, most * out * 4])
            tape.embed(_bf16((_VOCAB, width)), 1.0, x)
            its_scales = scales if activations == "int8" else None
            tape.feed(False, x, fed, its_scales, 1, width, padded_width(width), stride)
            for weight in packed:
                tape.linear(False, weight, fed, its_scales, y, stride, [])
            return Player(tape, _step(count), 2)

        element = 1 if activations == "int8" else 2
        yield KernelCase(
            "linear", f"{weights} × {activations}", f"{out}x{width}", count, None, weight_bytes + count * (width * element + out * 4),
            2 * out * width * count, "int8" if activations == "int8" else "bf16", weight_bytes * copies, build,
        )  # fmt: skip


def _rowwise(
    op: str, shape: str, rows: int, n: int, touched: int, add: Callable[[_native.Tape, int, int], None], format: str = "float32"
) -> KernelCase:  # fmt: skip
    """An op from rows of ``n`` floats at x to rows at y, which reads and writes ``touched`` bytes a row."""

    def build(pool: _native.ThreadPool, isa: str) -> Player:
        tape, (x, y) = _tape(pool, isa, rows, [rows * n * 4] * 2)
        for place in (x, y):
            tape.embed(_bf16((_VOCAB, n)), 1.0, place)
        for _ in range(_COPIES):
            add(tape, x, y)
        return Player(tape, _step(rows), 2)

    return KernelCase(op, format, shape, rows, None, rows * touched, 0, "f32", rows * touched, build)


def _embed(n: int, rows: int) -> KernelCase:
    table = _bf16((_VOCAB, n))
    return _rowwise("embed", f"{n}", rows, n, n * 6, lambda tape, x, y: tape.embed(table, 1.0, y), "bf16 table")


def _norm(op: ops.RmsNorm, n: int, rows: int) -> KernelCase:
    weight, shape = [1.0] * op.group, f"{n}" if op.group == n else f"{n // op.group}x{op.group}"
    return _rowwise("rms_norm", shape, rows, n, n * 8, lambda tape, x, y: tape.rms_norm(False, x, y, n, op.group, weight, op.eps, 0.0))


def _add(n: int, rows: int) -> KernelCase:
    return _rowwise("add", f"{n}", rows, n, n * 12, lambda tape, x, y: tape.add(x, y, y, n))


def _gate(activation: str, n: int, rows: int) -> KernelCase:
    return _rowwise("gate", f"{n} {activation}", rows, n, n * 12, lambda tape, x, y: tape.gate(activation, x, x, y, n))


def _feed(to: str, width: int, rows: int) -> KernelCase:
    """Rounding float32 rows to what a linear layer reads."""
    op, element = ("quantize_rows", 1) if to == "int8" else ("to_bf16", 2)

    def build(pool: _native.ThreadPool, isa: str) -> Player:
        padded = padded_width(width)
        tape, (x, y, scales) = _tape(pool, isa, rows, [rows * width * 4, rows * padded * element, rows * 4])
        tape.embed(_bf16((_VOCAB, width)), 1.0, x)
        for _ in range(_COPIES):
            tape.feed(False, x, y, scales if to == "int8" else None, 1, width, padded, padded)
        return Player(tape, _step(rows), 1)

    touched = rows * width * (4 + element)
    return KernelCase(op, to, f"{width}", rows, None, touched, 0, "f32", touched, build)


def _rotate(op: ops.Rotate, n: int, rows: int) -> KernelCase:
    half = op.dims // 2

    def build(pool: _native.ThreadPool, isa: str) -> Player:
        tape, (x, y, cos, sin) = _tape(pool, isa, rows, [rows * n * 4] * 2 + [rows * half * 4] * 2)
        tape.embed(_bf16((_VOCAB, n)), 1.0, x)
        tape.rotary_table(list(op.frequencies), op.magnitude, cos, sin)
        for _ in range(_COPIES):
            tape.rotate(x, y, cos, sin, op.heads, n // op.heads, op.start, op.dims, op.interleaved)
        return Player(tape, _step(rows), 2)

    touched = rows * (2 * n + 2 * half) * 4
    return KernelCase("rotate", "float32", f"{op.heads}x{n // op.heads}", rows, None, touched, 0, "f32", touched, build)


def _append(group: KvGroup, rows: int) -> KernelCase:
    key, value = group.kv_heads * group.key_dim, group.kv_heads * group.value_dim

    def build(pool: _native.ThreadPool, isa: str) -> Player:
        pages = -(-rows // PAGE)
        tape, (k, v) = _tape(pool, isa, rows, [rows * key * 4, rows * value * 4])
        index = tape.group(_native.PagePool("bf16", _COPIES, pages, PAGE, group.kv_heads, group.key_dim, group.value_dim))
        tape.embed(_bf16((_VOCAB, key)), 1.0, k)
        tape.embed(_bf16((_VOCAB, value)), 1.0, v)
        for layer in range(_COPIES):
            tape.append_kv(index, layer, k, v)
        return Player(tape, _step(rows, pages), 2)

    touched = rows * (key + value) * 6
    return KernelCase("append_kv", "bf16 cache", f"{group.kv_heads}x{group.key_dim}", rows, None, touched, 0, "f32", touched, build)


def _attend(op: ops.Attend, group: KvGroup, rows: int, context: int, footprint: int, dots: Arithmetic) -> KernelCase:
    """The last ``rows`` queries of a sequence of ``context`` tokens, each copy over a layer of its own."""
    key, value = group.kv_heads * group.key_dim, group.kv_heads * group.value_dim
    window = op.visible.size if isinstance(op.visible, SlidingWindow) else 0
    first = context - rows
    pairs = sum(position - group.oldest_visible(position) + 1 for position in range(first, context))
    cached = (context - group.oldest_visible(first)) * (key + value) * 2
    copies = max(2, min(64, -(-footprint // cached)))

    def build(pool: _native.ThreadPool, isa: str) -> Player:
        pages = -(-context // PAGE)
        memory = _native.PagePool("bf16", copies, pages, PAGE, group.kv_heads, group.key_dim, group.value_dim)
        _fill(pool, isa, memory, copies, key, value, pages, context)
        width, out = op.heads * op.head_dim, op.heads * op.value_dim
        tape, (q, y) = _tape(pool, isa, rows, [rows * width * 4, rows * out * 4])
        index = tape.group(memory)
        tape.embed(_bf16((_VOCAB, width)), 1.0, q)
        for layer in range(copies):
            tape.attend(
                index, layer, q, y, op.heads, op.kv_heads, op.head_dim, op.value_dim, op.scale, window, op.softcap or 0.0,
                list(op.slopes or ()), [],
            )  # fmt: skip
        return Player(tape, _step(rows, pages, first), 1)

    touched = cached + rows * op.heads * (op.head_dim + op.value_dim) * 4
    return KernelCase(
        "attend", "bf16 cache", f"{op.heads}/{op.kv_heads}x{op.head_dim}{f' window {window}' if window else ''}", rows, context, touched,
        2 * op.heads * (op.head_dim + op.value_dim) * pairs, dots, cached * copies, build,
    )  # fmt: skip


def _fill(
    pool: _native.ThreadPool, isa: str, memory: _native.PagePool, layers: int, key: int, value: int, pages: int, context: int
) -> None:  # fmt: skip
    """Write keys and values of every position: pages never written to are all one page of zeros."""
    chunk = 256
    tape, (k, v) = _tape(pool, isa, chunk, [chunk * key * 4, chunk * value * 4])
    index = tape.group(memory)
    tape.embed(_bf16((_VOCAB, key)), 1.0, k)
    tape.embed(_bf16((_VOCAB, value)), 1.0, v)
    for layer in range(layers):
        tape.append_kv(index, layer, k, v)
    for begin in range(0, context, chunk):
        end = min(begin + chunk, context)
        tape.run(*_step(end - begin, pages, begin))
