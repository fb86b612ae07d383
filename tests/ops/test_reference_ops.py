"""Every op of the reference backend: gradients, rounding, state and meaning. One generic set of tests over a table of cases.

``naive.py`` reads the same docstrings in plain NumPy; what both agree on to 1e-10 is what the op says.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import pytest
import torch

from hasten.backends.reference import State, play
from hasten.program import OPS, Batch, KvGroup, LatentGroup, Layer, Program, RecurrentGroup, StateGroup, StateRef, Value, ops
from hasten.spec import Causal, ClampedSwiglu, SegmentMemory, SlidingWindow
from tests.ops import naive

torch.set_num_threads(1)

REF = StateRef("s", 0)
ONE, MANY, LONG = (1,), (3, 1, 4), (7, 5)
Fill = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op (behind the ops in ``before``) with the shapes it is tried on. Inputs are given as features behind the token axis."""

    op: ops.Op
    inputs: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = MANY
    starts: tuple[int, ...] | None = None
    group: StateGroup | None = None
    before: tuple[ops.Op, ...] = ()
    fill: Mapping[str, Fill] = dataclasses.field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    id: str = ""

    def __str__(self) -> str:
        return f"{type(self.op).__name__}-{self.id}" if self.id else f"{type(self.op).__name__}-{'+'.join(map(str, self.lengths))}"

    @property
    def batch(self) -> Batch:
        tokens = np.random.default_rng(5).integers(0, 7, sum(self.lengths))
        cut = np.split(tokens, np.cumsum(self.lengths)[:-1])
        batch = Batch.of([piece.tolist() for piece in cut], self.starts)
        return batch if self.rows is None else dataclasses.replace(batch, rows=np.array(self.rows, np.int32))


