"""Packed weights for tests of the kernels."""

import numpy as np

from hasten import _native
from hasten.backends.cpu.packed import PackedWeights
from hasten.backends.cpu.rows import FEEDS
from hasten.formats.linear import LinearFormat

POOL = _native.ThreadPool(1)


def weight_buffer(form, group, dense, zero_points=False, sparse=False):
    """``dense`` [out, in], float32 or bits of bf16, as the kernels read it."""
    weight = _native.WeightBuffer(form, *np.shape(dense), group, zero_points, sparse)
    if form == "lut4":
        its = LinearFormat(form, group).quantize(dense)
        weight.pack_codes(POOL, its.q, its.scales, None, its.codebook)
        return weight
    weight.pack(POOL, dense)
    return weight


def native_activations(name):
    """What weights in the format of that name are multiplied with natively, the usual first."""
    return [fed for fed in LinearFormat.parse(name).activations if fed in FEEDS.values()]


def all_packed(pool):
    """Every weight packed anew, whatever a cache may hold."""
    return PackedWeights(pool, "best", "a test", None, None)
