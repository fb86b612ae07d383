"""Every way a linear weight is stored, at every instruction-set level: what is packed against its meaning in numpy, products in float64."""

import ml_dtypes
import numpy as np
import pytest

from hasten import _native
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat
from tests.ops.packing import POOL, native_activations, weight_buffer

ISAS = _native.available_isas()
NAMES = [
    "f32", "f16", "bf16", "fp8", "fp8-g128", "int8", "int8-g32", "int8-g128", "int4", "int4-g32", "int4-channel", "int4-zp", "int4-g32-zp",
    "int4-g64-zp", "int3", "int3-g32", "int3-channel", "int3-g64-zp", "int2", "int2-g32", "int2-g128-zp", "int2-channel-zp",
    "lut4", "lut4-g32", "lut4-g64", "lut4-channel",
    "bf16-sparse", "int8-sparse", "int8-g64-sparse", "int4-sparse", "int4-g32-sparse",
]  # fmt: skip
SHAPES = [(1, 1, 1), (3, 31, 15), (17, 300, 33), (5, 1100, 20), (66, 260, 47), (35, 2700, 16), (290, 130, 18)]  # rows, in, out

every_isa = pytest.mark.parametrize("isa", ISAS)
every_format = pytest.mark.parametrize("name", NAMES)
pairs = pytest.mark.parametrize(("name", "activations"), [(name, fed) for name in NAMES for fed in native_activations(name)])