def kept_shapes(group: StateGroup, start: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of what a sequence that has seen ``start`` tokens has kept."""
    if start == 0:
        return ()
    if isinstance(group, RecurrentGroup):
        return (group.shape,)
    kept = sum(any(naive.sees(group.visible, later, key) for later in range(start, start + 50)) for key in range(start))
    if isinstance(group, LatentGroup):
        return ((kept, 1, group.width),)
    return ((kept, group.kv_heads, group.key_dim), (kept, group.kv_heads, group.value_dim))


def data_of(case: Case) -> dict[str, np.ndarray]:
    """Float64 (or whole) numbers for every input 'in:', weight 'w:' and kept array 's:sequence:index' of a case."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    arrays = {}
    for kind, shapes in (("in", {k: (sum(case.lengths), *v) for k, v in case.inputs.items()}), ("w", case.weights)):
        for name, shape in shapes.items():
            fill = case.fill.get(name)
            arrays[f"{kind}:{name}"] = rng.standard_normal(shape) if fill is None else fill(rng, shape)
    if case.group is not None:
        for s, start in enumerate(case.starts or ()):
            for i, shape in enumerate(kept_shapes(case.group, start)):
                arrays[f"s:{s}:{i}"] = case.fill.get("state", spread(1.0))(rng, shape)
    return arrays


def program_of(case: Case, dtype: str = "float64") -> Program:
    """The case's ops as a Program, with the ops that name a dtype working in ``dtype`` (a Cast keeps its own)."""
    listed = tuple(
        msgspec.structs.replace(op, dtype=dtype) if "dtype" in op.attributes and not isinstance(op, ops.Cast) else op
        for op in (*case.before, case.op)
    )
    made = [name for op in listed for name in op.outputs]
    values = {name: Value("T", features, dtype) for name, features in case.inputs.items()} | {n: Value("T", (-1,), dtype) for n in made}
    return Program(
        ops=listed, values=values, params=dict(case.weights), states=() if case.group is None else (case.group,),
        layers=(Layer("all", 0, len(listed)),), inputs=tuple(case.inputs), outputs=tuple(case.op.outputs), context=1 << 20,
    )  # fmt: skip


def tensors_of(arrays: Mapping[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def state_of(case: Case, tensors: Mapping[str, torch.Tensor]) -> State | None:
    if case.group is None:
        return None
    if case.starts is None:
        return State(len(case.lengths))
    entries = tuple(tuple(tensors[f"s:{s}:{i}"] for i in range(len(kept_shapes(case.group, start)))) for s, start in enumerate(case.starts))
    return State(len(case.lengths), {REF: entries}, tuple(case.starts))


def run(case: Case, tensors: Mapping[str, torch.Tensor], dtype: str = "float64") -> dict[str, torch.Tensor]:
    """Every output, and everything kept ('after:sequence:index'), of one play."""
    given = {name: tensors[f"in:{name}"] for name in case.inputs}
    weights = {name: tensors[f"w:{name}"] for name in case.weights}
    outputs, after = play(program_of(case, dtype), weights, case.batch, state_of(case, tensors), given=given)
    kept = {f"after:{s}:{i}": t for s, entry in enumerate(after.entries.get(REF, ())) for i, t in enumerate(entry)}
    return {**outputs, **kept}


def run_naive(case: Case, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    past = {}
    if case.group is not None and case.starts is not None:
        shapes = [kept_shapes(case.group, start) for start in case.starts]
        past[REF] = [tuple(arrays[f"s:{s}:{i}"] for i in range(len(kept))) for s, kept in enumerate(shapes)]
    program = program_of(case)
    world = naive.World(
        values={name: arrays[f"in:{name}"] for name in case.inputs}, weights={name: arrays[f"w:{name}"] for name in case.weights},
        batch=case.batch, groups={group.name: group for group in program.states}, past=past,
    )  # fmt: skip
    for op in program.ops:
        naive.run(op, world)
    kept = {f"after:{s}:{i}": array for s, entry in enumerate(world.after.get(REF, ())) for i, array in enumerate(entry)}
    return {**{name: world.values[name] for name in program.outputs}, **kept}


# --- the table


def x_to_y(op: type[ops.Op], features: int = 6, weights: Mapping[str, tuple[int, ...]] | None = None, **fields) -> Case:
    """A case of an op from one value to one value."""
    known = {"lengths", "starts", "fill", "rows", "id"}
    settings = {name: fields.pop(name) for name in list(fields) if name in known}
    return Case(op(x="x", y="y", **fields), {"x": (features,)}, weights or {}, **settings)


def spread(scale: float) -> Fill:
    return lambda rng, shape: scale * rng.standard_normal(shape)


def integers(high: int) -> Fill:
    return lambda rng, shape: rng.integers(0, high, shape, dtype=np.int32)


def positive(rng, shape):
    """What features have been summed to: nothing below zero."""
    return rng.exponential(size=shape)


def int8(rng, shape):
    return rng.integers(-128, 128, shape, dtype=np.int8)


def tied(rng, shape):
    """Logits with many exact ties: whole numbers."""
    return rng.integers(-1, 2, shape).astype(np.float64)


def with_halves(rng, shape):
    """Rows whose scale is a power of two, so that x / scale meets exact halves; one row of zeros."""
    x = rng.integers(-254, 255, shape) / 2
    x[:, 0] = 127
    x[-1] = 0
    return x


def with_ties_of_fp8(rng, shape):
    """Rows of scale 1: numbers halfway between two of e4m3, of every size, also below its least; one row of zeros."""
    power = rng.integers(-6, 9, shape)
    x = (rng.integers(8, 16, shape) + 0.5) * 2.0 ** (power - 3) * rng.choice([-1, 1], shape)
    x[:, ::3] = (rng.integers(0, 8, shape) + 0.5)[:, ::3] * 2.0**-9
    x = np.clip(x, -448, 448)
    x[:, 0] = 448
    x[-1] = 0
    return x


def attention(kind: type[ops.Op], id: str, *, heads=2, kv_heads=2, head_dim=3, value_dim=3, visible=None, latent=False, **fields) -> Case:
    visible = visible or Causal()
    known = {"lengths", "starts", "fill"}
    settings = {name: fields.pop(name) for name in list(fields) if name in known}
    weights = {"sinks": (heads,)} if fields.get("sinks") else {}
    group: StateGroup = KvGroup("s", 1, kv_heads, head_dim, value_dim, visible)
    inputs = {"q": (heads * head_dim,), "k": (kv_heads * head_dim,), "v": (kv_heads * value_dim,)}
    if latent:
        group = LatentGroup("s", 1, head_dim, value_dim, visible)
        del inputs["v"]
    if kind is ops.Attend:
        fields["value_dim"] = value_dim
    fields.setdefault("scale", 0.7)
    op = kind(q="q", y="y", state=REF, heads=heads, kv_heads=kv_heads, head_dim=head_dim, visible=visible, **fields)
    append = ops.AppendKv(k="k", v=None if latent else "v", state=REF)
    return Case(op, inputs, weights, group=group, before=(append,), id=id, **settings)


def softmax_cases(kind: type[ops.Op]) -> list[Case]:
    window, segments = SlidingWindow(size=3), SegmentMemory(segment=3, memory=2)
    return [
        attention(kind, "one-token", lengths=ONE),
        attention(kind, "unequal", lengths=MANY),
        attention(kind, "equal-lengths", lengths=(3, 3)),
        attention(kind, "grouped-odd", heads=6, kv_heads=2, head_dim=5, value_dim=3, lengths=(4, 2)),
        attention(kind, "multi-query", heads=3, kv_heads=1, lengths=(4,)),
        attention(kind, "past", lengths=MANY, starts=(2, 5, 0)),
        attention(kind, "past-one-token", lengths=(1, 1), starts=(4, 4), heads=4),
        attention(kind, "window", visible=window, lengths=LONG),
        attention(kind, "window-past", visible=window, lengths=(4, 1), starts=(1, 6)),
        attention(kind, "window-of-one", visible=SlidingWindow(size=1), lengths=(3,), starts=(2,)),
        attention(kind, "segments", visible=segments, lengths=LONG),
        attention(kind, "segments-past", visible=segments, lengths=(5, 2, 1), starts=(4, 9, 2)),
        attention(kind, "segments-no-memory", visible=SegmentMemory(segment=2, memory=0), lengths=(5,)),
        attention(kind, "softcap", softcap=1.5, heads=4, lengths=MANY),
        attention(kind, "sinks", sinks="sinks", heads=4, lengths=MANY),
        attention(kind, "sinks-window-past", sinks="sinks", heads=4, visible=window, lengths=(3, 2), starts=(3, 1)),
        attention(kind, "alibi", slopes=(0.5, 0.0625, 0.25), heads=3, kv_heads=1, lengths=(5, 2), starts=(0, 3)),
        attention(kind, "alibi-softcap-sinks", slopes=(0.5, 0.25), softcap=2.0, sinks="sinks", lengths=MANY, starts=(1, 0, 3)),
        attention(kind, "alibi-far", slopes=(0.004, 0.5), head_dim=1, value_dim=1, lengths=(3,), starts=(300,), scale=0.05),
        attention(kind, "latent", latent=True, heads=3, kv_heads=1, head_dim=5, value_dim=4, lengths=(4, 2), starts=(2, 0)),
    ]


def relative(kind: type[ops.Op], id: str, *, heads=2, head_dim=3, width=4, visible=None, **fields) -> Case:
    visible = visible or Causal()
    known = {"lengths", "starts"}
    settings = {name: fields.pop(name) for name in list(fields) if name in known}
    op = kind(
        q="q", y="y", position_weight="p", content_bias="u", position_bias="w", state=REF, heads=heads, head_dim=head_dim, width=width,
        scale=0.6, visible=visible, **fields,
    )  # fmt: skip
    size = heads * head_dim
    return Case(
        op, {"q": (size,), "k": (size,), "v": (size,)}, {"p": (size, width), "u": (heads, head_dim), "w": (heads, head_dim)},
        group=KvGroup("s", 1, heads, head_dim, head_dim, visible), before=(ops.AppendKv(k="k", v="v", state=REF),), id=id, **settings,
    )  # fmt: skip


def relative_cases(kind: type[ops.Op]) -> list[Case]:
    return [
        relative(kind, "one-token", lengths=ONE),
        relative(kind, "unequal", lengths=MANY),
        relative(kind, "one-head-odd", heads=1, head_dim=5, width=2, lengths=(4,)),
        relative(kind, "clamp", clamp=2, lengths=(6, 3)),
        relative(kind, "segments-past-clamp", visible=SegmentMemory(segment=3, memory=4), clamp=3, lengths=(5, 2), starts=(4, 7)),
        relative(kind, "window-past", visible=SlidingWindow(size=3), lengths=(4, 1), starts=(0, 5)),
    ]


def append(id: str, group: StateGroup, **settings) -> Case:
    if isinstance(group, LatentGroup):
        return Case(ops.AppendKv(k="k", v=None, state=REF), {"k": (group.width,)}, group=group, id=id, **settings)
    inputs = {"k": (group.kv_heads * group.key_dim,), "v": (group.kv_heads * group.value_dim,)}
    return Case(ops.AppendKv(k="k", v="v", state=REF), inputs, group=group, id=id, **settings)


def conv(id: str, channels: int, taps: int, bias: bool, activation: str | None, **settings) -> Case:
    op = ops.CausalConv(x="x", weight="w", y="y", state=REF, bias="b" if bias else None, activation=activation)
    weights = {"w": (channels, taps)} | ({"b": (channels,)} if bias else {})
    return Case(op, {"x": (channels,)}, weights, group=RecurrentGroup("s", 1, (taps - 1, channels)), id=id, **settings)


def selective(id: str, channels: int, states: int, **settings) -> Case:
    op = ops.SelectiveScan(x="x", dt="dt", b="b", c="c", a_log="a_log", d="d", dt_bias="dt_bias", y="y", state=REF)
    inputs = {"x": (channels,), "dt": (channels,), "b": (states,), "c": (states,)}
    weights = {"a_log": (channels, states), "d": (channels,), "dt_bias": (channels,)}
    return Case(op, inputs, weights, group=RecurrentGroup("s", 1, (channels, states)), id=id, **settings)


def dual(id: str, heads: int, width: int, states: int, groups: int, dt_min=0.0, dt_max=None, **settings) -> Case:
    op = ops.DualScan(
        x="x", dt="dt", b="b", c="c", a_log="a_log", d="d", dt_bias="dt_bias", y="y", state=REF, heads=heads, groups=groups, dt_min=dt_min,
        dt_max=dt_max,
    )  # fmt: skip
    inputs = {"x": (heads * width,), "dt": (heads,), "b": (groups * states,), "c": (groups * states,)}
    weights = {"a_log": (heads,), "d": (heads,), "dt_bias": (heads,)}
    return Case(op, inputs, weights, group=RecurrentGroup("s", 1, (heads, width, states)), id=id, **settings)


def delta(id: str, key_heads: int, value_heads: int, key_dim: int, value_dim: int, **settings) -> Case:
    op = ops.GatedDeltaScan(
        q="q", k="k", v="v", a="a", b="b", a_log="a_log", dt_bias="dt_bias", y="y", state=REF, key_heads=key_heads, value_heads=value_heads
    )
    keys, values = (key_heads * key_dim,), (value_heads * value_dim,)
    inputs = {"q": keys, "k": keys, "v": values, "a": (value_heads,), "b": (value_heads,)}
    weights = {"a_log": (value_heads,), "dt_bias": (value_heads,)}
    return Case(op, inputs, weights, group=RecurrentGroup("s", 1, (value_heads, key_dim, value_dim)), id=id, **settings)


def linear_scan(id: str, heads: int, kv_heads: int, head_dim: int, value_dim: int, fill=None, **settings) -> Case:
    op = ops.LinearScan(
        q="q", k="k", v="v", y="y", state=REF, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim
    )  # fmt: skip
    inputs = {"q": (heads * head_dim,), "k": (kv_heads * head_dim,), "v": (kv_heads * value_dim,)}
    group = RecurrentGroup("s", 1, (kv_heads, 2 * head_dim, value_dim + 1))
    return Case(op, inputs, group=group, fill={"state": positive, **(fill or {})}, id=id, **settings)


def route(id: str, experts: int, *, correction=False, fill=None, lengths=MANY, **fields) -> Case:
    op = ops.Route(logits="x", experts="e", weights="y", correction="c" if correction else None, **fields)
    weights = {"c": (experts,)} if correction else {}
    return Case(op, {"x": (experts,)}, weights, lengths=lengths, fill={} if fill is None else {"x": fill}, id=id)


def experts(id: str, x: tuple[int, ...], bias: bool, chosen: int = 2, count: int = 4, **settings) -> Case:
    op = ops.ExpertLinear(x="x", experts="e", weight="w", y="y", bias="b" if bias else None)
    weights = {"w": (count, 2, 3)} | ({"b": (count, 2)} if bias else {})
    return Case(op, {"x": x, "e": (chosen,)}, weights, fill={"e": integers(count)}, id=id, **settings)


def rotate(id: str, heads: int, head_dim: int, dims: int, **fields) -> Case:
    known = {"lengths", "starts"}
    settings = {name: fields.pop(name) for name in list(fields) if name in known}
    frequencies = tuple(10000.0 ** (-2 * i / dims) for i in range(dims // 2))
    return x_to_y(ops.Rotate, heads * head_dim, heads=heads, dims=dims, frequencies=frequencies, id=id, **settings, **fields)


def gate(activation: object, id: str = "", width: int = 5, **settings) -> Case:
    return Case(ops.Gate(gate="g", up="u", y="y", activation=activation), {"g": (width,), "u": (5,)}, id=id or str(activation), **settings)


WINDOW = KvGroup("s", 1, 2, 3, 1, SlidingWindow(size=3))
CASES: dict[type[ops.Op], list[Case]] = {
    ops.Embed: [
        Case(ops.Embed(weight="w", y="y"), {}, {"w": (7, 3)}),
        Case(ops.Embed(weight="w", y="y", scale=11.3), {}, {"w": (7, 3)}, lengths=ONE, id="scaled"),
    ],
    ops.EmbedPositions: [
        Case(ops.EmbedPositions(weight="w", y="y"), {}, {"w": (9, 3)}),
        Case(ops.EmbedPositions(weight="w", y="y", offset=2), {}, {"w": (11, 3)}, starts=(5, 0, 2), id="offset"),
    ],
    ops.SelectRows: [
        x_to_y(ops.SelectRows, id="all"),
        x_to_y(ops.SelectRows, rows=(2, 3, 7), id="last"),
        x_to_y(ops.SelectRows, rows=(), id="none"),
        x_to_y(ops.SelectRows, rows=(5, 1, 1), id="any-order"),
        x_to_y(ops.SelectRows, lengths=(3,), rows=(2, 0, 0), id="as-many-as-tokens"),
    ],
    ops.Split: [
        Case(ops.Split(x="x", ys=("a", "b", "c"), sizes=(1, 4, 2)), {"x": (7,)}),
        Case(ops.Split(x="x", ys=("a",), sizes=(7,)), {"x": (7,)}, lengths=ONE, id="one"),
    ],
    ops.HeadSplit: [
        Case(ops.HeadSplit(x="x", ys=("a", "b"), sizes=(3, 2), heads=3), {"x": (15,)}),
        Case(ops.HeadSplit(x="x", ys=("a", "b", "c"), sizes=(1, 1, 2), heads=1), {"x": (4,)}, lengths=ONE, id="one-head"),
    ],
    ops.Concat: [
        Case(ops.Concat(xs=("a", "b"), y="y"), {"a": (3,), "b": (2,)}),
        Case(ops.Concat(xs=("a", "b", "c"), y="y", heads=2), {"a": (6,), "b": (2,), "c": (4,)}, id="heads"),
    ],
    ops.Cast: [x_to_y(ops.Cast, dtype=dtype, id=dtype) for dtype in ("float64", "float32", "bfloat16", "float16")],
    ops.QuantizeRows: [
        Case(ops.QuantizeRows(x="x", q="q", scale="scale"), {"x": (33,)}),
        Case(ops.QuantizeRows(x="x", q="q", scale="scale"), {"x": (300,)}, fill={"x": with_halves}, id="halves-and-zeros"),
        Case(ops.QuantizeRows(x="x", q="q", scale="scale"), {"x": (1,)}, lengths=ONE, id="one-number"),
    ],
    ops.QuantizeFp8: [
        Case(ops.QuantizeFp8(x="x", q="q", scale="scale"), {"x": (33,)}),
        Case(ops.QuantizeFp8(x="x", q="q", scale="scale"), {"x": (300,)}, fill={"x": with_ties_of_fp8}, id="ties-and-zeros"),
        Case(ops.QuantizeFp8(x="x", q="q", scale="scale"), {"x": (1,)}, lengths=ONE, id="one-number"),
    ],
    ops.QuantizeFixed: [
        Case(ops.QuantizeFixed(x="x", q="q", scale="scale", step=0.01), {"x": (33,)}),  # most are clipped
        Case(ops.QuantizeFixed(x="x", q="q", scale="scale", step=0.5), {"x": (300,)}, fill={"x": with_halves}, id="halves-and-zeros"),
        Case(ops.QuantizeFixed(x="x", q="q", scale="scale", step=0.03), {"x": (1,)}, lengths=ONE, id="one-number"),
    ],
    ops.Linear: [
        x_to_y(ops.Linear, 5, {"w": (3, 5)}, weight="w"),
        x_to_y(ops.Linear, 5, {"w": (4, 5), "b": (4,)}, weight="w", bias="b", lengths=ONE, id="bias"),
        x_to_y(ops.Linear, 64, {"w": (3, 64)}, weight="w", lengths=(2,), id="wide"),
        Case(ops.Linear(x="q", scale="s", weight="w", y="y"), {"q": (5,), "s": (1,)}, {"w": (3, 5)}, fill={"q": int8}, id="int8-rows"),
    ],
    ops.HeadLinear: [
        x_to_y(ops.HeadLinear, 9, {"w": (3, 2, 3)}, weight="w", heads=3),
        x_to_y(ops.HeadLinear, 4, {"w": (1, 5, 4)}, weight="w", heads=1, lengths=ONE, id="one-head"),
    ],
    ops.ExpertLinear: [
        experts("shared-rows", (3,), True),
        experts("own-rows", (2, 3), True),
        Case(
            ops.ExpertLinear(x="q", experts="e", scale="s", weight="w", y="y"),
            {"q": (3,), "e": (2,), "s": (1,)},
            {"w": (4, 2, 3)},
            fill={"q": int8, "e": integers(4)},
            id="int8-rows",
        ),
        Case(
            ops.ExpertLinear(x="q", experts="e", scale="s", weight="w", y="y"),
            {"q": (2, 3), "e": (2,), "s": (2, 1)},
            {"w": (4, 2, 3)},
            fill={"q": int8, "e": integers(4)},
            id="int8-own-rows",
        ),
        experts("no-bias", (3,), False, chosen=3),
        experts("one-token-one-expert", (1, 3), False, chosen=1, lengths=ONE),
        experts("many-idle", (3,), True, chosen=1, count=9, lengths=(2,)),
    ],
    ops.Route: [
        route("softmax", 6, top_k=2, score="softmax", normalize=True, scale=1.0),
        route("softmax-raw", 5, top_k=5, score="softmax", normalize=False, scale=2.5, lengths=ONE),
        route("sigmoid-correction", 6, top_k=3, score="sigmoid", normalize=True, scale=1.5, correction=True),
        route("groups", 12, top_k=3, score="sigmoid", normalize=True, scale=2.5, correction=True, groups=4, top_groups=2),
        route("softmax-groups-raw", 8, top_k=2, score="softmax", normalize=False, scale=1.0, groups=4, top_groups=1),
        route("groups-of-one", 4, top_k=2, score="sigmoid", normalize=False, scale=1.0, groups=4, top_groups=3),
        route("ties", 12, top_k=5, score="softmax", normalize=True, scale=1.0, fill=tied),
        route("tied-groups", 16, top_k=4, score="sigmoid", normalize=True, scale=1.0, groups=8, top_groups=3, fill=tied),
    ],
    ops.Combine: [
        Case(ops.Combine(x="x", weights="p", y="y"), {"x": (3, 4), "p": (3,)}),
        Case(ops.Combine(x="x", weights="p", y="y"), {"x": (1, 4), "p": (1,)}, lengths=ONE, id="one-expert"),
    ],
    ops.RmsNorm: [
        x_to_y(ops.RmsNorm, 6, {"w": (6,)}, weight="w", group=6, eps=1e-6),
        x_to_y(ops.RmsNorm, 6, {"w": (6,)}, weight="w", group=6, eps=0.1, offset=1.0, lengths=ONE, id="offset"),
        x_to_y(ops.RmsNorm, 6, {"w": (3,)}, weight="w", group=3, eps=1e-5, offset=1.0, id="head-weight"),
        x_to_y(ops.RmsNorm, 6, {"w": (6,)}, weight="w", group=2, eps=1e-5, id="row-weight-of-groups"),
    ],
    ops.LayerNorm: [
        x_to_y(ops.LayerNorm, 6, {"w": (6,), "b": (6,)}, weight="w", bias="b", group=6, eps=1e-5),
        x_to_y(ops.LayerNorm, 5, {"w": (5,)}, weight="w", group=5, eps=1e-2, lengths=ONE, id="no-bias"),
        x_to_y(ops.LayerNorm, 6, {"w": (3,), "b": (3,)}, weight="w", bias="b", group=3, eps=1e-5, id="head-weight"),
        x_to_y(ops.LayerNorm, 6, {"w": (6,), "b": (6,)}, weight="w", bias="b", group=3, eps=1e-5, id="row-weight-of-groups"),
    ],
    ops.Add: [Case(ops.Add(a="a", b="b", y="y"), {"a": (5,), "b": (5,)})],
    ops.Scale: [x_to_y(ops.Scale, factor=-0.3)],
    ops.Clip: [x_to_y(ops.Clip, limit=0.8)],
    ops.SoftCap: [x_to_y(ops.SoftCap, cap=0.9), x_to_y(ops.SoftCap, cap=30.0, lengths=ONE, id="loose")],
    ops.Activate: [x_to_y(ops.Activate, activation=name, fill={"x": spread(2)}, id=name) for name in naive.POINTWISE],
    ops.Gate: [
        *(gate(name) for name in naive.POINTWISE),
        gate("sigmoid", "one-number-a-row", width=1),
        gate(ClampedSwiglu(alpha=1.702, limit=0.7), "clamped", fill={"g": spread(1.5), "u": spread(1.5)}),
        gate(ClampedSwiglu(alpha=1.702, limit=7.0), "clamped-inside", lengths=ONE),
    ],
    ops.Rotate: [
        rotate("whole", 2, 6, 6),
        rotate("interleaved", 2, 6, 6, interleaved=True),
        rotate("partial", 3, 7, 4, starts=(3, 0, 9)),
        rotate("from-start", 3, 7, 4, start=3, interleaved=True, magnitude=1.3),
        rotate("odd-rest", 1, 5, 2, start=1, lengths=ONE, starts=(40,)),
        rotate("far", 2, 4, 4, lengths=(3,), starts=(100_003,)),
    ],
    ops.AppendKv: [
        append("unequal", KvGroup("s", 1, 2, 3, 1, Causal())),
        append("past", KvGroup("s", 1, 2, 3, 1, Causal()), starts=(2, 0, 7)),
        append("window", WINDOW, lengths=(2, 1, 6), starts=(0, 9, 1)),
        append("segments", KvGroup("s", 1, 1, 2, 2, SegmentMemory(segment=3, memory=2)), lengths=(2, 1, 6), starts=(4, 2, 0)),
        append("latent", LatentGroup("s", 1, 5, 3), lengths=(2, 1), starts=(0, 4)),
    ],
    ops.Attend: softmax_cases(ops.Attend),
    ops.AttentionMap: softmax_cases(ops.AttentionMap),
    ops.AttendRelative: relative_cases(ops.AttendRelative),
    ops.AttentionMapRelative: relative_cases(ops.AttentionMapRelative),
    ops.CausalConv: [
        conv("plain", 3, 4, False, None),
        conv("bias-silu-past", 3, 4, True, "silu", starts=(0, 6, 2)),
        conv("two-taps", 2, 2, True, None, lengths=ONE),
        conv("one-tap", 2, 1, False, "silu", lengths=(2, 1)),
        conv("more-taps-than-tokens", 2, 6, False, None, lengths=(2, 1), starts=(0, 3)),
    ],
    ops.SelectiveScan: [
        selective("one-token", 2, 3, lengths=ONE),
        selective("unequal", 3, 2, lengths=MANY),
        selective("past", 2, 3, lengths=(2, 3), starts=(1, 0)),
    ],
    ops.DualScan: [
        dual("one-token", 2, 3, 2, 1, lengths=ONE),
        dual("groups", 4, 1, 3, 2, lengths=MANY),
        dual("limits-past", 3, 2, 2, 1, dt_min=0.4, dt_max=0.9, lengths=(4, 2), starts=(3, 0)),
        dual("past-block", 2, 1, 2, 1, lengths=(131, 64, 65)),
    ],
    ops.GatedDeltaScan: [
        delta("one-token", 1, 1, 3, 2, lengths=ONE),
        delta("shared-keys", 2, 4, 3, 2, lengths=MANY),
        delta("past", 1, 3, 2, 5, lengths=(3, 2), starts=(0, 4)),
    ],
    ops.LinearScan: [
        linear_scan("one-token", 1, 1, 3, 2, lengths=ONE),
        linear_scan("shared-keys", 6, 2, 3, 1, lengths=MANY),
        linear_scan("past", 2, 2, 1, 5, lengths=(3, 2), starts=(0, 4)),
        linear_scan("past-block", 2, 1, 2, 1, lengths=(131, 64, 65), starts=(0, 3, 0)),
        linear_scan("nothing-in-common", 2, 1, 4, 3, fill={"q": spread(300.0), "k": spread(300.0)}, lengths=(5, 2), starts=(0, 1)),
    ],
}

EVERY = [case for cases in CASES.values() for case in cases]
STATEFUL = [case for case in EVERY if case.op.contract.state != "none"]


# --- what is asked of all of them


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_every_op_has_cases_and_an_oracle(op):
    assert CASES.get(op), f"{op.__name__} has no case in tests/ops/test_reference_ops.py"
    assert all(type(case.op) is op for case in CASES[op])
    assert op in naive.ORACLES


def test_the_table_says_what_it_covers():
    assert len({str(case) for case in EVERY}) == len(EVERY), "case names must differ: their numbers are drawn from them"
    labels = {"adapter", "shard", "weight_format"}  # name how a backend holds a weight, not what is computed
    for op in OPS:
        for field in msgspec.structs.fields(op):
            if field.name not in labels | {"dtype"}:  # every dtype is tried by the tests below
                tried = {str(getattr(case.op, field.name)) for case in CASES[op]} - {str(field.default)}
                assert tried, f"{op.__name__}.{field.name} is never tried with anything but its default"


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_means_what_its_docstring_says(case):
    arrays = data_of(case)
    expected, found = run_naive(case, arrays), run(case, tensors_of(arrays))
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = (found[name].double() if found[name].dtype in {torch.bfloat16, torch.float8_e4m3fn} else found[name]).numpy()
        assert got.shape == want.shape, name
        if not np.issubdtype(want.dtype, np.floating):
            assert got.dtype == want.dtype
            assert np.array_equal(got, want), name
        else:
            largest = max(1.0, np.abs(want).max(initial=0))
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=1e-10 * largest, err_msg=name)


@pytest.mark.parametrize("case", [case for case in EVERY if case.op.contract.differentiable and tied not in case.fill.values()], ids=str)
def test_gradients(case):
    tensors = tensors_of(data_of(case))
    if getattr(case.op, "dtype", "float64") in {"float32", "bfloat16", "float16"} and isinstance(case.op, ops.Cast):
        x = tensors["in:x"].requires_grad_()
        run(case, tensors)["y"].double().sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))  # no differences to take of a rounded number: the gradient passes straight through
        return
    leaves = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]

    def of_leaves(*values):
        made = run(case, tensors | dict(zip(leaves, values)))
        return tuple(tensor for tensor in made.values() if tensor.is_floating_point() and tensor.numel())

    values = [tensors[name].requires_grad_() for name in leaves]
    if case.rows == ():
        assert of_leaves(*values) == ()
        return
    assert all(tensor.requires_grad for tensor in of_leaves(*values))
    slow = sum(value.numel() for value in values) <= 120
    assert torch.autograd.gradcheck(of_leaves, values, fast_mode=not slow, raise_exception=True)


@pytest.mark.parametrize("case", [case for case in EVERY if not case.op.contract.differentiable], ids=str)
def test_no_gradients_where_the_contract_says_so(case):
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors_of(data_of(case)).items()}
    for name, tensor in run(case, tensors).items():
        assert not tensor.requires_grad, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_rounding_stays_within_the_contract(case, dtype):
    rounded = tensors_of(data_of(case), getattr(torch, dtype))
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in rounded.items()}
    allowed = case.op.contract.tolerance[dtype == "bfloat16"]
    expected, found = run(case, exact), run(case, rounded, dtype)
    for name, want in expected.items():
        got = found[name]
        if not want.is_floating_point() and allowed == 0:
            assert torch.equal(got, want), name
        elif want.numel():
            worst = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
            assert worst <= allowed, f"{name}: off by {worst:.2e}, {allowed:.0e} allowed"


