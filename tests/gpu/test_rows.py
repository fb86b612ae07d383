"""Row-wise kernels against the reference backend playing the same ops in float64, and to the bit whatever else is in the batch."""

import itertools
from typing import get_args

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch

from hasten.backends.cuda.kernels import pointwise, rows
from hasten.backends.cuda.kernels.rows import Rounded
from hasten.backends.reference import play
from hasten.program import Batch, Layer, Program, Value, ops
from hasten.spec import Activation, ClampedSwiglu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 0, torch.bfloat16: 1}
both = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def numbers(seed, *shape, scale=1.0):
    return torch.from_numpy((np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32))


def reference(listed, inputs, weights=None, batch=None):
    """Outputs of the last op, everything float64 (or as whole numbers)."""
    wide = [msgspec.structs.replace(op, dtype="float64") if "dtype" in op.attributes else op for op in listed]
    given = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    count = len(next(iter(given.values()))) if given else len(batch.tokens)
    values = {name: Value("T", tuple(each.shape[1:]), "float64") for name, each in given.items()}
    values |= {name: Value("T", (-1,), "float64") for op in wide for name in op.outputs}
    weights = {name: each.double() for name, each in (weights or {}).items()}
    program = Program(
        ops=tuple(wide), values=values, params={name: tuple(each.shape) for name, each in weights.items()}, states=(),
        layers=(Layer("all", 0, len(wide)),), inputs=tuple(given), outputs=tuple(wide[-1].outputs), context=1 << 20,
    )  # fmt: skip
    outputs, _ = play(program, weights, batch or Batch.of([[0] * count]), None, given=given)
    return [outputs[name] for name in wide[-1].outputs]


kinds = pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])


def empty(shape, dtype, device):
    """Memory that holds what no kernel should leave: NaN, or −128."""
    return torch.full(shape, -128 if dtype == torch.int8 else float("nan"), dtype=dtype, device=device)


def room(shape, device, kind=torch.int8):
    return Rounded(empty(shape, kind, device), empty((*shape[:-1], 1), torch.float32, device))


def near(y, expected, op):
    """Within the op's contract for y's dtype."""
    assert y.isfinite().all()
    error = (y.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= type(op).contract.tolerance[TOLERANCE[y.dtype]], error


def exactly_rounded(x, quantized):
    """QuantizeRows, or QuantizeFp8, of the very numbers in x, to the bit."""
    fp8 = quantized.q.dtype == torch.float8_e4m3fn
    scale = x.float().abs().amax(dim=-1, keepdim=True) / (448 if fp8 else 127)
    scale = torch.where(scale == 0, 1.0, scale)
    assert torch.equal(quantized.scale.cpu(), scale)
    ratio = (x.float() / scale).numpy()
    expected = ratio.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn) if fp8 else np.rint(ratio).astype(np.int8)
    np.testing.assert_array_equal(codes(quantized), expected.view(np.uint8))


def codes(quantized):
    return quantized.q.cpu().view(torch.uint8).numpy()


# --- norms

NORMS = [
    ops.RmsNorm(x="x", weight="w", y="y", group=300, eps=1e-5),
    ops.RmsNorm(x="x", weight="w", y="y", group=300, eps=1e-6, offset=1.0),
    ops.RmsNorm(x="x", weight="w", y="y", group=20, eps=1e-6),
    ops.LayerNorm(x="x", weight="w", y="y", group=300, eps=1e-5),
    ops.LayerNorm(x="x", weight="w", y="y", bias="b", group=300, eps=1e-5),
    ops.LayerNorm(x="x", weight="w", y="y", bias="b", group=20, eps=1e-5),
]


def normalized(op, x, weights, dtype, **more):
    offset = op.offset if isinstance(op, ops.RmsNorm) else 0.0
    rows.norm(
        x, weights["w"], dtype, eps=op.eps, group=op.group, offset=offset, bias=weights.get("b"),
        centred=isinstance(op, ops.LayerNorm), **more,
    )  # fmt: skip


