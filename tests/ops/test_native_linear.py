"""The native linear layers at every instruction-set level of this machine, against numpy and against each other."""

import numpy as np
import pytest

from hasten import _native
from tests.ops.packing import weight_buffer

ISAS = _native.available_isas()
FORMATS = [("bf16", 0), ("int8", 0), ("int4", 0), ("int4", 32), ("int4", 64), ("int4", 128), ("int4", 256)]
INTEGER = FORMATS[1:]
LIMIT = {"int8": 127, "int4": 7}
# (rows, in, out): tails of k, of groups, of panels, of row tiles; then several stretches of k and row blocks.
SHAPES = [
    (1, 1, 1),
    (1, 31, 15),
    (17, 64, 100),
    (33, 100, 15),
    (5, 129, 100),
    (2, 257, 33),
    (16, 128, 64),
    (49, 257, 48),
    (18, 2200, 40),
    (33, 4500, 70),
    (73, 4500, 23),
]

every_isa = pytest.mark.parametrize("isa", ISAS)
every_format = pytest.mark.parametrize(("form", "group"), FORMATS)
every_integer = pytest.mark.parametrize(("form", "group"), INTEGER)


def as_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_bf16(x):
    """To nearest even, for numbers."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def quantized(x):
    """What the activations become: int8 and a scale for each row, in float32 as the docstring has it."""
    most = np.abs(x).max(axis=1, keepdims=True).astype(np.float32)
    zero = most == 0
    inverse = np.where(zero, np.float32(0), np.float32(127) / np.where(zero, np.float32(1), most))
    q = np.clip(np.rint(x * inverse), -127, 127).astype(np.int8)
    return q, np.where(zero, np.float32(1), most / np.float32(127))[:, 0]


def packed_values(dense, form, group):
    """The weight's meaning, by its definition: each value rounded to a multiple of its group's scale."""
    if form == "bf16":
        return dense
    out, size = dense.shape
    group = group or size
    values = np.empty_like(dense)
    for k in range(0, size, group):
        part = dense[:, k : k + group]
        scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(LIMIT[form])
        scale[scale == 0] = 1
        values[:, k : k + group] = np.clip(np.rint(part / scale), -LIMIT[form], LIMIT[form]) * scale
    return values


def weights(seed, out, size):
    random = np.random.default_rng(seed)
    return as_bf16(random.normal(size=(out, size)) * random.uniform(0.1, 3, size=(out, 1)))


def rows_of(seed, rows, size):
    random = np.random.default_rng(seed)
    return (random.normal(size=(rows, size)) * random.uniform(0.1, 30, size=(rows, 1))).astype(np.float32)


def product(isa, packed, x, bias=None, panels=None, scales=None):
    """The channels of `panels` in an array of NaN."""
    y = np.full((len(x), packed.out), np.nan, np.float32)
    _native.linear(isa, packed, x, bias, *(panels or (0, packed.panels)), y, scales)
    return y


def check(y, x, values, bias=0.0):
    """Within float32 rounding of the sum in float64: 1e-5 of the sum of the magnitudes."""
    x, values = x.astype(np.float64), values.astype(np.float64)
    assert np.all(np.abs(y - (x @ values.T + bias)) <= 1e-5 * (np.abs(x) @ np.abs(values).T + np.abs(bias)) + 1e-30)


def test_levels():
    assert ISAS[-1] == "generic"
    assert [isa for isa in ("amx", "avx512", "avx2", "generic") if isa in ISAS] == ISAS
    features = _native.cpu_features()
    assert ("avx2" in ISAS) == (features["avx2"] and features["fma"] and features["f16c"])
    assert "amx" not in ISAS or features["amx_int8"]


@every_format
@pytest.mark.parametrize(("out", "size"), [(1, 1), (15, 31), (100, 64), (16, 100), (33, 129), (5, 257), (17, 1100)])
def test_packing_keeps_what_the_format_can(form, group, out, size):
    dense = weights(1, out, size)
    packed = weight_buffer(form, group, dense)
    assert (packed.format, packed.group, packed.out, packed.in_, packed.panels) == (form, group, out, size, -(-out // 16))
    np.testing.assert_array_equal(packed.unpack(), packed_values(as_float(dense), form, group))


@pytest.mark.parametrize(("form", "group"), INTEGER)
def test_packing_rounds_half_to_even(form, group):
    limit = LIMIT[form]
    row = np.zeros(257, np.float32)
    row[:: group or 257] = limit  # every group's scale is 1
    ties = [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 5.5, -6.5, 0.75, -limit]
    row[1 : 1 + len(ties)] = ties
    packed = weight_buffer(form, group, as_bf16(row[None]))
    np.testing.assert_array_equal(packed.unpack()[0], np.rint(row))


@every_isa
@every_format
@pytest.mark.parametrize(("rows", "size", "out"), SHAPES)
def test_against_numpy(isa, form, group, rows, size, out):
    packed = weight_buffer(form, group, weights(2, out, size))
    x = rows_of(3, rows, size)
    x[rows // 2] = 0
    if form == "bf16":
        seen = as_float(as_bf16(x))
    else:
        q, scales = quantized(x)
        seen = q * scales[:, None].astype(np.float64)
    bias = np.random.default_rng(4).normal(size=out).astype(np.float32)
    check(product(isa, packed, x), seen, packed.unpack())
    check(product(isa, packed, x, bias), seen, packed.unpack(), bias)


@every_isa
@every_format
def test_zero_weights_and_rows(isa, form, group):
    dense = weights(5, 40, 200)
    dense[7] = 0
    dense[20:] = 0
    packed = weight_buffer(form, group, dense)
    for rows in (3, 20):
        y = product(isa, packed, rows_of(6, rows, 200))
        assert (y[:, 7] == 0).all()
        assert (y[:, 20:] == 0).all()
        assert (product(isa, packed, np.zeros((rows, 200), np.float32)) == 0).all()
        assert np.isfinite(product(isa, packed, np.zeros((rows, 200), np.float32), np.ones(40, np.float32))).all()
    assert product(isa, packed, np.zeros((0, 200), np.float32)).shape == (0, 40)


@every_isa
@every_integer
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_the_smallest_byte(isa, form, group, rows):
    """-127 · ±127 twice over is near what a saturating product of bytes holds; of -128 tells tests/ops/test_stored_weights.py."""
    size = 700
    dense = as_bf16(np.where(np.arange(33)[:, None] % 2, -1.0, 1.0) * np.ones((33, size)))
    packed = weight_buffer(form, group, dense)
    q = np.full((rows, size), -127, np.int8)
    q[rows // 2, ::3] = 127
    scales = np.linspace(0.5, 2, rows).astype(np.float32)
    check(product(isa, packed, q, scales=scales), q * scales[:, None].astype(np.float64), packed.unpack())


@every_isa
@every_integer
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 8, 17])
def test_the_longest_sum_is_exact(isa, form, group, rows, sparse):
    size = 131072
    packed = weight_buffer(form, group, as_bf16(np.ones((2, size))), sparse=sparse)
    q = np.full((rows, size), -127, np.int8)
    y = product(isa, packed, q, scales=np.ones(rows, np.float32))
    np.testing.assert_allclose(y, -127.0 * size, rtol=1e-4 if group else 1e-6)
    assert (y == y[0, 0]).all()


@every_isa
@every_format
@pytest.mark.parametrize("size", [64, 129, 4300])
def test_a_row_has_the_same_bits_whatever_the_batch(isa, form, group, size):
    packed = weight_buffer(form, group, weights(7, 87, size))
    x = rows_of(8, 600, size)
    bias = np.linspace(-1, 1, 87).astype(np.float32)
    alone = np.concatenate([product(isa, packed, x[i : i + 1], bias) for i in range(40)])
    for rows in (2, 5, 15, 16, 17, 31, 32, 33, 40):
        np.testing.assert_array_equal(product(isa, packed, x[:rows], bias), alone[:rows])
        np.testing.assert_array_equal(product(isa, packed, x[40 - rows : 40], bias), alone[40 - rows :])
    if isa in ("amx", "avx512"):
        many = product(isa, packed, x, bias)
        np.testing.assert_array_equal(many[:40], alone)
        np.testing.assert_array_equal(many[580:], np.concatenate([product(isa, packed, x[i : i + 1], bias) for i in range(580, 600)]))


@every_isa
@every_format
@pytest.mark.parametrize("rows", [1, 3, 17, 40])
def test_cutting_into_panels_keeps_the_bits_and_the_rest(isa, form, group, rows):
    packed = weight_buffer(form, group, weights(9, 150, 300))
    x = rows_of(10, rows, 300)
    bias = np.linspace(-1, 1, 150).astype(np.float32)
    whole = product(isa, packed, x, bias)
    assert not np.isnan(whole).any()
    for first, last in [(0, 1), (0, 4), (1, 8), (2, 5), (3, 10), (4, 10), (9, 10), (5, 5)]:
        part = product(isa, packed, x, bias, (first, last))
        inside = slice(16 * first, 16 * last)
        np.testing.assert_array_equal(part[:, inside], whole[:, inside])
        part[:, inside] = np.nan
        assert np.isnan(part).all()


@every_integer
@pytest.mark.parametrize(("rows", "size", "out"), SHAPES)
def test_integers_have_the_same_bits_at_every_level(form, group, rows, size, out):
    packed = weight_buffer(form, group, weights(11, out, size))
    x = rows_of(12, rows, size)
    bias = np.random.default_rng(13).normal(size=out).astype(np.float32)
    for given in (None, bias):
        results = [product(isa, packed, x, given) for isa in ISAS]
        for isa, result in zip(ISAS, results, strict=True):
            np.testing.assert_array_equal(result, results[-1], isa)


@every_isa
def test_activations_to_bf16(isa):
    x = rows_of(14, 7, 37)
    x[0, :6] = [0.0, -0.0, np.inf, -np.inf, 1e-40, 3.4e38]
    x[1, :4] = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], np.uint32).view(np.float32)
    y = _native.to_bf16(isa, x, 64)
    np.testing.assert_array_equal(y[:, :37], as_bf16(x))
    assert (y[:, 37:] == 0).all()
    assert np.isnan(as_float(_native.to_bf16(isa, np.array([[0x7F800001, 0xFFFFFFFF]], np.uint32).view(np.float32), 2))).all()


@every_isa
@pytest.mark.parametrize("size", [1, 31, 64, 100, 257])
def test_activations_to_int8(isa, size):
    x = rows_of(15, 9, size)
    x[3] = 0
    x[4] = -np.abs(x[4])
    q, scales = _native.quantize_rows(isa, x, 300)
    expected, expected_scales = quantized(x)
    np.testing.assert_array_equal(q[:, :size], expected)
    np.testing.assert_array_equal(scales, expected_scales)
    assert (q[:, size:] == 0).all()
    assert scales[3] == 1


@every_isa
@pytest.mark.parametrize("size", [1, 31, 64, 100, 257])
def test_activations_to_int8_of_one_scale(isa, size):
    x, step = rows_of(16, 9, size), np.float32(0.013)
    x[2, 0], x[3] = 1e30, 0
    x[4, -1], x[5, 0], x[6, 0] = -np.inf, np.nan, np.float32(0.5) * step
    q = _native.quantize_fixed(isa, x, 300, float(step))
    expected = np.clip(np.rint(np.nan_to_num(x, nan=1e30, posinf=1e30, neginf=-1e30) / step), -127, 127)
    assert np.abs(expected).max() == 127
    np.testing.assert_array_equal(q[:, :size], expected)
    assert (q[:, size:] == 0).all()


@every_isa
def test_activations_round_half_to_even_and_keep_what_is_not_a_number(isa):
    ties = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5]], np.float32)
    q, scales = _native.quantize_rows(isa, ties, 10)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 126, -126]]
    assert scales.tolist() == [1]
    tiny, tiny_scales = _native.quantize_rows(isa, np.array([[1e-36, 0, -1e-40]], np.float32), 3)
    assert not tiny.any()
    assert tiny_scales.tolist() == [1]
    for odd in (np.nan, np.inf):
        _, scales = _native.quantize_rows(isa, np.array([[1, odd, 2]], np.float32), 3)
        assert not np.isfinite(scales[0])
        packed = weight_buffer("int8", 0, as_bf16(np.ones((3, 3))))
        assert not np.isfinite(product(isa, packed, np.array([[1, odd, 2]], np.float32))).any()


def test_what_does_not_fit_is_refused():
    dense = weights(16, 20, 50)
    packed = weight_buffer("int8", 0, dense)
    x, y = np.zeros((2, 50), np.float32), np.zeros((2, 20), np.float32)
    for arguments in [
        ("int5", 0, dense),
        ("bf16", 128, dense),
        ("f16", 32, dense),
        ("int4", 48, dense),
        ("int4", -128, dense),
        ("int4", 2048, dense),
    ]:
        with pytest.raises(ValueError, match="accepted"):
            weight_buffer(*arguments)
    for wrong in (dense.astype(np.float64), dense[:, ::2], np.zeros((0, 3), np.uint16), np.zeros((1, 131073), np.uint16)):
        with pytest.raises(ValueError):
            weight_buffer("int8", 0, wrong)
    good = {"isa": "generic", "weight": packed, "x": x, "bias": None, "first_panel": 0, "last_panel": 2, "out": y}
    _native.linear(**good)
    for wrong in [
        {"isa": "sse"},
        {"x": x[:, :49].copy()},
        {"x": x.astype(np.float64)},
        {"x": x.astype(np.int8)},
        {"x": x[0]},
        {"scales": np.ones(2, np.float32)},
        {"x": x.astype(np.int8), "scales": np.ones(3, np.float32)},
        {"bias": np.zeros(19, np.float32)},
        {"out": y[:, :19].copy()},
        {"out": y.T},
        {"out": y.astype(np.float64)},
        {"first_panel": -1},
        {"last_panel": 3},
        {"first_panel": 2, "last_panel": 1},
    ]:
        with pytest.raises(ValueError):
            _native.linear(**{**good, **wrong})
    for call in (_native.to_bf16, _native.quantize_rows):
        for wrong in [("sse", x, 50), ("generic", x, 49), ("generic", x.astype(np.float64), 50)]:
            with pytest.raises(ValueError):
                call(*wrong)
