"""Linear attention as a recurrence (ops.LinearScan), in the manner of ``scans``, in two kernels: sums of features, then those of values.

The sums of features, the last column of the state, divide every value: blocks of values would all have to read what one of them writes.
So they come first, in a kernel of their own, which leaves each row's divisors for the second."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.scans import CLEARED, check_size, warps_for
from hasten.backends.cuda.kernels.states import Sequences, clear, span
from hasten.program.ops import FEATURE_FLOOR

_FLOOR = constexpr(FEATURE_FLOOR)


def linear_scan(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, totals: Tensor, state: Tensor, sequences: Sequences, *, heads: int, kv_heads: int,
    values: int = 32,
) -> None:  # fmt: skip
    """LinearScan of q [T, heads·head_dim], k [T, kv_heads·head_dim] and v [T, kv_heads·value_dim] into y [T, heads·value_dim].

    The state is [kv_heads, 2·head_dim, value_dim + 1]; ``totals`` float32 [T, heads] is room for what values are divided by."""
    dim, value_dim = q.shape[1] // heads, v.shape[1] // kv_heads
    check_size(state, kv_heads, 2 * dim, value_dim + 1)
    tall, block = triton.next_power_of_2(dim), min(values, triton.next_power_of_2(value_dim))
    step = (sequences.positions, sequences.offsets, sequences.states, len(q))
    _feature_sums[sequences.programs, kv_heads](
        q, k, totals, state, *step, q.stride(0), k.stride(0), totals.stride(0),
        heads // kv_heads, dim, value_dim, tall, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    _linear_scan[sequences.programs, kv_heads, triton.cdiv(value_dim, block)](
        q, k, v, totals, y, state, *step, *(each.stride(0) for each in (q, k, v, totals, y)),
        heads // kv_heads, dim, value_dim, tall, block, num_warps=warps_for(2 * tall * block), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _softmax(x: tensor, real: tensor) -> tensor:
    """softmax(x) over a vector, none below the floor, where ``real``; 0 elsewhere."""
    x = tl.exp(x - tl.max(tl.where(real, x, float("-inf")), axis=0))
    x = tl.where(real, x, 0.0)
    x /= tl.sum(x, axis=0)
    return tl.where(real, tl.where(x < _FLOOR, _FLOOR, x), 0.0)


@triton.jit(do_not_specialize=["rows"])
def _feature_sums(
    q: tensor, k: tensor, totals: tensor, state: tensor, positions: tensor, offsets: tensor, states: tensor, rows: tensor,
    q_stride: tensor, k_stride: tensor, totals_stride: tensor,
    RATIO: constexpr, DIM: constexpr, VALUE_DIM: constexpr, TALL: constexpr,
) -> None:  # fmt: skip
    """A sequence's key/value head: the sums of its features, and with every query of it their product."""
    begin, end, page, past = span(positions, offsets, states, rows)
    if page < 0:
        return
    head, feature = tl.program_id(1), tl.arange(0, TALL)
    real = feature < DIM
    rising = state + ((page * tl.num_programs(1) + head) * 2 * DIM + feature) * (VALUE_DIM + 1) + VALUE_DIM
    falling = rising + DIM * (VALUE_DIM + 1)
    rises = tl.where(past, tl.load(rising, mask=real, other=0.0), 0.0)
    falls = tl.where(past, tl.load(falling, mask=real, other=0.0), 0.0)
    first = begin.to(tl.int64)
    q += first * q_stride + head * RATIO * DIM + feature
    k += first * k_stride + head * DIM + feature
    totals += first * totals_stride + head * RATIO
    for _ in range(begin, end):
        key = tl.load(k, mask=real, other=0.0).to(tl.float32)
        rises += _softmax(key, real)
        falls += _softmax(-key, real)
        for i in tl.static_range(RATIO):
            query = tl.load(q + i * DIM, mask=real, other=0.0).to(tl.float32)
            tl.store(totals + i, tl.sum(_softmax(query, real) * rises + _softmax(-query, real) * falls, axis=0))
        q += q_stride
        k += k_stride
        totals += totals_stride
    tl.store(rising, rises, mask=real)
    tl.store(falling, falls, mask=real)


@triton.jit(do_not_specialize=["rows"])
def _linear_scan(
    q: tensor, k: tensor, v: tensor, totals: tensor, y: tensor, state: tensor, positions: tensor, offsets: tensor, states: tensor,
    rows: tensor, q_stride: tensor, k_stride: tensor, v_stride: tensor, totals_stride: tensor, y_stride: tensor,
    RATIO: constexpr, DIM: constexpr, VALUE_DIM: constexpr, TALL: constexpr, VALUES: constexpr,
) -> None:  # fmt: skip
    """VALUES features of the values of a sequence's key/value head: [TALL, VALUES] of the rising features, as much of the falling."""
    begin, end, page, past = span(positions, offsets, states, rows)
    head, feature, value = tl.program_id(1), tl.arange(0, TALL), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    real, inside = feature < DIM, value < VALUE_DIM
    if page < 0:
        for i in tl.static_range(RATIO):
            clear(y, y_stride, begin, end, (head * RATIO + i) * VALUE_DIM + value, inside, CLEARED)
        return
    kept = real[:, None] & inside[None, :]
    wide: constexpr = VALUE_DIM + 1
    rising = state + ((page * tl.num_programs(1) + head) * 2 * DIM + feature[:, None]) * wide + value[None, :]
    falling = rising + DIM * wide
    rises = tl.where(past, tl.load(rising, mask=kept, other=0.0), 0.0)
    falls = tl.where(past, tl.load(falling, mask=kept, other=0.0), 0.0)
    first = begin.to(tl.int64)
    q += first * q_stride + head * RATIO * DIM + feature
    k += first * k_stride + head * DIM + feature
    v += first * v_stride + head * VALUE_DIM + value
    totals += first * totals_stride + head * RATIO
    y += first * y_stride + head * RATIO * VALUE_DIM + value
    for _ in range(begin, end):
        key = tl.load(k, mask=real, other=0.0).to(tl.float32)
        added = tl.load(v, mask=inside, other=0.0).to(tl.float32)[None, :]
        rises += _softmax(key, real)[:, None] * added
        falls += _softmax(-key, real)[:, None] * added
        for i in tl.static_range(RATIO):
            query = tl.load(q + i * DIM, mask=real, other=0.0).to(tl.float32)
            z = tl.sum(_softmax(query, real)[:, None] * rises + _softmax(-query, real)[:, None] * falls, axis=0)
            tl.store(y + i * VALUE_DIM, (z / tl.load(totals + i)).to(y.dtype.element_ty), mask=inside)
        q += q_stride
        k += k_stride
        v += v_stride
        totals += totals_stride
        y += y_stride
    tl.store(rising, rises, mask=kept)
    tl.store(falling, falls, mask=kept)
