"""Which kernel is chosen and why not another; and what was measured on a device, read back."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from hasten.backends.cuda import tuned
from hasten.backends.cuda.candidates import (
    EXPERT_LINEAR,
    LINEAR,
    Candidate,
    LinearSite,
    choose,
    cublas,
    scaled_mm,
    semi_structured,
)  # fmt: skip
from hasten.backends.cuda.kernels.linear import Order, Tiles, default_order, default_tiles, linear
from hasten.backends.cuda.kernels.pack import PackedWeight, Stored, compressed, is_two_of_four, pack, pack_stored, unpack
from hasten.backends.cuda.tuned import Tuned, TunedLinear, path_of, read, shape_name, write
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.formats.linear import LinearFormat

SITE = LinearSite(LinearFormat.parse("bf16"), "bf16", 16, 4096, 4096, torch.bfloat16, invariant=True, capability=(9, 0))


def site(name="bf16", **changes):
    return dataclasses.replace(SITE, form=LinearFormat.parse(name), **changes)


def test_what_depends_on_the_batch_is_refused_where_bits_must_not():
    choice = choose(LINEAR, SITE)
    assert choice.candidate.name == "triton"
    assert choice.candidate.launch is linear
    assert [name for name, _ in choice.refused] == ["cublas", "scaled_mm", "semi_structured"]
    assert "depend on its batch" in choice.refused[0][1]
    free = choose(LINEAR, site(invariant=False))
    assert (free.candidate.launch, free.refused) == (cublas, ())


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (site("int4", invariant=False), "dense weights alone, not int4"),
        (site("fp8", invariant=False), "dense weights alone, not fp8"),
        (site("bf16", invariant=False, dtype=torch.float32), "one dtype"),
        (site("f16", fed="f32", invariant=False, dtype=torch.float32), "one dtype"),
    ],
)
def test_why_not_the_library(where, said):
    choice = choose(LINEAR, where)
    assert choice.candidate.name == "triton"
    assert said in choice.refused[0][1]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (site("bf16", fed="int8"), "multiplied with bf16, not int8"),
        (site("int4", fed="f32"), "multiplied with int8 or bf16, not f32"),
        (site("bf16", capability=(7, 5)), "8.0 for bfloat16; this one has 7.5"),
        (site("fp8", capability=(8, 6)), "8.9 for fp8"),
        (site("fp8", fed="fp8", capability=(8, 6)), "8.9 for fp8"),
        (site("int8", fed="fp8"), "multiplied with int8 or bf16, not fp8"),
        (site("int8", fed="int8", size=140_000), "32 bits"),
    ],
)
def test_where_nothing_is_left_every_reason_is_said(where, said):
    for candidates in (LINEAR, EXPERT_LINEAR):
        with pytest.raises(UnsupportedError, match=said) as raised:
            choose(candidates, where)
        assert all(f"{candidate.name}: " in str(raised.value) for candidate in candidates)


def test_the_first_that_does_not_refuse():
    asked = []

    def says(name, reason):
        return Candidate(name, lambda site: asked.append(name) or reason, print)

    choice = choose((says("a", "no"), says("b", None), says("c", None)), SITE)
    assert (choice.candidate.name, choice.refused, asked) == ("b", (("a", "no"),), ["a", "b"])
    with pytest.raises(UnsupportedError, match="no candidate"):
        choose((), SITE)


(SCALED_MM,) = (each for each in LINEAR if each.name == "scaled_mm")
FP8 = {"name": "fp8", "fed": "fp8", "measured": "scaled_mm"}
SPARSE = {"name": "bf16-sparse", "measured": "semi_structured", "two_of_four": True}


@pytest.mark.parametrize(("given", "launch"), [({"measured": "cublas"}, cublas), (FP8, scaled_mm), (SPARSE, semi_structured)])
def test_a_librarys_kernel_is_chosen_where_it_was_measured(given, launch):
    """And nowhere else: the same site without the measurement takes Triton's."""
    assert choose(LINEAR, site(**given)).candidate.launch is launch
    choice = choose(LINEAR, site(**{**given, "measured": "triton"}))
    assert choice.candidate.launch is linear
    assert any("nothing measured on this device" in why for _, why in choice.refused)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"measured": "cublas", "heads": 3}, "one weight, not 3"),
        ({"measured": "cublas", "biased": True}, "rounded already"),
        ({**FP8, "name": "fp8-g128"}, "one scale a channel"),
        ({**FP8, "fed": "bf16"}, "these are bf16, which fp8 does not hold"),
        ({**FP8, "size": 40}, "multiples of 16, not 4096 × 40"),
        ({**FP8, "capability": (8, 6)}, "8.9; this one has 8.6"),
        ({**FP8, "biased": True}, "rounded already"),
        ({**FP8, "dtype": torch.float32}, "in bfloat16"),
        ({**SPARSE, "name": "int8-sparse"}, "bf16-sparse weights, not int8-sparse"),
        ({**SPARSE, "name": "bf16"}, "bf16-sparse weights, not bf16"),
        ({**SPARSE, "two_of_four": False}, "more than two of four"),
        ({**SPARSE, "capability": (7, 5)}, "8.0; this one has 7.5"),
        ({**SPARSE, "out": 96}, "multiples of 64, not 96"),
        ({**SPARSE, "dtype": torch.float32}, "result are bfloat16"),
        ({**SPARSE, "biased": True}, "rounded already"),
    ],
)
def test_why_not_what_was_measured(given, said):
    """What was measured was for the shape; this weight, or device, may be another."""
    candidate = next(each for each in LINEAR if each.name == given["measured"])
    assert said in candidate.refuses(site(**given))


