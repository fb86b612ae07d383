"""Weights rounded and packed on the device, to the bit as the formats round them on the host."""

import ml_dtypes
import numpy as np
import pytest
import torch

from hasten.backends.cuda import weights as module
from hasten.backends.cuda.kernels.pack import pack, pack_stored
from hasten.backends.cuda.kernels.rounding import round_to_nearest
from hasten.backends.cuda.weights import DeviceWeights
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weight, Weights
from tests.gpu.test_pack import NAMES

ROUNDED = [name for name in NAMES if not LinearFormat.parse(name).has_codebook]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}


def awkward(seed, out, size, dtype):
    """Rows of every size, with ties between two steps, groups of zeros, one number far from the others, and the least there are."""
    random = np.random.default_rng(seed)
    dense = random.normal(size=(out, size)) * 10.0 ** random.integers(-6, 4, (out, 1)) + random.uniform(-0.5, 0.5, (out, 1))
    dense[0] = random.integers(-14, 15, size) / 2
    dense[0, 0] = 7
    dense[out // 2, : size // 2] = 0
    dense[-1] *= random.random(size) < 0.3
    dense[-1, -1] = 1e4
    if out > 3:
        dense[1] = -np.abs(dense[1])
        dense[2] = random.integers(-30, 31, size) * float(np.finfo(np.float32).smallest_subnormal)
    return dense.astype(dtype)


def tensor_of(dense, device):
    if dense.dtype.name == "bfloat16":
        return torch.from_numpy(dense.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(dense).to(device)


def assert_same_bits(made, expected):
    assert (made.size, made.layout, made.group, made.span) == (expected.size, expected.layout, expected.group, expected.span)
    for name in ("codes", "scales", "zeros"):
        ours, theirs = getattr(made, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert ours.is_contiguous()
            np.testing.assert_array_equal(ours.cpu().view(torch.uint8).numpy(), theirs.view(torch.uint8).numpy(), name)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize(("out", "size", "dtype"), [(1, 1, "float32"), (7, 31, "bfloat16"), (16, 129, "float32"), (5, 1100, "float16")])
def test_the_device_rounds_as_the_host(name, out, size, dtype, device):
    form, dense = LinearFormat.parse(name), awkward(size, out, size, DTYPES[dtype])
    made = pack_stored(form, round_to_nearest(form, tensor_of(dense, device)))
    with np.errstate(over="ignore"):
        assert_same_bits(made, pack(form, form.quantize(dense)))


@pytest.mark.parametrize("name", ["int8", "int4", "int4-zp", "int2-channel-zp", "fp8", "f16"])
def test_numbers_that_are_not_finite(name, device):
    form, dense = LinearFormat.parse(name), awkward(3, 7, 200, np.float64)
    dense[0, 5], dense[1, 6], dense[3, 7], dense[4, 150], dense[5, 9] = np.inf, -np.inf, np.nan, 1e300, -3e38
    dense[5, 10] = 3e38
    made = pack_stored(form, round_to_nearest(form, tensor_of(dense, device)))
    with np.errstate(all="ignore"):
        expected = pack(form, form.quantize(dense))
    assert not (made.codes.float() if made.scales is None else made.scales).isfinite().all()
    for ours, theirs in ((made.codes, expected.codes), (made.scales, expected.scales), (made.zeros, expected.zeros)):
        if ours is not None:
            np.testing.assert_array_equal(ours.cpu().float().numpy(), theirs.float().numpy())


def test_a_codebook_is_fitted_on_the_host(device):
    with pytest.raises(UnsupportedError, match="lut4 is fitted on the host"):
        round_to_nearest(LinearFormat.parse("lut4"), torch.zeros(2, 32, device=device))


def mapping(**arrays):
    return Weights({name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()})


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g32", "int4-g64-zp", "fp8", "bf16", "bf16-sparse", "int4-channel"])
def test_dense_weights_of_a_model_are_rounded_there_a_run_at_a_time(name, device, monkeypatch):
    """Joined, alone and stacked; the host rounds nothing, and what lies unpacked on the device is bounded."""
    form = LinearFormat.parse(name)
    q, k, experts = awkward(1, 37, 300, ml_dtypes.bfloat16), awkward(2, 9, 300, np.float32), awkward(3, 3 * 11, 150, np.float32)
    experts = experts.reshape(3, 11, 150)
    expected = [pack(form, form.quantize(each)) for each in (np.concatenate([q.astype(np.float32), k]), k, experts)]
    lengths = []
    monkeypatch.setattr(LinearFormat, "quantize", lambda *_: pytest.fail("the host rounds"))
    monkeypatch.setattr(module, "ROUNDED_AT_ONCE", 3000)
    monkeypatch.setattr(module, "round_to_nearest", lambda form, dense: lengths.append(dense.numel()) or round_to_nearest(form, dense))
    weights = DeviceWeights(mapping(q=q, k=k, experts=experts), device)
    for names, one in zip((("q", "k"), ("k",), ("experts",)), expected, strict=True):
        assert_same_bits(weights.linear(names, name, torch.bfloat16), one)
    assert max(lengths) <= 3000
    assert len(lengths) == 4 + 1 + 1 + 3
    assert weights.nbytes == sum(one.nbytes for one in expected)


def test_a_codebook_and_what_is_stored_so_already(device):
    dense = awkward(4, 12, 256, np.float32)
    for name in ("lut4", "int4-zp"):
        form = LinearFormat.parse(name)
        stored = QuantizedWeight.from_array(dense, form)
        whole = Weights({"dense": Weight(dense.shape, dense.dtype, lambda: dense), "stored": stored})
        weights = DeviceWeights(whole, device)
        for one in ("dense", "stored"):
            assert_same_bits(weights.linear((one,), name, torch.bfloat16), pack(form, form.quantize(dense)))


def test_what_is_stored_otherwise_is_converted_and_its_memory_is_its_own(device):
    array = awkward(5, 4, 20, np.float64)
    weights = DeviceWeights(mapping(a=array, b=array.astype(np.float32)), device)
    for name in ("a", "b"):
        brought = weights.plain(name, torch.float32)
        np.testing.assert_array_equal(brought.cpu().numpy(), array.astype(np.float32))
    array[:] = 0
    assert weights.plain("b", torch.float32).any()
