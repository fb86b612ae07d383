"""Weights that stay quantized from the file to the kernel: what they mean, and what a tensor map makes of them."""

import ml_dtypes
import numpy as np
import pytest

from hasten.base.errors import ConfigError
from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight, dequantized, stored_as
from hasten.formats.tensor_map import (
    TRANSPOSE,
    Each,
    First,
    Join,
    Merge,
    Permute,
    Repeat,
    Reshape,
    Split,
    Stack,
    TensorMapping,
    Unstack,
    apply_map,
    inverse,
)
from hasten.formats.weights import Weight

FORMS = [
    LinearFormat("int8"), LinearFormat("int8", 32), LinearFormat("int8", 32, zero_points=True), LinearFormat("int4", 32),
    LinearFormat("int4", 48, zero_points=True), LinearFormat("int3", 16), LinearFormat("int2", 0, zero_points=True),
    LinearFormat("fp8"), LinearFormat("fp8", 128),
]  # fmt: skip


def dense(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


USUAL = LinearFormat("int4", 32)


def quantized(seed, *shape, form=USUAL):
    return QuantizedWeight.from_array(dense(seed, *shape), form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(5, 100), (3, 4, 65)])
def test_meaning_in_loops(form, shape):
    weight = quantized(1, *shape, form=form)
    its = weight.quantized()
    meant = np.full(shape, np.nan)
    for at in np.ndindex(shape):
        group = at[-1] // form.group if form.group else 0
        zero = 0 if its.zeros is None else int(its.zeros[(*at[:-1], group)])
        meant[at] = np.float32(np.float32(float(its.q[at]) - zero) * its.scales[(*at[:-1], group)])
    np.testing.assert_array_equal(weight.load(), meant)
    assert its.q.dtype == (ml_dtypes.float8_e4m3fn if form.number == "fp8" else np.int8)
    assert (weight.shape, weight.dtype, its.zeros is not None) == (shape, np.float32, form.zero_points)
    step = its.scales.max() * (32 if form.number == "fp8" else 1)  # fp8 has 3 bits behind the point: 448 rounds to a 16th
    assert np.abs(weight.load() - dense(1, *shape)).max() <= step * 0.51


def test_bytes_are_those_of_the_file():
    assert quantized(1, 64, 256, form=LinearFormat("int4", 128)).nbytes == 64 * 256 // 2 + 64 * 2 * 4
    assert quantized(1, 64, 256, form=LinearFormat("int4", 128, zero_points=True)).nbytes == 64 * 256 // 2 + 64 * 2 * 4 + 64
    assert quantized(1, 64, 256, form=LinearFormat("int8")).nbytes == 64 * 256 + 64 * 4
    half_scales = QuantizedWeight.of((64, 256), LinearFormat("int8"), lambda: pytest.fail("read"), bits=8 + 16 / 256)
    assert half_scales.nbytes == 64 * 256 + 64 * 2


def test_activations_that_do_not_go_with_the_format_are_refused():
    with pytest.raises(ConfigError, match="accepted: bf16"):
        QuantizedWeight.of((4, 4), LinearFormat("fp8"), lambda: pytest.fail("read"), "int8")
    assert stored_as(quantized(1, 4, 64)) == "int4-g32 × bf16"


# what keeps rows whole, from sources of [out, 64] to what they become, and back
WHOLE = {
    "rename": (1, (6, 64), ()),
    "split": (1, (6, 64), (Split((1, 2, 3)),)),
    "join": (3, (6, 64), (Join((6, 6, 6)),)),
    "stack": (3, (6, 64), (Stack(3),)),
    "experts": (3, (6, 64), (Stack(3), Split((2, 4), axis=1))),
    "unstack": (1, (3, 2, 64), (Unstack(3),)),
    "heads": (1, (6, 64), (Reshape((6, 64), (2, 3, 64)), Permute((1, 0, 2)), Reshape((3, 2, 64), (6, 64)))),
    "heads apart": (1, (6, 64), (Reshape((6, 64), (2, 3, 64)), Split((1, 2), axis=1), Each((Reshape((2, 1, 64), (2, 64)), None)))),
    "first": (2, (6, 64), (First(1, 2, Split((2, 4))),)),
    "repeat": (1, (6, 64), (Repeat(2),)),
}
# and what does not
BROKEN = {
    "transpose": (1, (6, 64), (TRANSPOSE,)),
    "columns": (1, (6, 64), (Split((32, 32), axis=1),)),
    "rows cut": (1, (6, 64), (Reshape((6, 64), (12, 32)),)),
    "flat": (1, (6, 64), (Reshape((6, 64), (384,)), Split((64, 320)))),
    "each": (2, (6, 64), (Each((TRANSPOSE, None)),)),
}


