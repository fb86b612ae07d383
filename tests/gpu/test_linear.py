"""Products of linear layers against float64, in every format, and to the bit whatever else is in the batch."""

import numpy as np
import pytest
import torch

from hasten.backends.cuda.kernels import linear as kernel
from hasten.backends.cuda.kernels.linear import Order, Scratch, Tiles, default_order, default_tiles, linear, scratch_size
from hasten.backends.cuda.kernels.pack import PackedWeight, pack, unpack
from hasten.backends.cuda.kernels.rows import Rounded, quantize_rows
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat, stacked
from tests.gpu.test_pack import stored

NAMES = [
    "bf16", "fp8", "fp8-g128", "int8", "int8-g32", "int8-g128", "int4", "int4-g32", "int4-g64-zp", "int4-channel", "int3-g64-zp",
    "int2-channel-zp", "lut4",
]  # fmt: skip
PAIRS = [(name, fed) for name in NAMES for fed in LinearFormat.parse(name).activations] + [("f32", "f32"), ("f16", "f32")]
FED = {"bf16": torch.bfloat16, "f32": torch.float32}
KINDS = [
    ("bf16", "bf16"), ("int8", "int8"), ("int8-g32", "bf16"), ("int4", "bf16"), ("int4-g64-zp", "int8"), ("f32", "f32"),
    ("fp8", "fp8"), ("fp8-g128", "fp8"),
]  # fmt: skip


def packed(name, seed, out, size, device):
    return pack(*stored(name, seed, out, size)).to(device)


def rows_of(seed, rows, size, fed, device):
    """x and its scale, and what they stand for in float64."""
    random = np.random.default_rng(seed)
    x = torch.from_numpy((random.normal(size=(rows, size)) * random.uniform(0.1, 30, size=(rows, 1))).astype(np.float32))
    if fed not in {"int8", "fp8"}:
        x = x.to(FED[fed])
        return x.to(device), None, x.double()
    if fed == "fp8":
        x = (100 * torch.from_numpy(random.normal(size=(rows, size)).astype(np.float32))).clamp(-448, 448).to(torch.float8_e4m3fn)
        x[0] = -448
    else:
        x = torch.from_numpy(random.integers(-127, 128, (rows, size)).astype(np.int8))
        x[0] = -127
    scale = torch.from_numpy(random.uniform(0.01, 1, (rows, 1)).astype(np.float32))
    return x.to(device), scale.to(device), x.double() * scale.double()


def product(x, weight, scale=None, bias=None, order=None, tiles=None, dtype=torch.float32):
    """y, written over NaN; where tiles split K the scratch is poisoned too, and must be left as it was found."""
    order = order or default_order(weight)
    tiles = tiles or default_tiles(len(x), order)
    count = weight.codes.shape[0] if weight.codes.dim() == 3 else 1
    y = torch.full((len(x), count * weight.out), float("nan"), dtype=dtype, device=x.device)
    sums, counters = scratch_size(len(x), weight.out, order, tiles, count)
    scratch = Scratch(torch.full((sums,), float("nan"), device=x.device), torch.zeros(counters, dtype=torch.int32, device=x.device))
    linear(x, weight, y, scale=scale, bias=bias, scratch=scratch, order=order, tiles=tiles)
    if counters:
        assert not scratch.arrived.any()
        assert scratch.sums.isfinite().all() or scratch.sums.view(torch.int32).abs().max() < 2**30, "a part was not summed"
    return y


SHAPES = [(3, 300, 70, True), (17, 129, 65, False)]  # rows, in, out, bias
CASES = [
    *((name, fed, SHAPES[number % 2]) for number, (name, fed) in enumerate(PAIRS)),
    *((name, fed, (1, 1, 1, True)) for name, fed in [("bf16", "bf16"), ("int8", "int8"), ("int4", "bf16"), ("fp8", "fp8")]),
]


@pytest.mark.parametrize(("name", "fed", "shape"), CASES)
def test_against_float64(name, fed, shape, device):
    rows, size, out, biased = shape
    weight = packed(name, 3, out, size, device)
    x, scale, seen = rows_of(4, rows, size, fed, device)
    bias = torch.from_numpy(np.random.default_rng(5).normal(size=out)).float() if biased else None
    values = unpack(weight).double().cpu()
    exact, near = seen @ values.T, seen.abs() @ values.abs().T
    if bias is not None:
        exact, near = exact + bias, near + bias.abs()
    y = product(x, weight, scale, None if bias is None else bias.to(device))
    tolerance = 1e-3 if fed == "fp8" and device.type == "cuda" else 2e-6  # Hopper aligns fp8's products to 13 bits behind the largest
    assert ((y.cpu() - exact).abs() <= tolerance * near + 1e-30).all()


