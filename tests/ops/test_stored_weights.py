"""Weights played as their checkpoint stores them: codes and scales to the bit, by layer, and as asked where something is asked for."""

import dataclasses
import threading

import ml_dtypes
import numpy as np
import pytest

from hasten import _native, load
from hasten.backends.cpu import CpuBackend
from hasten.backends.cpu.packed import PackedCache
from hasten.backends.reference import ReferenceBackend
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import ClusteredLinear, LinearFormat, QuantizedLinear
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weight, Weights
from hasten.program import Batch, Formats, unfuse
from tests.ops.packing import POOL, native_activations

ISAS = _native.available_isas()
NAMES = ["fp8", "fp8-g128", "int8", "int8-g32", "int4", "int4-g64", "int4-channel", "int4-zp", "int4-g32-zp", "int3", "int3-g64-zp", "int2",
         "int2-g32-zp", "lut4", "lut4-g32", "lut4-g64", "lut4-channel"]  # fmt: skip
MODEL = load("code-8m")
IDS = np.random.default_rng(0).integers(0, MODEL.spec.vocab, 40).tolist()


def codes(name, seed, out, size):
    """Every code there is, scales of all sizes, as no rounding here would come to them."""
    form, random = LinearFormat.parse(name), np.random.default_rng(seed)
    groups = -(-size // form.group) if form.group else 1
    scales = np.exp(random.uniform(-9, 3, (out, groups))).astype(np.float32)
    if form.number == "fp8":
        q = random.integers(0, 256, (out, size)).astype(np.uint8)
        q[q & 0x7F == 0x7F] = 0  # not a number
        return QuantizedLinear(q.view(ml_dtypes.float8_e4m3fn), scales, None, form.group or size)
    if form.has_codebook:
        some = random.permutation(np.delete(np.arange(-126, 127), 126))[:13]
        codebook = np.sort([-127, 0, 127, *some]).astype(np.int8)
        return ClusteredLinear(random.integers(0, 16, (out, size), dtype=np.int8), scales, None, form.group or size, codebook)
    least = -(2 ** (form.bits - 1))
    q = random.integers(least, -least, (out, size), dtype=np.int8)
    zeros = random.integers(least, -least, (out, groups), dtype=np.int32) if form.zero_points else None
    return QuantizedLinear(q, scales, zeros, form.group or size)


def packed(name, its):
    form = LinearFormat.parse(name)
    weight = _native.WeightBuffer(form.number, *its.q.shape, form.group, form.zero_points)
    for part in weight.parts():
        part[:] = 0xA5
    zeros, codebook = None if its.zeros is None else its.zeros.astype(np.int8), getattr(its, "codebook", None)
    weight.pack_codes(POOL, its.q.view(np.int8), its.scales, zeros, codebook)
    return weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("out", "size"), [(1, 1), (15, 31), (40, 64), (16, 129), (33, 257), (17, 1100)])
def test_packed_codes_are_the_codes(name, out, size):
    its = codes(name, 1, out, size)
    np.testing.assert_array_equal(packed(name, its).unpack(), its.dense())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "size", "out"), [(1, 320, 40), (3, 31, 15), (17, 300, 33), (70, 1100, 20)])
def test_products_of_all_codes(isa, name, rows, size, out):
    """int8's -128 among them, beside activations of both signs and the largest size."""
    its, random = codes(name, 2, out, size), np.random.default_rng(3)
    weight, values = packed(name, its), its.dense().astype(np.float64)
    for activations in native_activations(name):
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [64, 700])
def test_the_smallest_code_against_the_largest_rows(isa, size):
    """2 · 128 · 127 is the most that a product of bytes holds; the sums are exact."""
    q = np.full((20, size), -128, np.int8)
    weight = packed("int8", QuantizedLinear(q, np.ones((20, 1), np.float32), None, size))
    for each in (-127, 127):
        for rows in (1, 6):
            y = np.full((rows, 20), np.nan, np.float32)
            _native.linear(isa, weight, np.full((rows, size), each, np.int8), None, 0, weight.panels, y, np.ones(rows, np.float32), "int8")
            np.testing.assert_array_equal(y, np.full((rows, 20), -128.0 * each * size, np.float32))


def test_codebooks_that_do_not_fit_are_refused():
    q, scales, good = np.zeros((4, 64), np.int8), np.ones((4, 2), np.float32), np.arange(-8, 8, dtype=np.int8)
    weight = _native.WeightBuffer("lut4", 4, 64, 32)
    weight.pack_codes(POOL, q, scales, None, good)
    np.testing.assert_array_equal(weight.unpack(), np.full((4, 64), -8, np.float32))
    without_zero, twice, least = good.copy(), good.copy(), good.copy()
    without_zero[8:], twice[0], least[0] = np.arange(1, 9), -7, -128
    for bad in (None, good[:15].copy(), np.append(good, np.int8(9)), good[::-1].copy(), without_zero, twice, least, good.astype(np.int32)):
        with pytest.raises(ValueError, match="codebook"):
            weight.pack_codes(POOL, q, scales, None, bad)
    for code in (-1, 16):
        with pytest.raises(ValueError, match="4 bits"):
            weight.pack_codes(POOL, np.full((4, 64), code, np.int8), scales, None, good)
    with pytest.raises(ValueError, match="no codebook"):
        _native.WeightBuffer("int4", 4, 64, 32).pack_codes(POOL, q, scales, None, good)