def test_no_product_of_a_program_goes_through_a_library_unasked():
    names = ["bf16", "f32", "fp8", "int8", "int4", "bf16-sparse", "int4-sparse"]
    for name, fed in itertools.product(names, ["bf16", "f32", "int8", "fp8"]):
        for rows, pattern in itertools.product([1, 4096], [False, True]):
            where = site(name, fed=fed, rows=rows, two_of_four=pattern)
            refused = [each.name for each in LINEAR if each.refuses(where) is not None]
            assert set(refused) >= {"cublas", "scaled_mm", "semi_structured"}


def test_the_library_computes_it(device):
    """Into rows that lie apart, too, and from a weight whose rows are filled up."""
    x, weight, bias = torch.randn(3, 40, device=device), torch.randn(7, 40, device=device), torch.randn(7, device=device)
    filled = PackedWeight(40, "plain", torch.nn.functional.pad(weight, (0, 88), value=float("nan")))
    for b, its in ((None, PackedWeight.of_dense(weight)), (bias, filled)):
        y = torch.full((3, 20), float("nan"), device=device)
        cublas(x, its, y[:, 5:12], bias=b)
        torch.testing.assert_close(y[:, 5:12], torch.nn.functional.linear(x, weight, b))
        assert y[:, :5].isnan().all()
        assert y[:, 12:].isnan().all()


def fp8_product(device, rows=5, size=64, out=48):
    form = LinearFormat.parse("fp8")
    random = np.random.default_rng(3)
    weight = pack(form, form.quantize(random.normal(size=(out, size)).astype(np.float32)), device)
    x = torch.from_numpy(random.normal(size=(rows, size)).astype(np.float32)).to(torch.float8_e4m3fn).to(device)
    return x, weight, torch.from_numpy(random.uniform(0.1, 2, (rows, 1)).astype(np.float32)).to(device)