def weights_of(op, full, device):
    size = 300 if full else op.group
    names = ["w", "b"] if getattr(op, "bias", None) else ["w"]
    return {name: (1 + numbers(number, size, scale=0.3)).to(device) for number, name in enumerate(names)}


@both
@pytest.mark.parametrize("op", NORMS, ids=lambda op: f"{type(op).__name__}-{op.group}")
@pytest.mark.parametrize("full", [False, True])
def test_norm(op, full, dtype, device):
    x, weights = (numbers(3, 5, 300) + 0.5).to(dtype), weights_of(op, full, device)
    y = empty((5, 300), dtype, device)
    normalized(op, x.to(device), weights, dtype, y=y)
    if isinstance(op, ops.RmsNorm) and not full and op.group < 300 or isinstance(op, ops.LayerNorm) and not full and op.group < 300:
        weights = {name: each.repeat(300 // op.group) for name, each in weights.items()}  # one run's weight is every run's
    near(y, reference([op], {"x": x}, {name: each.cpu() for name, each in weights.items()})[0], op)


@kinds
@pytest.mark.parametrize(("residual", "dtype"), list(itertools.product(DTYPES.values(), DTYPES.values())))
def test_add_then_norm_then_rounding(residual, dtype, kind, device):
    """One kernel writes what three would: the sum, the norm of the sum as it was written, and its rows rounded."""
    op = NORMS[1]
    x, branch, weights = numbers(4, 4, 300, scale=9).to(residual), numbers(5, 4, 300).to(dtype), weights_of(op, False, device)
    added, y, quantized = empty((4, 300), residual, device), empty((4, 300), dtype, device), room((4, 300), device, kind)
    normalized(op, x.to(device), weights, dtype, branch=branch.to(device), added=added, y=y, quantized=quantized)
    assert torch.equal(added.cpu(), (x.float() + branch.float()).to(residual))
    apart = empty((4, 300), dtype, device)
    normalized(op, added, weights, dtype, y=apart)
    assert torch.equal(y, apart)
    near(y, reference([op], {"x": added.cpu()}, {"w": weights["w"].cpu()})[0], op)
    exactly_rounded(y.cpu(), quantized)
    alone, in_place = room((4, 300), device, kind), x.to(device).clone()
    normalized(op, in_place, weights, dtype, branch=branch.to(device), added=in_place, quantized=alone)
    assert torch.equal(in_place, added)
    assert np.array_equal(codes(alone), codes(quantized))


def test_a_norm_is_rounded_to_its_dtype_before_it_is_cast(device):
    x, weights = numbers(6, 3, 300), weights_of(NORMS[0], False, device)
    y, cast = empty((3, 300), torch.bfloat16, device), empty((3, 300), torch.float32, device)
    normalized(NORMS[0], x.to(device), weights, torch.bfloat16, y=y)
    normalized(NORMS[0], x.to(device), weights, torch.bfloat16, y=cast)
    assert torch.equal(cast, y.float())


def test_a_norms_bits_do_not_depend_on_other_rows(device):
    for op in NORMS[0], NORMS[2], NORMS[5]:
        x, weights = numbers(7, 21, 300).to(device), weights_of(op, False, device)
        whole = empty((21, 300), torch.float32, device)
        normalized(op, x, weights, torch.float32, y=whole)
        x[:8] = float("nan")
        for begin, end in [(8, 9), (0, 21), (10, 14)]:
            y = empty((end - begin, 300), torch.float32, device)
            normalized(op, x[begin:end], weights, torch.float32, y=y)
            kept = max(8 - begin, 0)
            assert torch.equal(y[kept:], whole[begin + kept : end])


def test_rows_of_any_stride(device):
    wide, weights = numbers(8, 4, 900).to(device), weights_of(NORMS[0], False, device)
    y = empty((4, 700), torch.float32, device)
    normalized(NORMS[0], wide[:, 500:800], weights, torch.float32, y=y[:, 300:600])
    alone = empty((4, 300), torch.float32, device)
    normalized(NORMS[0], wide[:, 500:800].contiguous(), weights, torch.float32, y=alone)
    assert torch.equal(y[:, 300:600], alone)
    assert y[:, :300].isnan().all()
    assert y[:, 600:].isnan().all()


def test_norms_that_do_not_fit_are_refused(device):
    x, y = torch.zeros(2, 12), torch.zeros(2, 12)
    refused = [
        (7, {"group": 12}),
        (12, {"group": 5}),
        (4, {"group": 4, "quantized": room((2, 12), device), "y": None}),
        (4, {"group": 4, "quantized": room((2, 12), device), "y": y.to(torch.bfloat16)}),
        (12, {"group": 12, "branch": x}),
    ]
    for weight, more in refused:
        with pytest.raises(ValueError, match=r"features|whole runs|rounded|written|runs"):
            rows.norm(x.to(device), torch.ones(weight, device=device), torch.float32, eps=1e-5, **{"y": y.to(device), **more})


@kinds
def test_rows_of_several_runs_are_rounded_as_wholes(kind, device):
    x, weights, quantized = numbers(8, 3, 300).to(device), weights_of(NORMS[2], False, device), room((3, 300), device, kind)
    y = empty((3, 300), torch.bfloat16, device)
    normalized(NORMS[2], x, weights, torch.bfloat16, y=y, quantized=quantized)
    exactly_rounded(y.cpu(), quantized)


# --- rounding to int8 and fp8


@kinds
@both
def test_quantize_rows(dtype, kind, device):
    """Long rows; exact halves; a row of zeros; the least and the largest, one whose scale is below the least float32; three axes."""
    x = numbers(9, 6, 5000, scale=3)
    x[0] = torch.from_numpy(np.random.default_rng(10).integers(-254, 255, 5000) / 2)
    x[0, 0], x[1], x[2, 7] = 127, 0, 1e30
    x[3] *= 1e-30
    x[4] = (numbers(10, 5000) > 0) * 2.0**-149 * 60
    x = x.to(dtype)
    quantized = room((6, 5000), device, kind)
    rows.quantize_rows(x.to(device), quantized)
    exactly_rounded(x, quantized)
    assert (quantized.q[[1, 4]].float() == 0).all()
    assert quantized.scale[[1, 4]].eq(1).all()
    halves = (x[0].float() * 2 % 2 == 1).sum()
    assert halves > 1000, "no halves were rounded"
    three = room((2, 3, 5000), device, kind)
    rows.quantize_rows(x.view(2, 3, 5000).to(device), three)
    assert np.array_equal(codes(three).reshape(6, 5000), codes(quantized))
    assert torch.equal(three.scale.view(6, 1), quantized.scale)


def test_every_tie_of_fp8_and_what_its_range_ends_at(device):
    """Halfway between any two numbers of e4m3 side by side, beside 448; and a scale so small that it was rounded to 448/627 of itself."""
    every = np.sort(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    every = every[np.isfinite(every)]
    ties = (every[1:] + every[:-1]) / 2
    x = torch.from_numpy(np.stack([np.concatenate([ties, every[-1:]]), np.full(len(ties) + 1, 627 * 2.0**-149, np.float32)]))
    quantized = room(tuple(x.shape), device, torch.float8_e4m3fn)
    rows.quantize_rows(x.to(device), quantized)
    assert quantized.scale.flatten().tolist() == [1.0, 2.0**-149]
    exactly_rounded(x, quantized)
    assert (codes(quantized)[0] & 1 == 0).all(), "a tie went to the odd neighbour"
    assert (quantized.q[1].float() == 448).all()


@kinds
def test_what_is_not_a_number_shows_in_its_own_rows_scale(kind, device):
    x = numbers(11, 3, 40)
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    quantized = room((3, 40), device, kind)
    rows.quantize_rows(x.to(device), quantized)
    assert [bool(each.isfinite()) for each in quantized.scale.flatten()] == [True, False, False]


@both
def test_quantize_fixed(dtype, device):
    x = numbers(12, 3, 1100, scale=4).to(dtype)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), 1e30, -1e30
    quantized = room((3, 1100), device)
    rows.quantize_fixed(x.to(device), quantized, 0.0625)
    expected = torch.round(x.float() / 0.0625).nan_to_num(nan=127.0).clamp(-127, 127).to(torch.int8)
    assert torch.equal(quantized.q.cpu(), expected)
    assert (quantized.scale == 0.0625).all()


# --- gates and single numbers

GATES = [*get_args(Activation), ClampedSwiglu(alpha=1.7, limit=1.25)]


def test_every_activation_of_the_spec_is_known():
    assert get_args(Activation) == pointwise.ACTIVATIONS


@both
@pytest.mark.parametrize(("activation", "one"), [*((name, False) for name in GATES), ("silu", True), (GATES[-1], True)], ids=str)
def test_gate(activation, one, dtype, device):
    op = ops.Gate(gate="g", up="u", y="y", activation=activation)
    wide = numbers(13, 3, 2 * 1030, scale=2).to(dtype)  # as one product writes both
    gate, up = (wide[:, :1] if one else wide[:, :1030]), wide[:, 1030:]
    y, quantized, alone = empty((3, 1030), dtype, device), room((3, 1030), device), room((3, 1030), device, torch.float8_e4m3fn)
    on = wide.to(device)
    rows.gate(on[:, :1] if one else on[:, :1030], on[:, 1030:], activation, dtype, y=y)
    near(y, reference([op], {"g": gate, "u": up})[0], op)
    other = empty((3, 1030), dtype, device)
    rows.gate(on[:, :1] if one else on[:, :1030], on[:, 1030:], activation, dtype, y=other, quantized=quantized)
    assert torch.equal(other, y)
    exactly_rounded(y.cpu(), quantized)
    rows.gate(on[:, :1] if one else on[:, :1030], on[:, 1030:], activation, dtype, quantized=alone)
    exactly_rounded(y.cpu(), alone)
    third = empty((1, 1030), dtype, device)
    rows.gate(on[2:, :1] if one else on[2:, :1030], on[2:, 1030:], activation, dtype, y=third)
    assert torch.equal(third, y[2:])


def test_gates_of_chosen_experts(device):
    gate, up = numbers(14, 2, 3, 50).to(device), numbers(15, 2, 3, 50).to(device)
    y = empty((2, 3, 50), torch.float32, device)
    rows.gate(gate, up, "silu", torch.float32, y=y)
    near(y, (torch.nn.functional.silu(gate.double()) * up.double()).cpu(), ops.Gate(gate="g", up="u", y="y", activation="silu"))


MAPS = [
    *((ops.Activate(x="x", y="y", activation=name), "activate", (name,)) for name in get_args(Activation)),
    (ops.Scale(x="x", y="y", factor=0.37), "scale", (0.37,)),
    (ops.Clip(x="x", y="y", limit=0.75), "clip", (0.75,)),
    (ops.SoftCap(x="x", y="y", cap=1.5), "soft_cap", (1.5,)),
    (ops.SoftCap(x="x", y="y", cap=30.0), "soft_cap", (30.0,)),
]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 3.0), (torch.float32, 0.02), (torch.bfloat16, 3.0)])
@pytest.mark.parametrize(("op", "name", "arguments"), MAPS, ids=[f"{type(op).__name__}-{given[0]}" for op, _, given in MAPS])
def test_number_by_number(op, name, arguments, dtype, scale, device):
    x = numbers(16, 2, 1500, scale=scale).to(dtype)
    x[0, :3] = torch.tensor([0.0, 80.0 * scale, -90.0 * scale])
    y = empty((2, 1500), dtype, device)
    getattr(rows, name)(x.to(device), y, *arguments)
    near(y, reference([op], {"x": x})[0], op)
    x[1, 4] = float("nan")
    getattr(rows, name)(x.to(device), y, *arguments)
    assert y.isnan().nonzero().tolist() == [[1, 4]]


