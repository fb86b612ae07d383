"""Ops that keep rows apart, each on a tape of its own at every instruction-set level, against the reference op in float64."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu import unsupported_ops
from hasten.backends.cpu.compile import compile_program
from hasten.backends.cpu.rows import row_stride
from hasten.formats.weights import Weight, Weights
from hasten.program import Layer, Program, Value, ops
from hasten.spec import ClampedSwiglu
from tests.ops import naive
from tests.ops.packing import all_packed
from tests.ops.test_reference_ops import CASES, Case, data_of, run, spread, tensors_of, x_to_y

ROW_OPS = (
    ops.EmbedPositions, ops.SelectRows, ops.Split, ops.HeadSplit, ops.Concat, ops.Cast, ops.RmsNorm, ops.LayerNorm, ops.Add,
    ops.Scale, ops.Clip, ops.SoftCap, ops.Activate, ops.Gate, ops.Rotate, ops.HeadLinear,
)  # fmt: skip
BEHIND_LOGIT_ROWS = (ops.LayerNorm, ops.Scale, ops.Clip, ops.SoftCap, ops.Activate, ops.Split)
LENGTHS = ((1,), (17,), (1, 16, 4))
WIDTHS = (1, 7, 16, 17, 33, 130)
FILLER = 64  # features beside what is looked at: a tape takes token ids below its number of logits
POOLS = [_native.ThreadPool(threads) for threads in (1, 2)]
ISAS = pytest.mark.parametrize("isa", _native.available_isas())


def awkward(n: int) -> list[Case]:
    """Every op on rows of about ``n`` features, in batches of awkward lengths."""
    wide = spread(3.0)
    cases = [
        x_to_y(ops.LayerNorm, n, {"w": (n,), "b": (n,)}, weight="w", bias="b", group=n, eps=1e-5, fill={"x": wide}),
        x_to_y(ops.LayerNorm, 3 * n, {"w": (n,)}, weight="w", group=n, eps=1e-5, fill={"x": wide}),
        x_to_y(ops.LayerNorm, 2 * n, {"w": (2 * n,), "b": (2 * n,)}, weight="w", bias="b", group=n, eps=1e-5, fill={"x": wide}),
        x_to_y(ops.Scale, n, factor=1.7),
        x_to_y(ops.Clip, n, limit=0.8),
        x_to_y(ops.SoftCap, n, cap=2.0, fill={"x": wide}),
        *(x_to_y(ops.Activate, n, activation=name, fill={"x": wide}) for name in naive.POINTWISE),
        *(Case(ops.Gate(gate="g", up="u", y="y", activation=name), {"g": (1,), "u": (n,)}) for name in naive.POINTWISE),
        Case(ops.Gate(gate="g", up="u", y="y", activation="silu"), {"g": (2, n), "u": (2, n)}),
        Case(
            ops.Gate(gate="g", up="u", y="y", activation=ClampedSwiglu(alpha=1.702, limit=2.0)),
            {"g": (2, n), "u": (2, n)},
            fill={"g": wide, "u": wide},
        ),
        Case(ops.Split(x="x", ys=("a", "b", "c"), sizes=(n, 1, 5)), {"x": (n + 6,)}),
        Case(ops.HeadSplit(x="x", ys=("a", "b"), sizes=(n, 3), heads=3), {"x": (3 * n + 9,)}),
        Case(ops.Concat(xs=("a", "b"), y="y", heads=3), {"a": (3 * n,), "b": (6,)}),
        Case(ops.EmbedPositions(weight="w", y="y", offset=2), weights={"w": (60, n)}),
        x_to_y(ops.HeadLinear, 3 * n, {"w": (3, 5, n)}, weight="w", heads=3),
        x_to_y(ops.HeadLinear, 2 * 7, {"w": (2, n, 7)}, weight="w", heads=2),
    ]
    return [
        dataclasses.replace(case, lengths=lengths, starts=tuple(range(len(lengths))), id=f"{index}-{n}-{lengths}")
        for index, case in enumerate(cases)
        for lengths in LENGTHS
    ]


TABLE = [case for op in ROW_OPS for case in CASES[op]]
TABLE = [case for case in TABLE if not isinstance(case.op, ops.Cast) or case.op.dtype == "float32"]
TABLE = [case for case in TABLE if np.all(np.diff(case.batch.rows) > 0)]  # what a tape plays: an engine asks for rows in order
AWKWARD = [case for n in WIDTHS for case in awkward(n)]


def numbers_of(case: Case) -> dict[str, np.ndarray]:
    """The case's numbers as a tape holds them: inputs (they come out of embedding tables) and factors in bf16, other weights in float32."""
    arrays, linear = data_of(case), isinstance(case.op, ops.HeadLinear)
    kinds = {name: ml_dtypes.bfloat16 if name.startswith("in:") or linear else np.float32 for name in arrays}
    return {name: array.astype(kinds[name]).astype(np.float64) for name, array in arrays.items()}