@pytest.mark.parametrize(("name", "fed"), KINDS)
def test_a_row_has_the_same_bits_in_any_batch_and_tile(name, fed, device):
    """Alone with its parts of K side by side, and among others with one program for all of them."""
    size = 600 if LinearFormat.parse(name).group == 128 else 300
    weight = packed(name, 6, 70, size, device)
    x, scale, _ = rows_of(7, 21, size, fed, device)
    bias = torch.from_numpy(np.random.default_rng(8).normal(size=70).astype(np.float32)).to(device)
    order = Order(default_order(weight).step, 3)
    whole = product(x, weight, scale, bias, order, Tiles(out=128, rows=32, warps=8))
    assert whole.isfinite().all()
    for begin, end, tiles in [(5, 6, Tiles(split=True)), (0, 21, Tiles(split=True, swizzle=1)), (3, 20, Tiles(rows=32))]:
        given = None if scale is None else scale[begin:end].contiguous()
        assert torch.equal(product(x[begin:end], weight, given, bias, order, tiles), whole[begin:end])
    if weight.group or fed != "int8":
        assert not torch.equal(product(x, weight, scale, bias, Order(order.step, 1)), whole), "the order of parts shows"


def test_other_rows_may_be_anything(device):
    weight = packed("int4", 9, 70, 300, device)
    x, _, _ = rows_of(10, 20, 300, "bf16", device)
    whole = product(x, weight)
    x[:7], x[8:] = float("nan"), float("inf")
    assert torch.equal(product(x, weight)[7], whole[7])