@both
def test_tanh_of_small_numbers(dtype, device):
    """Relative to each: a difference of exponentials would have lost them."""
    x = torch.logspace(-30, 0.5, 400)[None].to(dtype)
    y = empty((1, 400), dtype, device)
    rows.activate(x.to(device), y, "tanh")
    assert ((y.cpu().double() / torch.tanh(x.double()) - 1).abs() <= (1e-6 if dtype == torch.float32 else 2**-8)).all()


def test_add_and_cast(device):
    a, b = numbers(17, 3, 1025), numbers(18, 3, 1025).to(torch.bfloat16)
    y = empty((3, 1025), torch.float32, device)
    rows.add(a.to(device), b.to(device), y)
    assert torch.equal(y.cpu(), a + b)
    rows.add(y, b.to(device), y)
    assert torch.equal(y.cpu(), a + b + b)
    narrow = empty((3, 1025), torch.bfloat16, device)
    a[0, :2] = torch.tensor([1.00390625, 1.01171875])  # halves between two bfloat16: one to the even below, one to the even above
    rows.cast(a.to(device), narrow)
    assert torch.equal(narrow.cpu(), a.to(torch.bfloat16))


# --- rows in and out


@both
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_embed(scale, dtype, device):
    weight, tokens = numbers(19, 11, 1030), [3, 0, 10, 3]
    op = ops.Embed(weight="w", y="y", scale=scale)
    y = empty((5, 1030), dtype, device)
    rows.embed(weight.to(dtype).to(device), torch.tensor([*tokens, -1], dtype=torch.int32, device=device), y, factor=scale)
    near(y[:4], reference([op], {}, {"w": weight.to(dtype)}, Batch.of([tokens]))[0], op)
    assert (y[4] == 0).all(), "a row without a token"