def features_of(case: Case, made: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {**case.inputs, **{name: array.shape[1:] for name, array in made.items()}}


def taped(case: Case, arrays: dict[str, np.ndarray], features: dict[str, tuple[int, ...]], first: bool) -> tuple[Program, Weights]:
    """Inputs from tables, the op, what it makes beside a filler as logits. ``first`` picks the logit rows before the op, not after.

    The first value of all is as large as the arena, and NaN: whatever an op does not write is NaN afterwards."""
    weights = {name: arrays[f"w:{name}"].astype(np.float32) for name in case.weights}
    values, listed, flat = {}, [], []
    rows = sum(case.lengths)

    def value(name: str, shape: tuple[int, ...], symbol: str = "T") -> str:
        values[name] = Value(symbol, shape, "float32")
        return name

    def table(name: str, array: np.ndarray) -> None:
        weights[f"table:{name}"] = array.reshape(len(array), -1)
        value(name, array.shape[1:])
        listed.append(ops.Embed(weight=f"table:{name}", y=name))

    total = 4 * (sum(math.prod(shape) + 16 for shape in features.values()) + FILLER)
    table("poison", np.full((rows, total), np.nan))
    for name in case.inputs:
        table(name, arrays[f"in:{name}"])
    op, symbol = case.op, "T"
    if first:
        for name in case.inputs:
            listed.append(ops.SelectRows(x=name, y=value(f"{name}.rows", case.inputs[name], "R")))
        op, symbol = op.renamed(lambda name: f"{name}.rows" if name in case.inputs else name), "R"
    listed.append(op)
    for name in op.outputs:
        value(name, features[name], "R" if isinstance(op, ops.SelectRows) else symbol)
        listed.append(ops.Scale(x=name, y=value(f"{name}.flat", (math.prod(features[name]),), values[name].rows), factor=1.0))
        flat.append(f"{name}.flat")
    table("filler", np.zeros((rows, FILLER)))
    width = sum(values[name].features[0] for name in flat) + FILLER
    if values[flat[0]].rows == "R":
        listed.append(ops.SelectRows(x="filler", y=value("filler.rows", (FILLER,), "R")))
        listed.append(ops.Concat(xs=(*flat, "filler.rows"), y=value("logits", (width,), "R")))
    else:
        listed.append(ops.Concat(xs=(*flat, "filler"), y=value("all", (width,))))
        listed.append(ops.SelectRows(x="all", y=value("logits", (width,), "R")))
    context = 1 << 20
    if isinstance(op, ops.EmbedPositions):
        context = case.weights["w"][0] - op.offset
    program = Program(
        ops=tuple(listed), values=values, params={name: array.shape for name, array in weights.items()}, states=(),
        layers=(Layer("all", 0, len(listed)),), inputs=(), outputs=("logits",), context=context,
    )  # fmt: skip
    assert unsupported_ops(program) == ()
    held = {name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in weights.items()}
    return program, Weights(held)


def play_taped(case, arrays, features, isa, rows, first=False):
    """Every output of the case's op, [rows, features flattened]."""
    program, weights = taped(case, arrays, features, first)
    tokens = np.arange(sum(case.lengths), dtype=np.int32)
    results = []
    for pool in POOLS:
        tape = compile_program(program, weights, all_packed(pool), pool, isa=isa, most_tokens=len(tokens), page=16, pages={}).tape
        logits = np.full((len(rows), program.values["logits"].features[0]), np.nan, np.float32)
        tape.run(tokens, case.batch.positions, case.batch.offsets, rows, [_native.PageTable([]) for _ in case.lengths], logits)
        results.append(logits)
    assert np.array_equal(*results, equal_nan=True)
    assert not results[0][:, -FILLER:].any()
    cuts = np.cumsum([math.prod(features[name]) for name in case.op.outputs])
    return dict(zip(case.op.outputs, np.split(results[0][:, :-FILLER], cuts[:-1], axis=1)))


def check(case: Case, got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, want in expected.items():
        want = want.reshape(len(want), math.prod(want.shape[1:]))
        assert got[name].shape == want.shape
        assert not np.isnan(got[name]).any(), name
        worst = np.abs(got[name] - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30)
        assert worst <= case.op.contract.tolerance[0], f"{name}: off by {worst:.2e}"


@ISAS
@pytest.mark.parametrize("case", [*TABLE, *AWKWARD], ids=str)
def test_within_the_contract(case, isa):
    arrays = numbers_of(case)
    expected = {name: tensor.double().numpy() for name, tensor in run(case, tensors_of(arrays)).items()}
    rows = case.batch.rows if isinstance(case.op, ops.SelectRows) else np.arange(sum(case.lengths), dtype=np.int32)
    check(case, play_taped(case, arrays, features_of(case, expected), isa, rows), expected)


@ISAS
@pytest.mark.parametrize("case", [case for case in AWKWARD if isinstance(case.op, BEHIND_LOGIT_ROWS)], ids=str)
def test_of_logit_rows(case, isa):
    """Fewer rows than tokens."""
    arrays, rows = numbers_of(case), np.arange(sum(case.lengths), dtype=np.int32)[::3].copy()
    expected = {name: tensor.double().numpy() for name, tensor in run(case, tensors_of(arrays)).items()}
    got = play_taped(case, arrays, features_of(case, expected), isa, rows, first=True)
    check(case, got, {name: array[rows] for name, array in expected.items()})


@ISAS
def test_nan_and_infinity_pass_through(isa):
    """What a diverged model makes is seen, not capped."""
    x = np.array([np.nan, np.inf, -np.inf, 1.0] * 5 + [np.nan], np.float32)
    for cap in (_native.clip, _native.soft_cap):
        y = np.zeros_like(x)
        cap(isa, x, 2.0, y)
        assert np.array_equal(np.isnan(y), np.isnan(x))
        assert np.array_equal(y[[1, 2]], [2.0, -2.0])
    y = np.zeros_like(x)
    _native.scale(isa, x, -2.0, y)
    assert np.array_equal(y, -2.0 * x, equal_nan=True)
    for gates, up in ((x, np.ones_like(x)), (np.ones_like(x), x)):
        _native.clamped_swiglu(isa, gates, up, 1.702, 7.0, y)
        assert np.array_equal(np.isfinite(y), ~np.isnan(x) & ~np.isneginf(gates))  # +inf is clamped


@ISAS
@pytest.mark.parametrize("activation", sorted(naive.POINTWISE))
def test_one_arithmetic_for_an_activation_alone_and_in_a_gate(isa, activation):
    rng = np.random.default_rng(3)
    x, up = (rng.standard_normal(1003).astype(np.float32) for _ in range(2))
    alone, gated, by_row = (np.full_like(x, np.nan) for _ in range(3))
    _native.activate(isa, activation, x, alone)
    _native.gate(isa, activation, x, up, gated)
    assert np.array_equal(alone * up, gated)
    _native.gate_rows(isa, activation, x, up[:, None].copy(), by_row[:, None])
    assert np.array_equal(by_row, gated)
    _native.activate(isa, activation, x, x)  # in place
    assert np.array_equal(x, alone)


def head(scale: float, cap: float) -> tuple[Program, Weights, np.ndarray]:
    """rows → a product with the identity → scaled → capped, as lowering writes a head."""
    width = 128
    table = np.random.default_rng(0).standard_normal((width, width)).astype(ml_dtypes.bfloat16)
    weights = {"table": table, "eye": np.eye(width, dtype=np.float32)}
    values = {"x": Value("T", (width,), "float32"), "fed": Value("R", (width,), "bfloat16")} | {
        name: Value("R", (width,), "float32") for name in ("rows", "head", "scaled", "logits")
    }
    listed = (
        ops.Embed(weight="table", y="x"), ops.SelectRows(x="x", y="rows"),
        ops.Cast(x="rows", y="fed", dtype="bfloat16"), ops.Linear(x="fed", weight="eye", y="head"),
        ops.Scale(x="head", y="scaled", factor=scale), ops.SoftCap(x="scaled", y="logits", cap=cap),
    )  # fmt: skip
    program = Program(
        ops=listed, values=values, params={name: array.shape for name, array in weights.items()}, states=(),
        layers=(Layer("all", 0, len(listed)),), inputs=(), outputs=("logits",), context=64,
    )  # fmt: skip
    held = {name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in weights.items()}
    return program, Weights(held), cap * np.tanh(table.astype(np.float64) * scale / cap)


@ISAS
def test_a_head_is_scaled_and_capped_in_the_callers_array(isa, monkeypatch):
    sizes = []
    make = _native.Tape
    monkeypatch.setattr(_native, "Tape", lambda pool, isa, arena, *rest: sizes.append(arena) or make(pool, isa, arena, *rest))
    program, weights, expected = head(0.5, 3.0)
    tape = compile_program(program, weights, all_packed(POOLS[1]), POOLS[1], isa=isa, most_tokens=32, page=16, pages={}).tape
    assert sizes == [32 * (2 * 128 * 4 + 2 * row_stride(128, 2))], "x, rows and their bf16 copy; nothing for what becomes the logits"
    tokens, rows = np.arange(20, dtype=np.int32), np.array([3, 4, 19], np.int32)
    logits = np.full((3, 128), np.nan, np.float32)
    tape.run(tokens, tokens, np.array([0, 20], np.int32), rows, [_native.PageTable([])], logits)
    np.testing.assert_allclose(logits, expected[rows], rtol=0, atol=6e-6)


def test_positions_that_a_table_lacks_are_refused():
    case = CASES[ops.EmbedPositions][1]
    arrays = numbers_of(case)
    program, weights = taped(case, arrays, {"y": (3,)}, False)
    longer = dataclasses.replace(program, context=program.context + 1)
    with pytest.raises(ValueError, match=r"w has 9 positions, fewer than the context of 10"):
        compile_program(longer, weights, all_packed(POOLS[0]), POOLS[0], isa="generic", most_tokens=8, page=16, pages={})
    tape = _native.Tape(POOLS[0], "generic", 64, 1, 4, 10)
    with pytest.raises(ValueError, match="fewer positions than the context"):
        tape.embed_positions(np.zeros((9, 3), np.float32), 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: _native.activate("generic", "swish", x, y), "activation is 'swish'; accepted"),
        (lambda x, y: _native.activate("sse9", "relu", x, y), "isa 'sse9' is not known"),
        (lambda x, y: _native.scale("generic", x, 2.0, y[:-1]), "y must"),
        (lambda x, y: _native.gate_rows("generic", "relu", x[:2], x[None].copy(), y[None]), "gate must"),
        (lambda x, y: _native.clamped_swiglu("generic", x, x[:2], 1.0, 1.0, y), "gate and up must"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as caught:
        call(np.ones(3, np.float32), np.ones(3, np.float32))
    assert str(caught.value).startswith(message)
