"""What a cache keeps of a row, against the definition written plainly, and what it costs."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from hasten.base.errors import UnsupportedError
from hasten.formats.cache import CACHE_FORMATS, ROW_FORMATS, cache_format
from hasten.program import lower
from tests.pure.specs import SPECS, block, spec_of


def fp8_values():
    """Every finite number of e4m3, by its byte: exponent bias 7, 3 bits of mantissa, subnormal where the exponent is 0."""
    values = {}
    for byte in range(256):
        sign, exponent, mantissa = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
        if (exponent, mantissa) != (15, 7):
            values[byte] = sign * (Fraction(mantissa, 8) + (exponent > 0)) * Fraction(2) ** (max(exponent, 1) - 7)
    return values


FP8 = fp8_values()


def nearest(ratio, values):
    """The key of the value nearest to ``ratio``; of two as near, that with the even key."""
    return min(values, key=lambda key: (abs(values[key] - ratio), key % 2, key))


@pytest.mark.parametrize(("form", "largest"), [("int8", 127), ("fp8", 448)])
def test_scaled_rows_are_the_definition(form, largest):
    rng = np.random.default_rng(0)
    values = {q: Fraction(q) for q in range(-127, 128)} if form == "int8" else FP8
    rows = (rng.standard_normal((40, 9)) * np.geomspace(1e-9, 1e9, 40)[:, None]).astype(np.float32)
    rows[20:30] = rng.choice(np.arange(-31, 32, 2) / (1 if form == "fp8" else 2), (10, 9))  # half way between neighbours, many of them
    rows[20:30, 0] = largest
    elements, scales = ROW_FORMATS[form].encode(rows)
    assert (elements.shape, scales.shape, scales.dtype) == (rows.shape, (40, 1), np.float16)
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)  # every positive one, in order
    ties, rounded, cut = 0, 0, 0
    for row, made, (scale,) in zip(rows, elements, scales):
        wanted = np.float32(max(abs(row))) / np.float32(largest)
        assert scale == halves[min(np.searchsorted(halves.astype(np.float32), wanted), len(halves) - 1)]
        rounded += halves[0] < wanted < scale
        for x, q in zip(row, made):
            ratio = Fraction(float(np.float32(x) / np.float32(scale)))
            cut += abs(ratio) > Fraction(largest)
            ratio = min(max(ratio, Fraction(-largest)), Fraction(largest))
            key = int(q) if form == "int8" else int(q.view(np.uint8))
            best = values[nearest(ratio, values)]
            assert values[key] == best
            ties += sum(abs(value - ratio) == abs(best - ratio) for value in set(values.values())) > 1
    assert ties > 10
    assert rounded > 10
    assert cut > 5
    assert len(set(scales[:, 0].tolist()) & {float(halves[0]), float(halves[-1])}) == 2
    decoded = ROW_FORMATS[form].decode(elements, scales)
    assert decoded.dtype == np.float32
    assert np.array_equal(
        decoded, np.array([[np.float32(float(q)) * np.float32(s) for q in r] for r, (s,) in zip(elements, scales)], np.float32)
    )


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_rows_that_have_no_scale(form):
    rows = np.array([[0, 0, -0.0], [1e-40, -1e-34, 0], [1, np.nan, 2], [-np.inf, 1, 2], [3e38, -1, 0]], np.float32)
    codec = ROW_FORMATS[form]
    elements, scales = codec.encode(rows)
    kept = codec.decode(elements, scales)
    assert scales[:2].tolist() == [[2.0**-24], [2.0**-24]]
    assert not kept[:2].any()
    assert np.isnan(kept[2:4]).all()
    assert (elements[2:4].astype(np.float32) == 0).all()
    assert kept[4].tolist() == [codec.largest * 65504, 0, 0]  # the largest there is


@pytest.mark.parametrize("form", ["bfloat16", "float16", "float32", "float64"])
def test_plain_rows_are_a_cast(form):
    dtype = ml_dtypes.bfloat16 if form == "bfloat16" else np.dtype(form)
    rows = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    elements, scales = ROW_FORMATS[form].encode(rows)
    assert scales is None
    assert np.array_equal(ROW_FORMATS[form].decode(elements), rows.astype(dtype))
    assert ROW_FORMATS[form].row_bytes(5) == elements[0].nbytes


def test_bytes_by_hand():
    # 3 layers of 2 key/value heads: a key and a value of 4 one-byte features and a scale of 2 bytes each: 3 · 2 · 2 · (4 + 2)
    for form in ("int8", "fp8"):
        program = lower(spec_of(block(), block(), block()), cache=form)
        assert program.states[0].bytes_per_token() == 72
        assert f"72 bytes a token ({form})" in program.text()
        # latent rows: 2 layers of 6 + 4 features and one scale
        assert lower(SPECS["mixer-latent"], cache=form).states[0].bytes_per_token() == 24
    # what is no cache keeps the dtype it is computed in
    assert {group.format for group in lower(SPECS["mixer-mamba"], cache="int8").states} == {"float32"}


def test_what_is_refused():
    assert [cache_format(name) for name in CACHE_FORMATS] == ["bfloat16", "int8", "fp8"]
    with pytest.raises(UnsupportedError, match="cache 'int5' is not supported; accepted are bf16, int8, fp8"):
        cache_format("int5")
    with pytest.raises(UnsupportedError, match="cache format 'int5' is not supported; accepted are float64"):
        lower(spec_of(), cache="int5")
    assert math.isclose(float(max(FP8.values())), ROW_FORMATS["fp8"].largest)
