"""Compiling: a Program and its weights → the launches of one bucket, whose tensors all lie where they will lie in every step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import triton
from torch import Tensor

from hasten.backends.cuda.candidates import LINEAR, SEMI_STRUCTURED, Candidate, LinearSite, choose
from hasten.backends.cuda.inputs import Bucket, StepInputs
from hasten.backends.cuda.kernels import attention, cache, experts, linear, rows
from hasten.backends.cuda.kernels.cache import GroupCache
from hasten.backends.cuda.kernels.pack import PackedWeight
from hasten.backends.cuda.kernels.states import Sequences, StatePool
from hasten.backends.cuda.places import DTYPES, SPLIT_ROWS, Room, lay_out, rows_of, view
from hasten.backends.cuda.products import FEEDS
from hasten.backends.cuda.recurrent import RECURRENT, RecurrentOp, recurrent_launch
from hasten.backends.cuda.tuned import Tuned, shape_name
from hasten.backends.cuda.units import units_of
from hasten.backends.cuda.weights import TapeWeights
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat
from hasten.program import Fused, Program, ops
from hasten.spec import Causal, SegmentMemory, SlidingWindow

Pool = GroupCache | StatePool
Launch = Callable[[], None]
"""A kernel with all that it reads and writes."""

KERNELS = (
    ops.Embed, ops.EmbedPositions, ops.SelectRows, ops.Split, ops.Concat, ops.HeadSplit, ops.Cast, ops.QuantizeRows, ops.QuantizeFp8,
    ops.QuantizeFixed, ops.Linear, ops.HeadLinear, ops.ExpertLinear, ops.Route, ops.Combine, ops.RmsNorm, ops.LayerNorm, ops.Add,
    ops.Scale, ops.Clip, ops.SoftCap, ops.Activate, ops.Gate, ops.Rotate, ops.AppendKv, ops.Attend, *RECURRENT,
)  # fmt: skip


def unsupported_ops(program: Program) -> tuple[str, ...]:
    """What ``program`` needs and no CUDA kernel does, each once, with the reason; empty where it can be compiled."""
    return tuple(dict.fromkeys(reason for op in program.ops if (reason := _refusal(op))))


def _refusal(op: ops.Op) -> str:
    if isinstance(op, ops.AttendRelative | ops.AttentionMap | ops.AttentionMapRelative):
        return f"{type(op).__name__} ({attention.refusal(op)})"
    if not isinstance(op, KERNELS):
        return type(op).__name__
    if isinstance(op, ops.Attend) and not isinstance(op.visible, Causal | SlidingWindow | SegmentMemory):
        return f"Attend under {type(op.visible).__name__}"
    return ""


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """What a tape is compiled for: where its tensors lie, of which compute capability, what was measured there, and how many ``programs``
    keep it busy."""

    device: torch.device
    capability: tuple[int, int]
    tuned: Tuned
    programs: int = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Tape:
    """``launches`` in order; what ``outputs`` hold afterwards is by name, [T or R, …]. ``inputs`` are filled before. ``units`` are what
    kernels play, each with the launch that is its own; tables that several share are launched before the first. ``blocks`` are those of
    products of experts, by the value that says who was chosen. ``nbytes`` are of the device's memory that no other tape has: inputs and
    tables."""

    inputs: StepInputs
    launches: tuple[Launch, ...]
    outputs: Mapping[str, Tensor]
    units: tuple[tuple[Fused, Launch], ...]
    blocks: Mapping[str, tuple[experts.Blocks, ...]]
    nbytes: int

    def play(self) -> None:
        """One step, on the current stream. Nothing is allocated and nothing waited for, so a graph can capture it."""
        for launch in self.launches:
            launch()


def compile_tape(
    program: Program, weights: TapeWeights, pools: Mapping[str, Pool], bucket: Bucket, device: Device, page: int, room: Room
) -> Tape:
    """The tape of ``program``, which is not fused, for batches that ``bucket`` takes. Values and results lie in
    ``room``, which tapes that play one at a time share, where it is large enough. Raises UnsupportedError naming what has no kernel."""
    if refused := unsupported_ops(program):
        raise UnsupportedError(f"the cuda backend has no kernel for {', '.join(refused)}; use backend 'reference'")
    return _Compiler(program, weights, pools, bucket, device, page, room).compile()


class _Compiler:
    """One walk over the units of a Program."""

    def __init__(
        self, program: Program, weights: TapeWeights, pools: Mapping[str, Pool], bucket: Bucket, device: Device, page: int, room: Room
    ) -> None:
        self.room, self.own = room, 0  # and bytes beside it
        self.program, self.values, self.weights, self.pools, self.bucket, self.on = program, program.values, weights, pools, bucket, device
        self.units = units_of(program)
        attends = [op for op in program.ops if isinstance(op, ops.Attend)]
        per_tile = [attention.tile_rows(op.heads, op.kv_heads, attention.blocks_for(op.head_dim)) for op in attends]
        self.inputs = StepInputs(bucket, program.states, program.context, page, per_tile, device.device)
        self.at: dict[str, Tensor] = {}
        self.launches: list[Launch] = []
        self.turns: dict[tuple[tuple[float, ...], float], tuple[Tensor, Tensor]] = {}
        self.parts: dict[tuple[int, int], attention.Parts | None] = {}
        self.blocks: dict[tuple[str, int], experts.Blocks] = {}  # by the value of chosen experts, and the rows of a tile
        self.scratch: linear.Scratch | None = None

    def compile(self) -> Tape:
        room = self.room
        layout = lay_out(self.program, self.units, self.bucket)
        arena = room.values if layout.size <= len(room.values) else self._empty((layout.size,), torch.uint8)
        self.at = {name: view(arena, place) for name, place in layout.places.items()}
        for name in self.program.outputs:
            value = self.values[name]
            shape = rows_of(value, self.bucket), *value.features
            shared = DTYPES[value.dtype] == room.results.dtype and math.prod(shape) <= len(room.results)
            self.at[name] = room.results[: math.prod(shape)].view(shape) if shared else self._empty(shape, DTYPES[value.dtype])
        self.scratch = self._room()
        played = []
        for unit in self.units:
            before = len(self.launches)
            self._emit(unit)
            if len(self.launches) > before:
                played.append((unit, self.launches[-1]))
        outputs = {name: self.at[name] for name in self.program.outputs}
        blocks = {chosen: tuple(its for (name, _), its in self.blocks.items() if name == chosen) for chosen, _ in self.blocks}
        return Tape(self.inputs, tuple(self.launches), outputs, tuple(played), blocks, self.own + self.inputs.nbytes)

    def _launch(self, launch: Launch) -> None:
        self.launches.append(launch)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._counted(torch.empty(shape, dtype=dtype, device=self.on.device))

    def _counted(self, made: Tensor) -> Tensor:
        self.own += made.nbytes
        return made

    def _listed(self, numbers: Sequence[float]) -> Tensor:
        return self._counted(torch.tensor(numbers, dtype=torch.float32, device=self.on.device))

    def _emit(self, unit: Fused) -> None:
        at, inputs = self.at, self.inputs
        match unit.parts:
            case (ops.Linear(), *_):
                self._linear([op for op in unit.parts if isinstance(op, ops.Linear)])
            case (ops.Rotate() as q, ops.Rotate() as k, ops.AppendKv() as kept):
                self._launch(functools.partial(
                    cache.rotate_append, at[q.x], at[k.x], None if kept.v is None else at[kept.v], at[q.y], self._turn(q),
                    self._layer(kept.state), inputs.positions, inputs.sequence, inputs.pages[kept.state.group], heads=q.heads,
                ))  # fmt: skip
            case (ops.Add() as add, ops.RmsNorm() | ops.LayerNorm() as norm, *behind):
                self._norm(unit, norm, at[add.a], behind, branch=at[add.b], added=at[add.y])
            case (ops.RmsNorm() | ops.LayerNorm() as norm, *behind):
                self._norm(unit, norm, at[norm.x], behind)
            case (ops.Gate() as gate, *behind):
                y = None if gate.y in dict(unit.inner) else at[gate.y]
                dtype = DTYPES[self.values[gate.y].dtype]
                self._launch(
                    functools.partial(rows.gate, at[gate.gate], at[gate.up], gate.activation, dtype, y=y, quantized=self._quantized(behind))
                )
            case (op,):
                self._emit_one(op)

    def _emit_one(self, op: ops.Op) -> None:
        at, inputs = self.at, self.inputs
        match op:
            case ops.Embed():
                self._launch(
                    functools.partial(rows.embed, self.weights.plain(op.weight, torch.bfloat16), inputs.tokens, at[op.y], factor=op.scale)
                )
            case ops.EmbedPositions():
                self._launch(
                    functools.partial(
                        rows.embed, self.weights.plain(op.weight, torch.float32), inputs.positions, at[op.y], offset=op.offset
                    )
                )
            case ops.SelectRows():
                self._launch(functools.partial(rows.select_rows, at[op.x], inputs.rows, at[op.y]))
            case ops.Split():
                pass  # pieces of x lie in x
            case ops.Concat():
                self._launch(functools.partial(rows.concat, tuple(at[x] for x in op.xs), at[op.y], op.heads))
            case ops.HeadSplit():
                self._launch(functools.partial(rows.head_split, at[op.x], tuple(at[y] for y in op.ys), op.heads))
            case ops.Cast():
                self._launch(functools.partial(rows.cast, at[op.x], at[op.y]))
            case ops.QuantizeRows() | ops.QuantizeFp8():
                self._launch(functools.partial(rows.quantize_rows, at[op.x], rows.Rounded(at[op.q], at[op.scale])))
            case ops.QuantizeFixed():
                self._launch(functools.partial(rows.quantize_fixed, at[op.x], rows.Rounded(at[op.q], at[op.scale]), op.step))
            case ops.HeadLinear():
                self._head_linear(op)
            case ops.Route():
                correction = None if op.correction is None else self._vector(op.correction)
                self._launch(
                    functools.partial(experts.route, op, at[op.logits], at[op.experts], at[op.weights], inputs.sequence, correction)
                )
            case ops.ExpertLinear():
                self._expert_linear(op)
            case ops.Combine():
                self._launch(functools.partial(experts.combine, at[op.x], at[op.weights], at[op.y], inputs.sequence))
            case ops.Add():
                self._launch(functools.partial(rows.add, at[op.a], at[op.b], at[op.y]))
            case ops.Scale():
                self._launch(functools.partial(rows.scale, at[op.x], at[op.y], op.factor))
            case ops.Clip():
                self._launch(functools.partial(rows.clip, at[op.x], at[op.y], op.limit))
            case ops.SoftCap():
                self._launch(functools.partial(rows.soft_cap, at[op.x], at[op.y], op.cap))
            case ops.Activate():
                self._launch(functools.partial(rows.activate, at[op.x], at[op.y], op.activation))
            case ops.Rotate():
                self._launch(functools.partial(cache.rotate, at[op.x], at[op.y], self._turn(op), inputs.sequence, heads=op.heads))
            case ops.AppendKv():
                v = None if op.v is None else at[op.v]
                self._launch(functools.partial(
                    cache.append, at[op.k], v, self._layer(op.state), inputs.positions, inputs.sequence, inputs.pages[op.state.group]
                ))  # fmt: skip
            case ops.Attend():
                self._attend(op)
            case ops.CausalConv() | ops.SelectiveScan() | ops.DualScan() | ops.GatedDeltaScan() | ops.LinearScan():
                self._recurrent(op)
            case _:
                raise TypeError(f"{type(op).__name__} was let through by unsupported_ops")

    # --- products

    def _linear(self, parts: Sequence[ops.Linear]) -> None:
        first, x = parts[0], self.at[parts[0].x]
        weight = self.weights.linear(tuple(op.weight for op in parts), first.weight_format, x.dtype)
        y = self.at[first.y]
        if len(parts) > 1:  # theirs lie side by side
            y = y.as_strided((y.shape[0], weight.out), (y.stride(0), 1))
        biases = [self._vector(op.bias) for op in parts if op.bias is not None]
        bias = None if not biases else biases[0] if len(biases) == 1 else self._counted(torch.cat(biases))
        scale = None if first.scale is None else self.at[first.scale]
        self._product(tuple(op.weight for op in parts), first.weight_format, x, y, scale, bias)

    def _head_linear(self, op: ops.HeadLinear) -> None:
        self._product((op.weight,), op.weight_format, self.at[op.x], self.at[op.y], None, None)

    def _product(self, names: tuple[str, ...], form: str, x: Tensor, y: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        weight = self.weights.linear(names, form, x.dtype)
        candidate = self._candidate(names, form, x, weight, y.dtype, bias is not None)
        if candidate.name == "triton":
            order, tiles = self._cut(form, x, weight)
            self._launch(
                functools.partial(linear.linear, x, weight, y, scale=scale, bias=bias, scratch=self.scratch, order=order, tiles=tiles)
            )
            return
        if candidate.name == SEMI_STRUCTURED:
            weight = self.weights.compressed(names, form, x.dtype)
        self._launch(functools.partial(candidate.launch, x, weight, y, scale=scale, bias=bias))

    def _expert_linear(self, op: ops.ExpertLinear) -> None:
        x, y = self.at[op.x], self.at[op.y]
        weight = self.weights.linear((op.weight,), op.weight_format, x.dtype)
        count, choices = weight.codes.shape[0], y.shape[0] * y.shape[1]
        tiles = experts.default_expert_tiles(choices, count)
        scale, bias = None if op.scale is None else self.at[op.scale], None if op.bias is None else self._vector(op.bias)
        self._launch(
            functools.partial(
                experts.expert_linear, x, weight, y, self._blocks(op.experts, count, choices, tiles), tiles, scale=scale, bias=bias
            )
        )

    def _blocks(self, chosen: str, count: int, choices: int, tiles: linear.Tiles) -> experts.Blocks:
        """Which rows each expert reads: told apart once for all products of the same choice."""
        key = chosen, tiles.rows
        if key not in self.blocks:
            room = experts.most_blocks(choices, count, tiles.rows)
            sizes = (room * tiles.rows, room, count)
            self.blocks[key] = experts.Blocks(*(self._empty((size,), torch.int32) for size in sizes))
            self._launch(functools.partial(experts.tell_apart, self.at[chosen], self.blocks[key]))
        return self.blocks[key]

    def _candidate(
        self, names: tuple[str, ...], form: str, x: Tensor, weight: PackedWeight, dtype: torch.dtype, biased: bool
    ) -> Candidate[LinearSite]:
        """Raises UnsupportedError where no kernel takes the product."""
        its = LinearFormat.parse(_stored_as(form, x))
        measured = self.on.tuned.kernel(shape_name(str(its), FEEDS[x.dtype], weight.out, weight.size))
        heads = weight.codes.shape[0] if weight.codes.dim() == 3 else 1
        return choose(LINEAR, LinearSite(
            its, FEEDS[x.dtype], x.shape[0], weight.out, weight.size, dtype, invariant=True, capability=self.on.capability,
            measured=measured, two_of_four=measured == SEMI_STRUCTURED and self.weights.is_two_of_four(names, form, x.dtype), heads=heads,
            biased=biased,
        )).candidate  # fmt: skip

    def _cut(self, form: str, x: Tensor, weight: PackedWeight) -> tuple[linear.Order, linear.Tiles]:
        """The order of a weight's sums, and how a bucket's product is cut."""
        shape = shape_name(_stored_as(form, x), FEEDS[x.dtype], weight.out, weight.size)
        return self.on.tuned.order(shape, weight), self.on.tuned.tiles(shape, weight, x.shape[0])

    def _room(self) -> linear.Scratch:
        """One scratch for all products: as large as the largest needs."""
        sums = arrived = 1
        for unit in self.units:
            if not isinstance(first := unit.parts[0], ops.Linear | ops.HeadLinear):
                continue
            x, names = self.at[first.x], tuple(part.weight for part in unit.parts if isinstance(part, ops.Linear | ops.HeadLinear))
            weight = self.weights.linear(names, first.weight_format, x.dtype)
            order, tiles = self._cut(first.weight_format, x, weight)
            needed = linear.scratch_size(x.shape[0], weight.out, order, tiles, weight.codes.shape[0] if weight.codes.dim() == 3 else 1)
            sums, arrived = max(sums, needed[0]), max(arrived, needed[1])
        return linear.Scratch(self._empty((sums,), torch.float32), self._empty((arrived,), torch.int32).zero_())

    # --- norms, positions, attention

    def _norm(
        self, unit: Fused, op: ops.RmsNorm | ops.LayerNorm, x: Tensor, behind: Sequence[ops.Op], branch: Tensor | None = None,
        added: Tensor | None = None,
    ) -> None:  # fmt: skip
        centred = isinstance(op, ops.LayerNorm)
        bias = self._vector(op.bias) if isinstance(op, ops.LayerNorm) and op.bias is not None else None
        self._launch(functools.partial(
            rows.norm, x, self._vector(op.weight), DTYPES[self.values[op.y].dtype], eps=op.eps, group=op.group,
            y=None if op.y in dict(unit.inner) else self.at[op.y], quantized=self._quantized(behind),
            offset=op.offset if isinstance(op, ops.RmsNorm) else 0.0, bias=bias, centred=centred, branch=branch, added=added,
        ))  # fmt: skip

    def _quantized(self, behind: Sequence[ops.Op]) -> rows.Rounded | None:
        match behind:
            case [ops.QuantizeRows() | ops.QuantizeFp8() as op]:
                return rows.Rounded(self.at[op.q], self.at[op.scale])
        return None

    def _turn(self, op: ops.Rotate) -> cache.Turn:
        """Cosines and sines are made once a step, before whoever needs them first."""
        key = op.frequencies, op.magnitude
        if key not in self.turns:
            shape = self.bucket.rows, op.dims // 2
            tables = self._empty(shape, torch.float32), self._empty(shape, torch.float32)
            frequencies = self._listed(op.frequencies)
            self._launch(functools.partial(cache.rotary_tables, self.inputs.positions, frequencies, *tables, magnitude=op.magnitude))
            self.turns[key] = tables
        return cache.Turn(*self.turns[key], start=op.start, interleaved=op.interleaved)

    def _attend(self, op: ops.Attend) -> None:
        blocks, inputs = attention.blocks_for(op.head_dim), self.inputs
        slopes = None if op.slopes is None else self._listed(op.slopes)
        self._launch(functools.partial(
            attention.attend, self.at[op.q], self._layer(op.state), self.at[op.y], inputs.positions, inputs.sequence,
            inputs.pages[op.state.group], inputs.tiles[attention.tile_rows(op.heads, op.kv_heads, blocks)], heads=op.heads, scale=op.scale,
            visible=op.visible, softcap=op.softcap, slopes=slopes, sinks=None if op.sinks is None else self._vector(op.sinks),
            parts=self._parts(op, blocks), blocks=blocks,
        ))  # fmt: skip

    def _parts(self, op: ops.Attend, blocks: attention.Blocks) -> attention.Parts | None:
        """Room for parts of positions side by side, where there are few rows and many positions; one for all layers of a shape."""
        key = op.heads, op.value_dim
        if key not in self.parts:
            count = triton.cdiv(self.program.context, blocks.part)
            side = triton.cdiv(self.on.programs, self.bucket.rows * op.kv_heads)
            few = self.bucket.rows <= SPLIT_ROWS and min(count, side) > 1
            self.parts[key] = (
                attention.Parts.of(
                    self.bucket.rows, op.heads, op.value_dim, self.program.context, min(count, side), self.room.parts, blocks
                )
                if few
                else None
            )
        return self.parts[key]

    def _layer(self, state: ops.StateRef) -> cache.LayerCache:
        pool = self.pools[state.group]
        if not isinstance(pool, GroupCache):
            raise TypeError(f"{state.group} keeps no keys")
        return pool.layer(state.slot)

    def _recurrent(self, op: RecurrentOp) -> None:
        pool, inputs = self.pools[op.state.group], self.inputs
        if not isinstance(pool, StatePool):
            raise TypeError(f"{op.state.group} keeps no state")
        sequences = Sequences(inputs.positions, inputs.offsets, inputs.pages[op.state.group])
        self.launches.append(recurrent_launch(op, self.at, pool.layer(op.state.slot), sequences, self._vector, self._empty))

    def _vector(self, name: str) -> Tensor:
        return self.weights.plain(name, torch.float32)


def _stored_as(form: str, x: Tensor) -> str:
    """A weight's format by name: where it is dense, that of the rows it meets."""
    return FEEDS[x.dtype] if form == "dense" else form