def mapping(count, steps, gives):
    return TensorMapping(tuple(f"s{i}" for i in range(count)), tuple(f"t{i}" for i in range(gives)), steps)


@pytest.mark.parametrize("form", [LinearFormat("int4", 32), LinearFormat("int2", 48, zero_points=True), LinearFormat("fp8")], ids=str)
@pytest.mark.parametrize("name", [*WHOLE, *BROKEN])
def test_a_map_gives_the_meaning_and_where_rows_stay_whole_the_codes(name, form):
    count, shape, steps = {**WHOLE, **BROKEN}[name]
    sources = {f"s{i}": quantized(i, *shape, form=form) for i in range(count)}
    gives = len(mapping(count, steps, 1).shapes([shape] * count))
    forward = (mapping(count, steps, gives),)
    meant = forward[0].apply([weight.load() for weight in sources.values()])
    targets = apply_map(forward, sources)
    assert all(type(weight) is (QuantizedWeight if name in WHOLE else DequantizedWeight) for weight in targets.values())
    for weight, expected in zip(targets.values(), meant, strict=True):
        assert weight.shape == expected.shape
        np.testing.assert_array_equal(weight.load(), expected)
    if name in BROKEN:
        assert all("reaches into rows" in weight.reason and weight.stored == str(form) for weight in targets.values())
        return
    copies = 2 if name == "repeat" else 1
    assert sum(w.nbytes for w in targets.values()) == pytest.approx(copies * sum(w.nbytes for w in sources.values()), abs=len(targets))
    for back, source in zip(apply_map(inverse(forward), targets).values(), sources.values(), strict=True):
        assert (back.form, back.shape) == (form, shape)
        its, expected = back.quantized(), source.quantized()
        np.testing.assert_array_equal(its.q.view(np.uint8), expected.q.view(np.uint8))
        np.testing.assert_array_equal(its.scales, expected.scales)
        if form.zero_points:
            np.testing.assert_array_equal(its.zeros, expected.zeros)


def test_what_is_stored_in_different_ways_is_joined_by_meaning():
    plain = Weight((6, 64), np.dtype(np.float32), lambda: dense(9, 6, 64))
    for other in (plain, quantized(1, 6, 64, form=LinearFormat("int4")), dequantized(quantized(1, 6, 64), "a test")):
        sources = {"s0": quantized(0, 6, 64), "s1": other}
        (joined,) = apply_map((mapping(2, (Join((6, 6)),), 1),), sources).values()
        assert type(joined) is DequantizedWeight
        np.testing.assert_array_equal(joined.load(), np.concatenate([weight.load() for weight in sources.values()]))


def test_shared_codes_that_became_different_are_refused():
    sources = {"s0": quantized(0, 6, 64), "s1": quantized(1, 6, 64)}
    (merged,) = apply_map((TensorMapping(("s0", "s1"), ("t",), (Merge(2),)),), sources).values()
    with pytest.raises(ValueError, match="have become different"):
        merged.quantized()


def test_numbers_that_are_not_finite_show_in_the_scale():
    weight = dense(3, 4, 64)
    weight[1, 40] = np.nan
    weight[2, 3] = np.inf
    for form in FORMS[:2]:
        meant = form.quantize(weight).dense()
        assert np.isfinite(meant[[0, 3]]).all()
        assert not np.isfinite(meant[1, 33:]).any()
        assert not np.isfinite(meant[2, :30]).any()


def test_one_of_stacked_weights():
    whole = quantized(4, 3, 5, 64, form=LinearFormat("int4", 32, zero_points=True)).quantized()
    assert isinstance(whole[1], QuantizedLinear)
    np.testing.assert_array_equal(whole[1].dense(), whole.dense()[1])
