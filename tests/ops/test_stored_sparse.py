"""Sparse weights played as their checkpoint stores them: codes and scales to the bit, zeros where they are, 2:4 among them."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from hasten import _native, load, save
from hasten.backends.cpu import CpuBackend
from hasten.backends.reference import ReferenceBackend
from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weights
from tests.ops.packing import POOL

ISAS = _native.available_isas()
NAMES = ["int8-sparse", "int8-g32-sparse", "int4-sparse", "int4-g32-sparse", "int4-channel-sparse"]
MODEL = load("code-8m")
IDS = np.random.default_rng(0).integers(0, MODEL.spec.vocab, 40).tolist()


def mask_of(kind, seed, out, size):
    random = np.random.default_rng(seed)
    if kind == "2:4":
        padded = random.random((out, -(-size // 4), 4)).argsort(axis=-1) < 2
        return padded.reshape(out, -1)[:, :size]
    return random.random((out, size)) < kind


def codes(name, kind, seed, out, size):
    """Every code there is but -128, which no sparse weight has, where the mask is; scales of all sizes."""
    form, random = LinearFormat.parse(name), np.random.default_rng(seed)
    groups = -(-size // form.group) if form.group else 1
    scales = np.exp(random.uniform(-9, 3, (out, groups))).astype(np.float32)
    least = -(2 ** (form.bits - 1)) + (form.bits == 8)
    values = random.integers(least, 2 ** (form.bits - 1), (out, size), dtype=np.int8)
    values[values == 0] = least
    return QuantizedLinear(np.where(mask_of(kind, seed, out, size), values, 0).astype(np.int8), scales, None, form.group or size)


def packed(name, its):
    form = LinearFormat.parse(name)
    weight = _native.WeightBuffer(form.number, *its.q.shape, form.group, False, form.sparse)
    weight.pack_codes(POOL, its.q, its.scales, None)
    return weight


KINDS = ["2:4", 0.5, 0.1, 1.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("out", "size"), [(1, 1), (15, 31), (40, 64), (16, 129), (33, 257), (17, 1100)])
def test_packed_codes_are_the_codes(name, kind, out, size):
    its = codes(name, kind, 1, out, size)
    np.testing.assert_array_equal(packed(name, its).unpack(), its.dense())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "size", "out"), [(1, 320, 40), (3, 31, 15), (4, 512, 48), (17, 300, 33)])
def test_products_of_all_codes(isa, kind, name, rows, size, out):
    its, random = codes(name, kind, 2, out, size), np.random.default_rng(3)
    weight, values = packed(name, its), its.dense().astype(np.float64)
    assert weight.two_of_four == (kind == "2:4")
    for activations in ("int8", "bf16"):
        y = np.full((rows, out), np.nan, np.float32)
        if activations == "int8":
            q = random.integers(-127, 128, (rows, size), dtype=np.int8)
            q[0] = -127
            scales = random.uniform(0.1, 2, rows).astype(np.float32)
            _native.linear(isa, weight, q, None, 0, weight.panels, y, scales, "int8")
            given = q * scales[:, None].astype(np.float64)
        else:
            x = random.normal(size=(rows, size)).astype(np.float32)
            _native.linear(isa, weight, x, None, 0, weight.panels, y, None, activations)
            given = x.astype(ml_dtypes.bfloat16).astype(np.float64)
        assert np.all(np.abs(y - given @ values.T) <= 1e-5 * (np.abs(given) @ np.abs(values).T) + 1e-30)


def test_codes_are_taken_once_and_none_is_the_smallest_byte():
    its = codes("int8-sparse", 0.5, 1, 40, 64)
    weight = packed("int8-sparse", its)
    with pytest.raises(ValueError, match="packed once"):
        weight.pack_codes(POOL, its.q, its.scales, None)
    q = its.q.copy()
    q[0, 0] = -128
    fresh = _native.WeightBuffer("int8", 40, 64, 0, False, True)
    with pytest.raises(ValueError, match="-128 left out"):
        fresh.pack_codes(POOL, q, its.scales, None)
    _native.WeightBuffer("int8", 40, 64, 0).pack_codes(POOL, q, its.scales, None)


def stored(name, kind, activations="bf16"):
    """The bundled model with half of each product, and scales that rounding its meaning again does not find."""
    form, weights = LinearFormat.parse(name), dict(MODEL.weights)
    for number, (key, weight) in enumerate(MODEL.weights.items()):
        if key.startswith("blocks.") and len(weight.shape) == 2:
            its = form.quantize(weight.load() * mask_of(kind, number, *weight.shape))
            if its.scales is not None:
                its = dataclasses.replace(its, scales=its.scales * np.float32(0.93))
            fed = activations if activations in form.activations else "bf16"
            weights[key] = QuantizedWeight.of(weight.shape, form, lambda its=its: its, fed)
    return dataclasses.replace(MODEL, weights=Weights(weights))


@pytest.mark.parametrize(
    ("name", "kind", "activations"),
    [("bf16-sparse", 0.5, "bf16"), ("bf16-sparse", "2:4", "bf16"), ("int8-sparse", "2:4", "int8"), ("int4-g64-sparse", 0.5, "bf16")],
)
def test_a_model_is_played_as_it_is_stored(name, kind, activations, tmp_path):
    model = stored(name, kind, activations)
    session = CpuBackend().session(model, 64)
    assert {form for _, form in session.compiled.store._made} == {name, "bf16"}  # the head is dense
    for (key, form), buffer in session.compiled.store._made.items():
        if form == name:
            np.testing.assert_array_equal(buffer.unpack(), model.weights[key].load(), key)
            assert buffer.two_of_four == (kind == "2:4")
    ours, reference = CpuBackend().logits(model, IDS), ReferenceBackend().logits(model, IDS)
    assert np.sqrt(np.mean((ours - reference) ** 2) / np.mean(reference**2)) < (2e-2 if activations == "bf16" else 8e-2)
    save(model, tmp_path / "m")
    np.testing.assert_array_equal(CpuBackend().logits(load(tmp_path / "m"), IDS), ours)
    dense = {key: weight if not isinstance(weight, QuantizedWeight) else as_dense(weight) for key, weight in model.weights.items()}
    same = CpuBackend().logits(dataclasses.replace(model, weights=Weights(dense)), IDS)
    np.testing.assert_allclose(ours, same, rtol=0, atol=2e-2 * np.abs(same).max())
    assert not np.array_equal(ours, CpuBackend().logits(MODEL, IDS))


def as_dense(weight):
    """The same numbers in the dense format."""
    form = dataclasses.replace(weight.form, sparse=False)
    return QuantizedWeight.of(weight.shape, form, weight.quantized, weight.activations)
