"""A packed weight for tests of the linear kernels."""

import numpy as np

from hasten import _native

POOL = _native.ThreadPool(1)


def weight_buffer(form, group, dense, zero_points=False, sparse=False):
    """``dense`` [out, in], float32 or bits of bf16, as the kernels read it."""
    weight = _native.WeightBuffer(form, *np.shape(dense), group, zero_points, sparse)
    weight.pack(POOL, dense)
    return weight