def test_fp8_rows_and_fp8_weights(device):
    """In CPU builds of torch it is computed, too."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products take compute capability 8.9")
    x, weight, scale = fp8_product(device)
    y = torch.full((5, 60), float("nan"), dtype=torch.bfloat16, device=device)
    scaled_mm(x, weight, y[:, 4:52], scale=scale)
    exact = (x.double() * scale.double()) @ unpack(weight).double().T
    assert (y[:, 4:52].double() - exact).abs().max() <= 2**-8 * exact.abs().max() + 1e-6
    assert y[:, :4].isnan().all()
    with pytest.raises(ValueError, match="their scales"):
        scaled_mm(x, weight, y[:, 4:52])
    with pytest.raises(ValueError, match="without a bias"):
        scaled_mm(x, weight, y[:, 4:52], scale=scale, bias=torch.zeros(48, device=device))


@pytest.mark.parametrize("rows", [1, 2, 77])
@pytest.mark.parametrize(("out", "size"), [(48, 64), (16, 16), (40, 64), (48, 40), (48, 200), (48, 208)])
def test_what_is_not_refused_is_as_torch_asks(rows, out, size):
    """Of tensors without memory torch checks layouts, sizes and scales as it does on a device: what it raises for was refused."""
    x, weight, scale = fp8_product(torch.device("cpu"), rows, size, out)
    y = torch.empty((rows, out), dtype=torch.bfloat16, device="meta")
    if SCALED_MM.refuses(site(**{**FP8, "out": out, "size": size})) is None:
        scaled_mm(x.to("meta"), weight.to("meta"), y, scale=scale.to("meta"))
    else:
        with pytest.raises(RuntimeError, match="divisible by 16"):
            scaled_mm(x.to("meta"), weight.to("meta"), y, scale=scale.to("meta"))


def test_scales_in_rows_of_their_own_are_what_torch_takes(device):
    """Planted: a scale for every row in its place, and for every channel in its, exact powers of two; no other has those products."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products take compute capability 8.9")
    codes = torch.eye(32, 64).to(torch.float8_e4m3fn)
    weight = pack_stored(LinearFormat.parse("fp8"), Stored(codes.to(device), 2.0 ** torch.arange(32.0, device=device)[:, None], None, 64))
    x, scale = torch.ones(3, 64).to(torch.float8_e4m3fn).to(device), torch.tensor([[1.0], [2.0], [0.5]], device=device)
    y = torch.full((3, 32), float("nan"), dtype=torch.bfloat16, device=device)
    scaled_mm(x, weight, y, scale=scale)
    assert torch.equal(y.float(), scale * 2.0 ** torch.arange(32.0, device=device))


