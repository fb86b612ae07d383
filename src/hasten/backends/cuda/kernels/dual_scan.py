"""Mamba 2's recurrence (ops.DualScan) in chunks (``chunks``), as state-space duality has it (Dao & Gu 2024, arXiv:2405.21060).

With L the sum of dt·A from the beginning of its chunk to a row, and H the state before the chunk: yₜ = exp(Lₜ)·H·cₜ +
Σⱼ≤ₜ exp(Lₜ − Lⱼ)·dtⱼ·(bⱼ·cₜ)·xⱼ + d·xₜ. No exponent is above 0."""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.chunks import (
    CHUNK,
    at_slot,
    decayed,
    decays,
    keep,
    kept_numbers,
    number_of,
    product,
    rows_at_once,
    rows_of,
)
from hasten.backends.cuda.kernels.pointwise import softplus
from hasten.backends.cuda.kernels.scans import CLEARED, check_size
from hasten.backends.cuda.kernels.states import Sequences, clear, span


def dual_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor, y: Tensor, state: Tensor, sequences: Sequences,
    *, heads: int, groups: int, dt_min: float = 0.0, dt_max: float | None = None, features: int = 64, chunk: int = CHUNK,
) -> None:  # fmt: skip
    """DualScan of x [T, H·P], dt [T, H] and b, c [T, groups·states], all of one dtype, into y [T, H·P]. a_log, d, dt_bias [H].

    A page of the state has [H, P, states] as it was where the chunk began, then of each row of the chunk x, b and dt: ``dual_numbers``."""
    width, size = x.shape[1] // heads, b.shape[1] // groups
    whole = heads * width * size
    check_size(state, dual_numbers(heads, width, groups, size, x.element_size(), chunk))
    block, wide = max(16, min(features, triton.next_power_of_2(width))), max(16, triton.next_power_of_2(size))
    _dual_scan[sequences.programs, heads, triton.cdiv(width, block)](
        x, dt, b, c, a_log, d, dt_bias, y, state, sequences.positions, sequences.offsets, sequences.states, len(x), state.stride(0),
        *(each.stride(0) for each in (x, dt, b, c, y)), dt_min, math.inf if dt_max is None else dt_max,
        heads, heads // groups, width, size, chunk, block, wide, rows_at_once(len(x), sequences.programs - 1, chunk), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    keep((x, b, dt), state, whole, sequences, chunk=chunk)


def dual_numbers(heads: int, width: int, groups: int, states: int, row_bytes: int, chunk: int = CHUNK) -> int:
    """Numbers of float32 of a page of the state, with rows of ``row_bytes`` a number."""
    return heads * width * states + kept_numbers((heads * width, groups * states, heads), row_bytes, chunk)


@triton.jit(do_not_specialize=["rows"])
def _dual_scan(
    x: tensor, dt: tensor, b: tensor, c: tensor, a_log: tensor, d: tensor, dt_bias: tensor, y: tensor, state: tensor, positions: tensor,
    offsets: tensor, states: tensor, rows: tensor, size: tensor, x_stride: tensor, dt_stride: tensor, b_stride: tensor, c_stride: tensor,
    y_stride: tensor, least: tensor, most: tensor,
    HEADS: constexpr, RATIO: constexpr, WIDTH: constexpr, STATES: constexpr, CHUNK: constexpr, FEATURES: constexpr, WIDE: constexpr,
    ROWS: constexpr,
) -> None:  # fmt: skip
    """FEATURES features of a sequence's head: h [FEATURES, WIDE] before a chunk, then its rows, ROWS at once."""
    begin, end, page, position = span(positions, offsets, states, rows)
    head, feature, column = tl.program_id(1), tl.program_id(2) * FEATURES + tl.arange(0, FEATURES), tl.arange(0, WIDE)
    inside, real = feature < WIDTH, column < STATES
    feature += head * WIDTH
    if page < 0:
        clear(y, y_stride, begin, end, feature, inside, CLEARED)
        return
    column += head // RATIO * STATES
    state += page * size
    recent = (state + HEADS * WIDTH * STATES).to(tl.pointer_type(x.dtype.element_ty), bitcast=True)
    recent_b = recent + CHUNK * HEADS * WIDTH
    recent_dt = recent_b + CHUNK * (HEADS // RATIO * STATES)
    at, kept = state + feature[:, None] * STATES + tl.arange(0, WIDE)[None, :], inside[:, None] & real[None, :]
    h = tl.where(position >= CHUNK, tl.load(at, mask=kept, other=0.0), 0.0)
    decay = -tl.exp(tl.load(a_log + head).to(tl.float32))
    skip, shift = tl.load(d + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
    slot = tl.arange(0, CHUNK)
    for start in range(begin - position % CHUNK, end, CHUNK):
        row = start + slot
        xs = rows_of(x, x_stride, recent, HEADS * WIDTH, row, slot, begin, end, feature, inside)
        bs = rows_of(b, b_stride, recent_b, HEADS // RATIO * STATES, row, slot, begin, end, column, real)
        rate = softplus(number_of(dt, dt_stride, recent_dt, HEADS, row, slot, begin, end, head) + shift)
        rate = tl.where(rate < least, least, tl.where(rate > most, most, rate))
        total = decays(tl.where(row < end, rate * decay, 0.0))
        x_columns = tl.trans(xs)
        for first in range(tl.maximum(start, begin), tl.minimum(start + CHUNK, end), ROWS):
            asked = first + tl.arange(0, ROWS)
            there = asked < tl.minimum(start + CHUNK, end)
            far = asked.to(tl.int64)
            cs = tl.load(c + far[None, :] * c_stride + column[:, None], mask=there[None, :] & real[:, None], other=0.0)
            until = at_slot(total, slot, asked - start)
            earlier = (slot[:, None] <= (asked - start)[None, :]) & there[None, :]
            shares = tl.where(earlier, product(bs, cs) * decayed(until[None, :] - total[:, None]) * rate[:, None], 0.0)
            given = inside[:, None] & there[None, :]
            u = tl.load(x + far[None, :] * x_stride + feature[:, None], mask=given, other=0.0).to(tl.float32)
            result = product(h, cs) * decayed(until)[None, :] + product(x_columns, shares) + skip * u
            tl.store(y + far[None, :] * y_stride + feature[:, None], result.to(y.dtype.element_ty), mask=given)
        if start + CHUNK <= end:
            whole = tl.sum(tl.where(slot == CHUNK - 1, total, 0), axis=0)
            h = decayed(whole) * h + product(x_columns, bs.to(tl.float32) * (decayed(whole - total) * rate)[:, None])
    if position % CHUNK + end - begin >= CHUNK:
        tl.store(at, h, mask=kept)
