"""Linear attention (ops.LinearScan) in chunks (``chunks``): zₜ = Sᵀ·φ(qₜ) + Σⱼ≤ₜ (φ(kⱼ)·φ(qₜ))·[vⱼ, 1], with S as it was before the chunk.

The last column of the state, the sums of features, divides every value: blocks of values would all have to read what one of them writes.
So that column comes first, in a launch of its own, which leaves each row's divisors for the second."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.chunks import keep, kept_numbers, product, row_sums, rows_at_once, rows_of
from hasten.backends.cuda.kernels.scans import CLEARED, check_size
from hasten.backends.cuda.kernels.states import Sequences, clear, span
from hasten.program.ops import FEATURE_FLOOR

CHUNK = 32
"""Positions of a chunk: what 64 take of two sides' features of 128 does not fit into a program's shared memory."""

_FLOOR = constexpr(FEATURE_FLOOR)


def linear_scan(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, totals: Tensor, state: Tensor, sequences: Sequences, *, heads: int, kv_heads: int,
    values: int = 32, chunk: int = CHUNK,
) -> None:  # fmt: skip
    """LinearScan of q [T, heads·head_dim], k [T, kv_heads·head_dim] and v [T, kv_heads·value_dim], all of one dtype, into y
    [T, heads·value_dim]. ``totals`` float32 [T, heads] is room for what values are divided by.

    A page of the state has [kv_heads, 2·head_dim, value_dim + 1] as it was where the chunk began, then of each row of the chunk k and v:
    ``linear_numbers``."""
    dim, value_dim = q.shape[1] // heads, v.shape[1] // kv_heads
    check_size(state, linear_numbers(kv_heads, dim, value_dim, k.element_size(), chunk))
    tall, most = max(16, triton.next_power_of_2(dim)), max(16, min(values, triton.next_power_of_2(value_dim)))
    for sums, block, blocks in ((True, 16, 1), (False, most, triton.cdiv(value_dim, most))):
        _linear_scan[sequences.programs, kv_heads, blocks](
            q, k, v, totals, y, state, sequences.positions, sequences.offsets, sequences.states, len(q), state.stride(0),
            *(each.stride(0) for each in (q, k, v, totals, y)), kv_heads, heads // kv_heads, dim, value_dim, chunk, tall, block,
            rows_at_once(len(q), sequences.programs - 1, chunk), sums, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    keep((k, v), state, kv_heads * 2 * dim * (value_dim + 1), sequences, chunk=chunk)


def linear_numbers(kv_heads: int, head_dim: int, value_dim: int, row_bytes: int, chunk: int = CHUNK) -> int:
    """Numbers of float32 of a page of the state, with rows of ``row_bytes`` a number."""
    return kv_heads * 2 * head_dim * (value_dim + 1) + kept_numbers((kv_heads * head_dim, kv_heads * value_dim), row_bytes, chunk)


@triton.jit
def _softmax(x: tensor, real: tensor) -> tensor:
    """softmax(x) over rows [N, TALL], none below the floor, where ``real`` [N, TALL]; 0 elsewhere."""
    x = tl.exp(x - tl.max(tl.where(real, x, float("-inf")), axis=1)[:, None])
    x = tl.where(real, x, 0.0)
    x /= row_sums(x)[:, None]
    return tl.where(real, tl.where(x < _FLOOR, _FLOOR, x), 0.0)


@triton.jit(do_not_specialize=["rows"])
def _linear_scan(
    q: tensor, k: tensor, v: tensor, totals: tensor, y: tensor, state: tensor, positions: tensor, offsets: tensor, states: tensor,
    rows: tensor, size: tensor, q_stride: tensor, k_stride: tensor, v_stride: tensor, totals_stride: tensor, y_stride: tensor,
    KV_HEADS: constexpr, RATIO: constexpr, DIM: constexpr, VALUE_DIM: constexpr, CHUNK: constexpr, TALL: constexpr, VALUES: constexpr,
    ROWS: constexpr, SUMS: constexpr,
) -> None:  # fmt: skip
    """VALUES features of the values of a sequence's key/value head, or with SUMS the sums of features: [VALUES, TALL] of the rising
    features before a chunk and as much of the falling, then its rows, ROWS of a query head at once."""
    begin, end, page, position = span(positions, offsets, states, rows)
    head, feature, value = tl.program_id(1), tl.arange(0, TALL), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    real = feature < DIM
    if SUMS:
        if page < 0:
            return
        column, inside = value + VALUE_DIM, value < 1
    else:
        column, inside = value, value < VALUE_DIM
        if page < 0:
            for i in tl.static_range(RATIO):
                clear(y, y_stride, begin, end, (head * RATIO + i) * VALUE_DIM + value, inside, CLEARED)
            return
    kept = inside[:, None] & real[None, :]
    state += page * size
    recent = (state + KV_HEADS * 2 * DIM * (VALUE_DIM + 1)).to(tl.pointer_type(k.dtype.element_ty), bitcast=True)
    recent_v = recent + CHUNK * KV_HEADS * DIM
    rising = state + (head * 2 * DIM + feature[None, :]) * (VALUE_DIM + 1) + column[:, None]
    falling = rising + DIM * (VALUE_DIM + 1)
    rises = tl.where(position >= CHUNK, tl.load(rising, mask=kept, other=0.0), 0.0)
    falls = tl.where(position >= CHUNK, tl.load(falling, mask=kept, other=0.0), 0.0)
    slot = tl.arange(0, CHUNK)
    for start in range(begin - position % CHUNK, end, CHUNK):
        row = start + slot
        keys = rows_of(k, k_stride, recent, KV_HEADS * DIM, row, slot, begin, end, head * DIM + feature, real).to(tl.float32)
        known = (row < end)[:, None] & real[None, :]
        keys_rise, keys_fall = _softmax(keys, known), _softmax(-keys, known)
        if SUMS:
            vs = tl.where((row < end)[:, None] & inside[None, :], 1.0, 0.0)
        else:
            vs = rows_of(v, v_stride, recent_v, KV_HEADS * VALUE_DIM, row, slot, begin, end, head * VALUE_DIM + value, inside)
        v_columns = tl.trans(vs)
        for i in tl.static_range(RATIO):
            query_head = head * RATIO + i
            for first in range(tl.maximum(start, begin), tl.minimum(start + CHUNK, end), ROWS):
                asked = first + tl.arange(0, ROWS)
                there = asked < tl.minimum(start + CHUNK, end)
                far, wanted = asked.to(tl.int64), there[:, None] & real[None, :]
                query = tl.load(q + far[:, None] * q_stride + query_head * DIM + feature[None, :], mask=wanted, other=0.0).to(tl.float32)
                query_rise, query_fall = tl.trans(_softmax(query, wanted)), tl.trans(_softmax(-query, wanted))
                earlier = (slot[:, None] <= (asked - start)[None, :]) & there[None, :]
                shares = tl.where(earlier, product(keys_rise, query_rise) + product(keys_fall, query_fall), 0.0)
                z = product(rises, query_rise) + product(falls, query_fall) + product(v_columns, shares)
                given = inside[:, None] & there[None, :]
                if SUMS:
                    tl.store(totals + far[None, :] * totals_stride + query_head + value[:, None], z, mask=given)
                else:
                    z /= tl.load(totals + far * totals_stride + query_head, mask=there, other=1.0)[None, :]
                    place = y + far[None, :] * y_stride + query_head * VALUE_DIM + value[:, None]
                    tl.store(place, z.to(y.dtype.element_ty), mask=given)
        if start + CHUNK <= end:
            rises += product(v_columns, keys_rise)
            falls += product(v_columns, keys_fall)
    if position % CHUNK + end - begin >= CHUNK:
        tl.store(rising, rises, mask=kept)
        tl.store(falling, falls, mask=kept)