def weights(name, seed, out, size):
    """Numbers of bf16, so that nothing is lost before they are packed; half of them zeros where the format is sparse."""
    random = np.random.default_rng(seed)
    dense = random.normal(size=(out, size)) * random.uniform(0.1, 3, size=(out, 1)) + random.uniform(-0.5, 0.5, size=(out, 1))
    if LinearFormat.parse(name).sparse:
        dense *= random.random((out, size)) < random.uniform(0, 1, size=(out, 1))
        dense[out // 2] = 0
    return dense.astype(ml_dtypes.bfloat16).astype(np.float32)


def packed(name, dense):
    form = LinearFormat.parse(name)
    return weight_buffer(form.number, form.group, dense, form.zero_points, form.sparse)


def product(isa, weight, x, activations, bias=None, panels=None):
    y = np.full((len(x), weight.out), np.nan, np.float32)
    _native.linear(isa, weight, x, bias, *(panels or (0, weight.panels)), y, None, activations)
    return y


def rows_of(seed, rows, size):
    random = np.random.default_rng(seed)
    return (random.normal(size=(rows, size)) * random.uniform(0.1, 30, size=(rows, 1))).astype(np.float32)


def seen(x, activations):
    """What the product reads, in float64."""
    if activations == "f32":
        return x.astype(np.float64)
    if activations == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    q, scales = _native.quantize_rows("generic", x, x.shape[1])
    return q * scales[:, None].astype(np.float64)


@every_format
@pytest.mark.parametrize(("out", "size"), [(1, 1), (15, 31), (40, 64), (16, 129), (33, 257), (17, 1100)])
def test_what_is_packed_is_what_the_format_means(name, out, size):
    dense = weights(name, 1, out, size)
    weight = packed(name, dense)
    np.testing.assert_array_equal(weight.unpack(), LinearFormat.parse(name).quantize(dense).dense())
    assert (weight.format, weight.out, weight.in_) == (LinearFormat.parse(name).number, out, size)


@pytest.mark.parametrize("name", [name for name in NAMES if "zp" not in name and not name.startswith(("f", "lut4"))])
def test_packing_from_bf16_is_packing_from_float(name):
    dense = weights(name, 2, 35, 500)
    form = LinearFormat.parse(name)
    halves = dense.astype(ml_dtypes.bfloat16).view(np.uint16)
    other = weight_buffer(form.number, form.group, halves, False, form.sparse)
    np.testing.assert_array_equal(other.unpack(), packed(name, dense).unpack())


@every_isa
@pairs
@pytest.mark.parametrize(("rows", "size", "out"), SHAPES)
def test_against_float64(isa, name, activations, rows, size, out):
    weight = packed(name, weights(name, 3, out, size))
    x = rows_of(4, rows, size)
    x[rows // 2] = 0
    bias = np.random.default_rng(5).normal(size=out).astype(np.float32)
    values, given = weight.unpack().astype(np.float64), seen(x, activations)
    for b in (None, bias):
        exact = given @ values.T + (0 if b is None else b)
        near = np.abs(given) @ np.abs(values).T + (0 if b is None else np.abs(b))
        assert np.all(np.abs(product(isa, weight, x, activations, b) - exact) <= 1e-5 * near + 1e-30)


@every_isa
@pairs
@pytest.mark.parametrize("size", [100, 2300])
def test_a_row_has_the_same_bits_whatever_the_batch_and_the_cut(isa, name, activations, size):
    weight = packed(name, weights(name, 6, 55, size))
    x = rows_of(7, 70, size)
    whole = product(isa, weight, x, activations)
    assert np.isfinite(whole).all()
    for begin, end in [(0, 1), (3, 4), (0, 2), (1, 10), (5, 22), (30, 62), (31, 70)]:
        np.testing.assert_array_equal(product(isa, weight, x[begin:end], activations), whole[begin:end])
    part = product(isa, weight, x, activations, panels=(1, 3))
    np.testing.assert_array_equal(part[:, 16:48], whole[:, 16:48])
    assert np.isnan(part[:, :16]).all()
    assert np.isnan(part[:, 48:]).all()


@pytest.mark.parametrize("name", [name for name in NAMES if LinearFormat.parse(name).is_integer])
@pytest.mark.parametrize(("rows", "size", "out"), SHAPES)
def test_integers_have_the_same_bits_at_every_level(name, rows, size, out):
    weight = packed(name, weights(name, 8, out, size))
    x = rows_of(9, rows, size)
    results = [product(isa, weight, x, "int8") for isa in ISAS]
    for isa, result in zip(ISAS, results, strict=True):
        np.testing.assert_array_equal(result, results[-1], isa)


@pytest.mark.parametrize("name", [name for name in NAMES if "bf16" in LinearFormat.parse(name).activations])
@pytest.mark.parametrize(("rows", "size", "out"), SHAPES)
def test_products_with_bf16_have_the_same_bits_at_every_level_without_tiles(name, rows, size, out):
    weight = packed(name, weights(name, 8, out, size))
    x = rows_of(9, rows, size)
    results = {isa: product(isa, weight, x, "bf16") for isa in ISAS if isa != "amx"}
    for isa, result in results.items():
        np.testing.assert_array_equal(result, results["generic"], isa)


@every_isa
@pytest.mark.parametrize("name", [name for name in NAMES if "int8" in LinearFormat.parse(name).activations])
def test_a_row_has_the_same_bits_among_up_to_nine(isa, name):
    """As many as kernels for few rows take, and one more; groups end within tiles, and tiles beyond the last group."""
    weight, x = packed(name, weights(name, 21, 33, 600)), rows_of(22, 9, 600)
    alone = np.concatenate([product(isa, weight, x[i : i + 1], "int8") for i in range(9)])
    for rows in range(2, 10):
        np.testing.assert_array_equal(product(isa, weight, x[:rows], "int8"), alone[:rows], f"{rows} rows")


@every_isa
@pytest.mark.parametrize("number", ["bf16", "int8", "int4"])
def test_a_sparse_weight_is_the_dense_one_in_fewer_bytes(isa, number):
    dense = weights(f"{number}-sparse", 10, 64, 1024)
    dense *= np.random.default_rng(11).random(dense.shape) < 0.5
    one, other = packed(number, dense), packed(f"{number}-sparse", dense)
    np.testing.assert_array_equal(one.unpack(), other.unpack())
    assert other.nbytes < 0.8 * one.nbytes
    x = rows_of(12, 9, 1024)
    activations = "bf16" if number == "bf16" else "int8"
    dense_y, sparse_y = product(isa, one, x, activations), product(isa, other, x, activations)
    if isa == "amx":
        np.testing.assert_allclose(dense_y, sparse_y, rtol=1e-4, atol=1e-3)
    else:
        np.testing.assert_array_equal(dense_y, sparse_y)


@every_isa
@pytest.mark.parametrize("name", ["f16", "fp8-g128"])
def test_every_number_of_a_small_float(isa, name):
    """Subnormals, both zeros and the largest, times one: the product with a unit row shows what was decoded."""
    kind = {"f16": np.float16, "fp8": ml_dtypes.float8_e4m3fn}[LinearFormat.parse(name).number]
    bits = (
        np.arange(2 ** (8 * np.dtype(kind).itemsize), dtype=np.uint64).astype(f"u{np.dtype(kind).itemsize}").view(kind).astype(np.float32)
    )
    values = bits[np.isfinite(bits)]
    dense = np.zeros((-(-len(values) // 31), 128), np.float32)
    dense[:, 127] = 448  # the largest of fp8, so that its scale is 1
    for start in range(31):
        column = values[start::31]
        dense[: len(column), start] = column
    weight = packed(name, dense)
    unit = np.zeros((31, 128), np.float32)
    unit[np.arange(31), np.arange(31)] = 1
    np.testing.assert_array_equal(product(isa, weight, unit, LinearFormat.parse(name).activations[0]).T, dense[:, :31] + 0.0)


@every_isa
def test_the_smallest_byte_in_groups(isa):
    weight = packed("int8-g32", np.where(np.arange(20)[:, None] % 2, -1.0, 1.0).astype(np.float32) * np.ones((20, 320), np.float32))
    q = np.full((5, 320), -127, np.int8)
    y = np.full((5, 20), np.nan, np.float32)
    _native.linear(isa, weight, q, None, 0, weight.panels, y, np.ones(5, np.float32), "int8")
    np.testing.assert_allclose(y, np.where(np.arange(20) % 2, 1, -1) * 127 * 320 * np.ones((5, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("int5", "accepted are f32"), ("", "accepted are"), ("int4-g48", "no variant 'g48'"), ("f16-g32", "none"),
        ("int8-zp", "no variant 'zp'"),
        ("fp8-sparse", "no variant"), ("lut4-zp", "no variant"),
        ("lut4-g64-sparse", "no variant"), ("lut3", "accepted are"), ("int4-zp-sparse", "zero points"), ("int4--", "no variant"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing(name, why):
    with pytest.raises(UnsupportedError, match=why):
        LinearFormat.parse(name)


@every_format
def test_names_come_back(name):
    assert str(LinearFormat.parse(name)) == name.replace("int2-g128-zp", "int2-zp")


@pytest.mark.parametrize("dense", [np.zeros((20, 50), np.float32), np.zeros((20, 50), np.uint16)], ids=["float32", "bf16"])
def test_a_weight_with_a_codebook_is_packed_from_codes_alone(dense):
    with pytest.raises(ValueError, match="from codes alone"):
        _native.WeightBuffer("lut4", 20, 50, 0).pack(POOL, dense)
    for zero_points, sparse in [(True, False), (False, True)]:
        with pytest.raises(ValueError, match="not lut4"):
            _native.WeightBuffer("lut4", 20, 50, 0, zero_points, sparse)


def test_what_cannot_be_packed_is_refused():
    dense = weights("f32", 13, 20, 50)
    halves = dense.astype(ml_dtypes.bfloat16).view(np.uint16)
    with pytest.raises(ValueError, match="once"):
        packed("int8-sparse", dense).pack(_native.ThreadPool(1), dense)
    for wrong in [
        ("int8", 0, dense, True, False),
        ("fp8", 0, dense, False, True),
        ("int4", 0, dense, True, True),
        ("int4", 0, halves, True, False),
    ]:
        with pytest.raises(ValueError):
            weight_buffer(*wrong)
    weight, y = packed("bf16", dense), np.zeros((2, 20), np.float32)
    for activations in ("int8", "f32", "f8"):
        with pytest.raises(ValueError, match="activations"):
            _native.linear("generic", weight, dense[:2], None, 0, 2, y, None, activations)


def two_of_four(seed, out, size):
    """Weights of which every four have at most two that are not zero, most exactly two; the first is a negative zero."""
    random = np.random.default_rng(seed)
    dense = random.normal(size=(out, size // 4, 4))
    dense[np.arange(4) == random.integers(0, 4, (out, size // 4))[..., None]] = 0
    dense[np.argsort(np.abs(dense), axis=-1).argsort(axis=-1) < 2] = 0
    dense[0, 0] = [-0.0, 1, 0, 0]
    return dense.reshape(out, size).astype(ml_dtypes.bfloat16).astype(np.float32)


@every_isa
@pytest.mark.parametrize("name", ["bf16", "int8", "int8-g32", "int8-g128", "int4", "int4-g32", "int4-g64", "int4-g256", "int4-channel"])
@pytest.mark.parametrize("pattern", ["2:4", "half", "tenth", "none", "all"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_what_is_left_out_changes_no_bit(isa, name, pattern, rows):
    dense = two_of_four(14, 53, 600)
    if pattern != "2:4":
        shape = dense.shape
        dense = weights(name, 14, *shape) * (
            np.random.default_rng(15).random(shape) < {"half": 0.5, "tenth": 0.1, "none": 0, "all": 1}[pattern]
        )
    one, other = packed(name, dense), packed(f"{name}-sparse", dense)
    np.testing.assert_array_equal(one.unpack(), other.unpack())
    x = rows_of(16, rows, 600)
    bias = np.random.default_rng(17).normal(size=53).astype(np.float32)
    for activations in native_activations(name):
        if isa == "amx" and activations == "bf16":
            continue  # tiles add in another order
        for b in (None, bias):
            np.testing.assert_array_equal(product(isa, one, x, activations, b), product(isa, other, x, activations, b))


@every_isa
@pytest.mark.parametrize("pattern", ["2:4", "half"])
def test_the_smallest_byte_of_a_row_times_sparse_weights(isa, pattern):
    dense = two_of_four(18, 40, 512)
    if pattern == "half":
        dense = weights("int8-sparse", 18, 40, 512)
    one, other = packed("int8", np.sign(dense)), packed("int8-sparse", np.sign(dense))
    for q in (np.full((1, 512), -127, np.int8), np.full((1, 512), 127, np.int8)):
        results = [np.full((1, 40), np.nan, np.float32) for _ in range(2)]
        for weight, y in zip((one, other), results, strict=True):
            _native.linear(isa, weight, q, None, 0, weight.panels, y, np.ones(1, np.float32), "int8")
        np.testing.assert_array_equal(*results)
        np.testing.assert_allclose(results[0], np.sign(dense).sum(axis=1)[None] * float(q[0, 0]), rtol=1e-6)


def element_bytes(number, codes):
    """What the elements of a sparse weight without padding take."""
    if number != "int4":
        return np.count_nonzero(codes) * {"bf16": 2, "int8": 1}[number]
    halves = np.count_nonzero(codes.reshape(len(codes) // 16, 16, -1, 2, 64), axis=(1, 4))  # of tiles of 128, beside each other in nibbles
    return int(halves.max(axis=-1).sum())


@pytest.mark.parametrize("number", ["bf16", "int8", "int4"])
def test_a_weight_that_is_2_4_holds_two_elements_in_every_four(number):
    """So products on it need not count; where that would add more than an eighth, nothing is added."""
    dense = two_of_four(19, 64, 1024)
    scales = {"bf16": 0, "int8": 64, "int4": 64 * 1024 // 128}[number]
    others = 64 * 1024 // 8 + 4 * scales + 5 * 16 + 64  # masks, scales, where panels begin, and what is read beyond
    kept = np.tile([1, 0, 1, 0], (64, 256))
    one = packed(f"{number}-sparse", dense)
    assert one.two_of_four
    assert one.nbytes == element_bytes(number, kept) + others
    dense[:, ::2] = 0
    one = packed(f"{number}-sparse", dense)
    assert not one.two_of_four
    assert one.nbytes == element_bytes(number, packed(number, dense).unpack()) + others


@pytest.mark.parametrize(("name", "kind"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16), ("fp8", ml_dtypes.float8_e4m3fn)])
def test_small_floats_are_rounded_to_nearest_even(name, kind):
    """Ties, subnormals, the largest and what lies beyond, against numpy's and ml_dtypes' own rounding."""
    steps = np.arange(2 ** (8 * np.dtype(kind).itemsize - 1), dtype=np.uint64).astype(f"u{np.dtype(kind).itemsize}").view(kind)
    every = steps.astype(np.float32)
    exact = every[np.isfinite(every)][:30000]
    between = (exact[1:] + exact[:-1]) / 2
    values = np.concatenate([between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(np.inf))])
    dense = np.zeros((-(-len(values) // 63), 64), np.float32)
    dense[:, 63] = 448  # the largest of fp8, so that its scale is 1
    for start in range(63):
        column = values[start::63]
        dense[: len(column), start] = column
    dense[1::2] *= -1
    expected = dense.astype(kind).astype(np.float32)
    np.testing.assert_array_equal(packed(name, dense).unpack(), expected)


def test_weights_beyond_f16_are_infinite():
    dense = np.array([[65519.996, 65520, 1e30, np.inf, -65520, 2.0**-25, 2.0**-24]], np.float32)
    np.testing.assert_array_equal(packed("f16", dense).unpack(), [[65504, np.inf, np.inf, np.inf, -np.inf, 0, 2.0**-24]])