def test_codes_that_do_not_fit_are_refused():
    weight = _native.WeightBuffer("int4", 4, 64, 32, True)
    q, scales, zeros = np.zeros((4, 64), np.int8), np.ones((4, 2), np.float32), np.zeros((4, 2), np.int8)
    weight.pack_codes(POOL, q, scales, zeros)
    for bad in [
        (q[:3].copy(), scales, zeros), (q, scales[:, :1].copy(), zeros), (q, scales, None), (q, scales, zeros[:1].copy()),
        (q + np.int8(8), scales, zeros), (q - np.int8(9), scales, zeros), (q, scales, zeros + np.int8(8)),
        (q.astype(np.float32), scales, zeros), (q, scales.astype(np.float64), zeros), (q[:, ::2], scales, zeros),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            weight.pack_codes(POOL, *bad)
    with pytest.raises(ValueError, match="no zero points"):
        _native.WeightBuffer("int8", 4, 64, 0).pack_codes(POOL, q, np.ones((4, 1), np.float32), np.zeros((4, 1), np.int8))
    with pytest.raises(ValueError, match="with scales"):
        _native.WeightBuffer("bf16", 4, 64, 0).pack_codes(POOL, q, scales, None)


# --- whole models


def stored(forms, activations="bf16"):
    """The bundled model with the products of block i in forms[i % len(forms)]: other codes than rounding its meaning again gives."""
    weights = dict(MODEL.weights)
    for name, weight in MODEL.weights.items():
        pieces = name.split(".")
        if pieces[0] == "blocks" and len(weight.shape) == 2:
            form = LinearFormat.parse(forms[int(pieces[1]) % len(forms)])
            its = form.quantize(weight.load())
            shrunk = dataclasses.replace(its, scales=its.scales * np.float32(0.93))  # clipping, which max|w| / limit does not find again
            fed = activations if activations in form.activations else "bf16"
            weights[name] = QuantizedWeight.of(weight.shape, form, lambda its=shrunk: its, fed)
    return dataclasses.replace(MODEL, weights=Weights(weights))


def formats_of(program):
    return {op.weight: op.weight_format for op in program.ops if hasattr(op, "weight_format")}


def relative(a, b):
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


@pytest.mark.parametrize(
    ("forms", "activations"),
    [
        (["int4-g64", "int8", "fp8", "int3-g64-zp"], "bf16"), (["int8", "int4-g32-zp"], "int8"), (["lut4-g64", "lut4"], "bf16"),
        (["lut4-g32"], "int8"),
    ],
)  # fmt: skip
def test_a_model_is_played_as_it_is_stored_layer_by_layer(forms, activations):
    model = stored(forms, activations)
    session = CpuBackend().session(model, 64)
    packed = {form for name, form in session.compiled.store._made}
    assert packed == {*forms, "bf16"}  # the head is not quantized
    for (name, form), buffer in session.compiled.store._made.items():
        if form != "bf16":
            np.testing.assert_array_equal(buffer.unpack(), model.weights[name].load(), name)
    ours = CpuBackend().logits(model, IDS)
    reference = ReferenceBackend().logits(model, IDS)
    assert relative(ours, reference) < 2e-2
    again = CpuBackend().logits(dataclasses.replace(model, weights=plain_of(model)), IDS)
    assert relative(ours, again) > 1e-4  # what is played from the meaning differs


def plain_of(model):
    return Weights({name: Weight(weight.shape, weight.dtype, weight.load) for name, weight in model.weights.items()})


def test_activations_are_those_of_the_checkpoint_unless_asked_for():
    backend = CpuBackend()

    def fed(model, formats=None):
        program = backend.program(model, 64, formats)
        return {program.values[op.x].dtype for op in program.ops if getattr(op, "weight", "").endswith("feed_forward.down.weight")}

    assert fed(stored(["int4-g64"])) == {"bfloat16"}
    assert fed(stored(["int4-g64"], "int8")) == {"int8"}
    assert fed(stored(["int4-g64"]), Formats(activations="int8")) == {"int8"}
    assert fed(stored(["int4-g64"], "int8"), Formats(activations="bf16")) == {"bfloat16"}
    assert fed(stored(["fp8"], "int8")) == {"bfloat16"}
    with pytest.raises(UnsupportedError, match="int8"):
        backend.program(stored(["fp8"]), 64, Formats(activations="int8"))


def test_activations_in_fp8_give_way_to_bf16_where_there_are_no_kernels():
    """Natively; unless they are asked for, which is refused with what plays them. The reference does."""
    name = "blocks.0.feed_forward.down.weight"

    def fed(program):
        return {program.values[op.x].dtype for op in unfuse(program).ops if getattr(op, "weight", "") == name}

    model = stored(["fp8"], "fp8")
    assert model.weights[name].activations == "fp8"
    assert fed(CpuBackend().program(model, 64)) == {"bfloat16"}
    assert fed(ReferenceBackend().program(model, 64)) == {"fp8"}
    for asked in (Formats("fp8", "fp8"), Formats(activations="fp8"), Formats("int8", "fp8")):
        with pytest.raises(UnsupportedError, match=r"activations fp8 have no kernels here: --backend cuda .* --backend reference plays"):
            CpuBackend().session(model, 64, asked)
    with pytest.raises(UnsupportedError, match="activations 'fp8' do not go with weights in int8; accepted are int8, bf16"):
        ReferenceBackend().program(model, 64, Formats("int8", "fp8"))
    rounded, plain = (ReferenceBackend().session(model, 64, each).score(Batch.of([IDS])) for each in (None, Formats(activations="bf16")))
    assert 1e-3 < relative(rounded, plain) < 0.1
    assert relative(CpuBackend().logits(model, IDS), plain) < 2e-2


def test_another_format_is_made_of_the_meaning():
    model = stored(["int4-g64"])
    asked, meaning = Formats("int8"), dataclasses.replace(model, weights=plain_of(model))
    ours = CpuBackend().session(model, 64, asked)
    assert set(formats_of(ours.program).values()) == {"int8"}
    name = "blocks.0.feed_forward.down.weight"
    np.testing.assert_array_equal(
        ours.compiled.store._made[name, "int8"].unpack(), LinearFormat("int8").quantize(bf16(model, name)).dense()
    )
    same = CpuBackend().session(model, 64, Formats("int4-g64"))  # which it has already: not rounded again
    np.testing.assert_array_equal(same.compiled.store._made[name, "int4-g64"].unpack(), model.weights[name].load())
    assert not np.array_equal(
        CpuBackend().session(meaning, 64, Formats("int4-g64")).compiled.store._made[name, "int4-g64"].unpack(), model.weights[name].load()
    )


def bf16(model, name):
    return model.weights[name].load().astype(ml_dtypes.bfloat16).astype(np.float32)


def test_a_format_without_a_kernel_is_played_by_its_meaning():
    weights = dict(MODEL.weights)
    name = "blocks.0.feed_forward.down.weight"
    weights[name] = QuantizedWeight.from_array(MODEL.weights[name].load(), LinearFormat("int4", 48))
    session = CpuBackend().session(dataclasses.replace(MODEL, weights=Weights(weights)), 64)
    np.testing.assert_array_equal(
        session.compiled.store._made[name, "bf16"].unpack(), bf16(dataclasses.replace(MODEL, weights=weights), name)
    )


def test_what_was_packed_from_codes_is_kept_apart_from_what_was_rounded(tmp_path, monkeypatch):
    monkeypatch.setattr(PackedCache, "of_user", classmethod(lambda cls: cls(tmp_path, 1 << 30)))
    model = stored(["int4-g64"])
    model = dataclasses.replace(model, weights=Weights(dict(model.weights), MODEL.weights.origin))
    meaning = dataclasses.replace(model, weights=Weights(dict(plain_of(model)), MODEL.weights.origin))
    name = "blocks.0.feed_forward.down.weight"
    for each, expected in [(model, True), (meaning, False), (model, True)]:
        session = CpuBackend().session(each, 64, Formats("int4-g64"))
        wait_for_threads()
        found = session.compiled.store._made[name, "int4-g64"].unpack()
        assert np.array_equal(found, model.weights[name].load()) is expected
    assert session.compiled.packed == 0  # the third came from the cache
    assert len(list(tmp_path.glob("*.packed"))) == 2


@pytest.mark.parametrize("formats", [None, Formats("lut4-g64")])
def test_a_codebook_is_kept_with_its_weight(formats, tmp_path, monkeypatch):
    monkeypatch.setattr(PackedCache, "of_user", classmethod(lambda cls: cls(tmp_path, 1 << 30)))
    model = stored(["lut4-g64"]) if formats is None else MODEL
    model = dataclasses.replace(model, weights=Weights(dict(model.weights), MODEL.weights.origin))
    name, found = "blocks.3.feed_forward.down.weight", []
    for packs in (True, False, False):
        session = CpuBackend().session(model, 64, formats)
        wait_for_threads()
        assert (session.compiled.packed > 0) is packs
        found.append(session.compiled.store._made[name, "lut4-g64"].unpack())
    meant = LinearFormat.parse("lut4-g64").quantize(model.weights.array(name)).dense() if formats else model.weights[name].load()
    for each in found:
        np.testing.assert_array_equal(each, meant)


def wait_for_threads():
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name != "MainThread" and not thread.daemon:
            thread.join(30)