def absolute(y: torch.Tensor, case: Case, batch: Batch, held: list[int], whole: int) -> torch.Tensor:
    """An attention map with its columns at their positions instead of from the oldest kept one."""
    laid = torch.zeros(*y.shape[:2], whole, dtype=y.dtype)
    for s, (begin, end) in enumerate(zip(batch.offsets, batch.offsets[1:])):
        stop = int(batch.positions[end - 1]) + 1
        laid[begin:end, :, stop - held[s] : stop] = y[begin:end, :, : held[s]]
        assert not y[begin:end, :, held[s] :].any()
    return laid


@pytest.mark.parametrize("largest", [1, 4])
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_in_chunks_equals_at_once(case, largest):
    """Each sequence is cut at places of its own; sequences come and go between the steps, their states selected and joined."""
    tensors = tensors_of(data_of(case))
    weights = {name: tensors[f"w:{name}"] for name in case.weights}
    program, batch = program_of(case), case.batch
    offsets, starts = batch.offsets.tolist(), [int(p) for p in batch.positions[batch.offsets[:-1]]]
    state = state_of(case, tensors)
    given = {name: tensors[f"in:{name}"] for name in case.inputs}
    at_once, after = play(program, weights, batch, state, given=given)
    is_map, longest = isinstance(case.op, ops.AttentionMap | ops.AttentionMapRelative), int(batch.positions.max()) + 1

    def held(state, sequence):
        entry = state.entries[REF][sequence] if REF in state.entries else ()
        return len(entry[0]) if entry else 0

    if is_map:
        counts = [held(state, s) + length for s, length in enumerate(case.lengths)]
        at_once = {"y": absolute(at_once["y"], case, batch, counts, longest)}

    rng = np.random.default_rng(largest)
    states = [state.select([s]) for s in range(len(case.lengths))]
    done = [0] * len(case.lengths)
    pieces = {name: torch.zeros_like(whole) for name, whole in at_once.items()}
    steps = 0
    while active := [s for s, length in enumerate(case.lengths) if done[s] < length]:
        sizes = [int(rng.integers(1, 1 + min(case.lengths[s] - done[s], largest * (1 + case.lengths[s] // 16)))) for s in active]
        rows = [offsets[s] + done[s] + i for s, size in zip(active, sizes) for i in range(size)]
        part = Batch.of([[0] * size for size in sizes], [starts[s] + done[s] for s in active])
        carried = states[active[0]]
        for s in active[1:]:
            carried = carried.joined(states[s])
        outputs, left = play(program, weights, part, carried, given={name: x[rows] for name, x in given.items()})
        if is_map:
            outputs = {"y": absolute(outputs["y"], case, part, [held(states[s], 0) + n for s, n in zip(active, sizes)], longest)}
        for name, made in outputs.items():
            pieces[name][rows] = made
        for index, (s, size) in enumerate(zip(active, sizes)):
            states[s] = left.select([index])
            done[s] += size
        steps += 1
    assert largest > 1 or steps > 1 or max(case.lengths) == 1
    for name, whole in at_once.items():
        torch.testing.assert_close(pieces[name], whole, rtol=0, atol=1e-12)
    for s, kept in enumerate(after.entries[REF]):
        for mine, want in zip(states[s].entries[REF][0], kept, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