def two_of_four(seed, out, size):
    """Of any four inputs side by side two at most have a weight, in some of them fewer."""
    dense = torch.from_numpy(np.random.default_rng(seed).normal(size=(out, size // 4, 4)).astype(np.float32))
    order = torch.from_numpy(np.random.default_rng(seed + 1).random(dense.shape)).argsort(-1)
    dense[order >= 2] = 0
    dense[:, ::5] = 0
    return dense.reshape(out, size).to(torch.bfloat16)


def test_what_is_two_of_four():
    dense = two_of_four(5, 64, 128)
    assert is_two_of_four(PackedWeight.of_dense(dense))
    assert is_two_of_four(PackedWeight.of_dense(dense[:, :126]))
    more = dense.clone()
    more[37, 64:67] = 1
    assert not is_two_of_four(PackedWeight.of_dense(more))
    assert is_two_of_four(PackedWeight.of_dense(more[:37]))
    across = torch.zeros(1, 16)
    across[0, 6:10] = 1  # four side by side, but two of each four
    assert is_two_of_four(PackedWeight.of_dense(across))


def test_a_compressed_weight_is_the_dense_one(monkeypatch):
    """In the layout that torch makes without a device; the product is a device's."""
    import torch.sparse.semi_structured as torchs

    plain = torchs.SparseSemiStructuredTensor
    if not torch.cuda.is_available():
        monkeypatch.setattr(plain, "_FORCE_CUTLASS", True)
        monkeypatch.setattr(plain, "_validate_device_dim_dtype_shape", classmethod(lambda cls, tensor: None))
    dense = two_of_four(6, 128, 192)
    filled = PackedWeight(192, "plain", torch.nn.functional.pad(dense, (0, 64)))
    for weight in (PackedWeight.of_dense(dense), filled):
        if torch.cuda.is_available():
            weight = weight.to("cuda")
        made = compressed(weight)
        assert torch.equal(made.codes.to_dense().cpu(), dense)
        assert (made.layout, made.out, made.size) == ("two_of_four", 128, 192)
        assert made.nbytes == 128 * 192 * 2 * 9 / 16
        assert is_two_of_four(made)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (PackedWeight.of_dense(torch.ones(64, 64, dtype=torch.bfloat16)), "two of any four"),
        (PackedWeight.of_dense(two_of_four(7, 64, 64).float()), "two of any four"),
        (PackedWeight.of_dense(two_of_four(7, 64, 96)), "64 × 96 are not compressed"),
        (PackedWeight.of_dense(two_of_four(7, 32, 64)), "32 × 64 are not compressed"),
        (PackedWeight.of_dense(two_of_four(7, 64, 64)[None]), "not compressed"),
    ],
)
def test_what_cannot_be_compressed_is_refused(weight, said):
    with pytest.raises(UnsupportedError, match=said):
        compressed(weight)


def test_a_product_that_is_not_compressed_is_refused():
    with pytest.raises(ValueError, match="was compressed"):
        semi_structured(torch.ones(1, 64), PackedWeight.of_dense(torch.ones(64, 64)), torch.ones(1, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products of two of four are a device's")
@pytest.mark.parametrize("rows", [1, 5, 64, 300])
def test_a_product_without_zeros(rows):
    dense, x = two_of_four(8, 256, 512).cuda(), torch.randn(rows, 512, device="cuda").to(torch.bfloat16)
    y = torch.full((rows, 300), float("nan"), dtype=torch.bfloat16, device="cuda")
    semi_structured(x, compressed(PackedWeight.of_dense(dense)), y[:, 20:276])
    exact = x.double() @ dense.double().T
    assert (y[:, 20:276].double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    assert y[:, :20].isnan().all()


# --- what was measured

DEVICE = "NVIDIA H200"
WEIGHT = PackedWeight.of_dense(torch.empty(4096, 4096, device="meta"))
SHAPE = shape_name("bf16", "bf16", 4096, 4096)


def test_what_was_measured_comes_back(tmp_path):
    measured = TunedLinear(Order(64, 2), {16: Tiles(stages=6, split=True), 256: Tiles(out=128, rows=256, warps=8)})
    path = write(tmp_path / "new", Tuned(DEVICE, {SHAPE: measured}))
    assert path.name == "nvidia-h200.json"
    back = read(tmp_path / "new", DEVICE)
    assert back.linear == {SHAPE: measured}
    assert {back.order(SHAPE, WEIGHT) for _ in range(3)} == {Order(64, 2)}
    found = [back.tiles(SHAPE, WEIGHT, rows) for rows in (1, 16, 17, 256)]
    assert found == [measured.tiles[16], measured.tiles[16], measured.tiles[256], measured.tiles[256]]
    assert back.tiles(SHAPE, WEIGHT, 257) == default_tiles(257, Order(64, 2))
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["nvidia-h200.json"]
    assert (back.kernel(SHAPE), back.kernel("another")) == ("triton", "triton")
    write(tmp_path, Tuned(DEVICE, {SHAPE: dataclasses.replace(measured, kernel="cublas")}))
    assert read(tmp_path, DEVICE).kernel(SHAPE) == "cublas"


def test_what_nobody_measured_takes_the_defaults(tmp_path):
    nothing = read(tmp_path, DEVICE)
    assert nothing == Tuned(DEVICE)
    assert nothing.order(SHAPE, WEIGHT) == default_order(WEIGHT)
    assert nothing.tiles(SHAPE, WEIGHT, 5) == default_tiles(5, default_order(WEIGHT))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "does not say"),
        ('{"device": "NVIDIA H200", "linear": {"a": {"order": {"step": 48}}}}', "no order of sums"),
        ('{"device": "NVIDIA H200", "linear": {"a": {"order": {"step": 64}, "tiles": {"16": {"out": 32}}}}}', "are no tiles"),
        ('{"device": "NVIDIA H200", "linear": {"a": {"tiles": {}}}}', "order"),
        ('{"device": "NVIDIA H200", "lines": {}}', "lines"),
        ('{"device": "NVIDIA H200", "linear": {"a": {"order": {"step": 64}, "kernel": "magic"}}}', "'magic' is no kernel of products"),
        ('{"device": "NVIDIA H200", "schema_version": 2}', "schema 2"),
        ('{"device": "NVIDIA H100"}', "H100"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, text, said):
    path_of(tmp_path, DEVICE).write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        read(tmp_path, DEVICE)
    assert "remove it" in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_a_write_that_breaks_off_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write(tmp_path, Tuned(DEVICE, {SHAPE: TunedLinear(Order(64))}))
    monkeypatch.setattr(tuned.msgspec.json, "format", lambda *_, **__: b"{")
    monkeypatch.setattr(tuned.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(tmp_path, Tuned(DEVICE))
    assert read(tmp_path, DEVICE).linear