@pytest.mark.parametrize(("name", "kind"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_rows_that_are_not_finite_show_in_their_own_results_alone(name, kind, device):
    """Rounded and multiplied: of a row with NaN or an infinity nothing is finite, a row of zeros gives the bias, and the least and the
    largest there are keep their meaning."""
    weight, bias = packed(name, 19, 70, 300, device), torch.linspace(-1, 1, 70, device=device)
    x = torch.from_numpy(np.random.default_rng(20).normal(size=(7, 300)).astype(np.float32))
    x[1, 5], x[2, 6], x[3, 7], x[4] = float("nan"), float("inf"), -float("inf"), 0
    x[5] *= 1e37 / x[5].abs().max()
    x[6] *= 1e-40 / x[6].abs().max()
    q, scale = torch.full((7, 300), -1, device=device).to(kind), torch.full((7, 1), float("nan"), device=device)
    quantize_rows(x.to(device), Rounded(q, scale))
    y = product(q, weight, scale, bias)
    assert [bool(row.isfinite().any()) for row in y] == [True, False, False, False, True, True, True]
    assert y[[0, 4, 5, 6]].isfinite().all()
    assert torch.equal(y[4], bias)
    exact = (q.cpu().double() * scale.cpu().double()) @ unpack(weight).cpu().double().T
    assert (y[5].cpu() - exact[5]).abs().max() <= 1e-3 * exact[5].abs().max()
    alone = product(q[:1], weight, scale[:1], bias)
    assert torch.equal(alone[0], y[0])


def test_integers_are_exact(device):
    """Sums beyond what a float32 holds, in parts: the largest bytes, and a last one that shifts the sum by one."""
    size = 4096
    codes = torch.full((64, size), 127, dtype=torch.int8)
    codes[:, -1] = 1
    weight = PackedWeight(size, "plain", codes, torch.ones(1, 64)).to(device)
    x = torch.full((2, size), 127, dtype=torch.int8, device=device)
    x[1] = -127
    ones = torch.ones(2, 1, device=device)
    exact = 127 * (127 * (size - 1) + 1)
    assert exact > 2**24
    for tiles in (Tiles(), Tiles(split=True)):
        y = product(x, weight, ones, order=Order(64, 8), tiles=tiles)
        assert torch.equal(y.cpu(), torch.tensor([[exact], [-exact]], dtype=torch.float64).float().expand(2, 64))


def test_rows_with_strides_into_rows_with_strides(device):
    """As q, k and v of one product are written, and read."""
    weight = packed("bf16", 11, 40, 130, device)
    x, _, _ = rows_of(12, 5, 130, "bf16", device)
    wide = torch.full((5, 400), float("nan"), dtype=torch.bfloat16, device=device)
    wide[:, 200:330] = x
    wide_y = torch.full((5, 100), float("nan"), dtype=torch.bfloat16, device=device)
    linear(wide[:, 200:330], weight, wide_y[:, 50:90], tiles=Tiles())
    assert torch.equal(wide_y[:, 50:90], product(x, weight, tiles=Tiles(), dtype=torch.bfloat16))
    assert wide_y[:, :50].isnan().all()
    assert wide_y[:, 90:].isnan().all()


@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g64-zp"])
@pytest.mark.parametrize("split", [False, True])
def test_a_weight_a_head(name, split, device):
    """HeadLinear: y[T, H·out] from x[T, H·size]."""
    form = LinearFormat.parse(name)
    each = [stored(name, seed, 20, 150)[1] for seed in (13, 14, 15)]
    weight = pack(form, stacked(each)).to(device)
    x, _, seen = rows_of(16, 6, 450, "bf16", device)
    order = Order(default_order(weight).step, 2)
    y = product(x, weight, order=order, tiles=Tiles(split=split))
    exact = torch.cat([seen[:, h * 150 : (h + 1) * 150] @ torch.from_numpy(one.dense()).double().T for h, one in enumerate(each)], dim=1)
    assert (y.cpu() - exact).abs().max() <= 2e-6 * exact.abs().max() * 150**0.5


def test_a_dense_weight_as_it_lies(device):
    """A row of 150 numbers: the next row's begin where a step of this one ends."""
    dense = torch.randn(30, 150, generator=torch.Generator().manual_seed(17)).to(torch.bfloat16)
    x, _, seen = rows_of(18, 4, 150, "bf16", device)
    exact = seen @ dense.double().T
    y = product(x, PackedWeight.of_dense(dense.to(device)))
    assert (y.cpu() - exact).abs().max() <= 2e-6 * exact.abs().max() * 150**0.5


def test_the_order_is_the_weights_own():
    """Whatever the rows: there is nothing else it could come from."""
    small, large = (PackedWeight.of_dense(torch.empty(out, 4096, device="meta")) for out in (4096, 128256))
    assert default_order(small) == Order(64, 4)
    assert default_order(large) == Order(64, 1)
    assert default_tiles(1, default_order(small)).split
    assert not default_tiles(4096, default_order(small)).split
    for rows in (1, 16, 17, 64, 65, 5000):
        tiles = default_tiles(rows, default_order(small))
        assert tiles.out % 64 == 0
        assert tiles.warps % 4 == 0
        assert tiles.rows >= 16


@pytest.mark.parametrize(
    "wrong", [{"out": 32}, {"out": 96}, {"rows": 8}, {"rows": 24}, {"warps": 2}, {"warps": 16}, {"stages": 0}, {"swizzle": 0}], ids=str
)
def test_tiles_that_another_instruction_would_serve_are_refused(wrong):
    with pytest.raises(ValueError, match="are no tiles"):
        Tiles(**wrong)


@pytest.mark.parametrize("wrong", [(16,), (48,), (64, 0)])
def test_orders_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="no order"):
        Order(*wrong)


def test_no_rows_are_no_work(monkeypatch, device):
    monkeypatch.setattr(kernel, "_linear", None)
    linear(torch.empty(0, 8), PackedWeight.of_dense(torch.empty(3, 8)), torch.empty(0, 3))


def test_what_does_not_go_together_is_refused(device):
    dense = PackedWeight.of_dense(torch.zeros(3, 8, device=device))
    x, y = torch.zeros(2, 8, device=device), torch.zeros(2, 3, device=device)
    with pytest.raises(UnsupportedError, match="not multiplied"):
        linear(x.to(torch.bfloat16), dense, y)
    with pytest.raises(ValueError, match="scale each"):
        linear(x.to(torch.int8), packed("int8", 1, 3, 8, device), y)
    with pytest.raises(ValueError, match="do not fit"):
        linear(x[:, :7], dense, y)
    with pytest.raises(ValueError, match="spans of 256"):
        linear(x, packed("int4", 1, 3, 8, device), y, order=Order(64))
    with pytest.raises(ValueError, match="does not divide groups of 32"):
        linear(x, packed("int8-g32", 1, 3, 64, device), y, order=Order(64))
    with pytest.raises(ValueError, match="scratch of 12 sums and 1 counters"):
        linear(x, dense, y, order=Order(64, 2), tiles=Tiles(split=True))
    with pytest.raises(ValueError, match="scale each"):
        linear(x.to(torch.float8_e4m3fn), packed("fp8", 1, 3, 8, device), y)
    with pytest.raises(UnsupportedError, match=r"float8_e4m3fn are not multiplied with codes of torch\.int8"):
        linear(x.to(torch.float8_e4m3fn), packed("int8", 1, 3, 8, device), y, scale=torch.ones(2, 1, device=device))
    zeros = pack(LinearFormat("int8", 0, True), stored("int4-channel-zp", 1, 3, 8)[1]).to(device)
    with pytest.raises(UnsupportedError, match="nine bits"):
        linear(x.to(torch.int8), zeros, y, scale=torch.ones(2, 1, device=device))