def test_embed_positions_and_rows_that_are_asked_for(device):
    weight = numbers(20, 9, 40).to(device)
    y = empty((3, 40), torch.float32, device)
    rows.embed(weight, torch.tensor([0, 5, 6], dtype=torch.int32, device=device), y, offset=2)
    assert torch.equal(y, weight[[2, 7, 8]])
    picked = empty((4, 25), torch.float32, device)
    rows.select_rows(weight[:, 10:35], torch.tensor([8, 1, -1, 8], dtype=torch.int32, device=device), picked)
    assert torch.equal(picked[[0, 1, 3]], weight[[8, 1, 8], 10:35])
    assert (picked[2] == 0).all()


def test_cutting_and_joining(device):
    x = numbers(21, 3, 2 * 12).to(device)
    heads = ops.HeadSplit(x="x", ys=("a", "b"), sizes=(5, 7), heads=2)
    a, b = empty((3, 10), torch.float32, device), empty((3, 14), torch.float32, device)
    rows.head_split(x, (a, b), 2)
    for made, expected in zip((a, b), reference([heads], {"x": x.cpu()}), strict=True):
        assert torch.equal(made.cpu().double(), expected)
    y = empty((3, 24), torch.float32, device)
    rows.concat((a, b), y, 2)
    assert torch.equal(y, x)


def test_no_rows_are_no_work(device):
    nothing = torch.empty(0, 8)
    rows.norm(nothing, torch.ones(8), torch.float32, eps=1e-5, group=8, y=nothing)
    rows.gate(nothing, nothing, "silu", torch.float32, y=nothing)
    rows.quantize_rows(nothing, Rounded(nothing.to(torch.int8), nothing[:, :1]))
    rows.cast(nothing, nothing)
    rows.select_rows(nothing, torch.empty(0, dtype=torch.int32), nothing)
