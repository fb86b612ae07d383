"""Activation order: weights whose inputs belong to groups in another order than they lie."""

import numpy as np

from hasten.checkpoint.quantized.tensors import Parts
from hasten.formats.linear import Floats, QuantizedLinear
from hasten.formats.weights import Array


def order_of(parts: Parts, part: str, width: int, group: int) -> Array | None:
    """The group of each input; None where they lie one after the other, or the checkpoint leaves it open (all −1). ``group`` inputs make
    one, 0 for all. Raises CheckpointError for groups there are not."""
    groups, usual = -(-width // group) if group else 1, np.arange(width) // (group or width)
    parts.must_be(part, (width,), "int32", "int64")
    order = parts.load(part)
    if (order == -1).all():
        return None
    if order.min() < 0 or order.max() >= groups:
        parts.wrong(part, f"has groups from {order.min()} to {order.max()}", f"0 to {groups - 1}")
    return None if np.array_equal(order, usual) else order


def in_order(its: QuantizedLinear, order: Array) -> Floats:
    """What codes mean whose input i has scale and zero point of group ``order[i]``, float32 [out, in]."""
    dense = its.q.astype(np.float32)
    if its.zeros is not None:
        dense -= its.zeros[..., order]
    if its.scales is not None:
        dense *= its.scales[..., order]
    return dense
