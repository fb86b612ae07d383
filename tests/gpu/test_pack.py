"""What the CUDA kernels' weights mean once packed, against the formats' own meaning."""

import ml_dtypes
import numpy as np
import pytest
import torch

from hasten.backends.cuda.kernels.pack import PackedWeight, pack, unpack
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat, QuantizedLinear, stacked

NAMES = [
    "f32", "f16", "bf16", "fp8", "fp8-g128", "int8", "int8-g32", "int8-g128", "int4", "int4-g32", "int4-channel", "int4-zp", "int4-g64-zp",
    "int3", "int3-g32", "int3-channel", "int3-g64-zp", "int2", "int2-g32", "int2-g128-zp", "int2-channel-zp",
    "lut4", "lut4-g32", "lut4-channel", "bf16-sparse", "int8-sparse", "int8-g64-sparse", "int4-sparse", "int4-g32-sparse",
]  # fmt: skip


def stored(name, seed, out, size):
    random = np.random.default_rng(seed)
    dense = random.normal(size=(out, size)) * random.uniform(0.1, 3, size=(out, 1)) + random.uniform(-0.5, 0.5, size=(out, 1))
    form = LinearFormat.parse(name)
    if form.sparse:
        dense *= random.random((out, size)) < 0.5
    return form, form.quantize(dense.astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("out", "size"), [(1, 1), (15, 31), (16, 129), (5, 1100)])
def test_what_is_packed_is_what_the_format_means(name, out, size):
    form, its = stored(name, 1, out, size)
    weight = pack(form, its)
    np.testing.assert_array_equal(unpack(weight).numpy(), its.dense())
    assert (weight.out, weight.size) == (out, size)
    assert weight.width % 16 == 0
    assert weight.width - size < 256


@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g64-zp", "lut4"])
def test_stacked_weights_are_packed_like_each(name):
    form, one = stored(name, 2, 9, 150)
    _, other = stored(name, 3, 9, 150)
    weight = pack(form, stacked([one, other]))
    np.testing.assert_array_equal(unpack(weight).numpy(), np.stack([one.dense(), other.dense()]))
    assert torch.equal(weight.codes[1].view(torch.uint8), pack(form, other).codes.view(torch.uint8))


@pytest.mark.parametrize(("name", "bits"), [("bf16", 16), ("fp8", 8), ("int8", 8), ("int4", 4.25), ("int4-g32", 5), ("int2", 4.25)])
def test_how_many_bytes_it_takes(name, bits):
    form, its = stored(name, 4, 64, 1024)
    weight = pack(form, its)
    of_channels = 64 * 4 if weight.scales is not None and not weight.group else 0
    assert weight.nbytes == 64 * 1024 * bits / 8 + of_channels


def test_rows_and_scales_lie_as_a_tile_reads_them():
    form, its = stored("int4", 5, 6, 512)
    weight = pack(form, its)
    word = int(weight.codes[2, 66])  # the third of the second span of 256
    assert [(word >> bits & 15) - 8 for bits in (0, 4, 8, 12)] == its.q[2, 256 + 2 :: 64].tolist()
    assert weight.scales.shape == (4, 6)
    assert weight.scales[3, 2] == its.scales[2, 3]
    assert weight.codes.is_contiguous()
    assert weight.scales.is_contiguous()


def test_every_number_of_fp8_and_of_four_bits_comes_back():
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    weight = pack(LinearFormat.parse("fp8"), QuantizedLinear(every[None], np.ones((1, 1), np.float32), None, 256))
    np.testing.assert_array_equal(unpack(weight).numpy()[0], every.astype(np.float32))
    nibbles = np.arange(-8, 8, dtype=np.int8).repeat(16)[None]
    for group in (32, 64, 128, 0):
        weight = pack(LinearFormat("int4", group), QuantizedLinear(nibbles, np.ones((1, 256 // (group or 256)), np.float32), None, group))
        np.testing.assert_array_equal(unpack(weight).numpy(), nibbles)


def test_a_dense_weight_stays_where_it_is():
    dense = torch.randn(5, 7).to(torch.bfloat16)
    weight = PackedWeight.of_dense(dense)
    assert weight.codes.data_ptr() == dense.data_ptr()
    assert torch.equal(unpack(weight), dense.float())
    assert weight.to("cpu").codes.data_ptr() == dense.data_ptr()


def test_what_cannot_be_packed_is_refused():
    q, scales = np.zeros((2, 96), np.int8), np.ones((2, 2), np.float32)
    with pytest.raises(UnsupportedError, match="groups of 48"):
        pack(LinearFormat("int4", 48), QuantizedLinear(q, scales, None, 48))
    with pytest.raises(UnsupportedError, match="zero points"):
        pack(LinearFormat("int8", 48, True), QuantizedLinear(q, scales, np.full((2, 2), 200, np.int32), 48))
