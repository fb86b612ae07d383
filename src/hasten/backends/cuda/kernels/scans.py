"""Recurrences over time, row by row, of one state a channel or head: CausalConv, SelectiveScan, GatedDeltaScan (hasten.program.ops).

A program takes one sequence's rows in order, through a part of its state that no other program needs: the state is read and written once
a step, side by side, and what a row gives depends neither on the batch nor on how a prompt was cut. State and sums are float32, whatever
the dtypes of rows and weights. Rows may have any stride; their features are contiguous, and weights altogether.

Why not in chunks (``chunks``), as ``dual_scan`` and ``linear_scan``: SelectiveScan lets every state of every channel decay at its own
rate, so what two rows share is no product of matrices. GatedDeltaScan is one behind a triangle (Yang et al. 2024, arXiv:2412.06464):
each row's correction hangs on all corrections before it in its chunk. Kept in the page, in float32, beside the chunk's keys, they would
give every cut the same bits, for half the state's memory more. But a decoded row would then pay for tiles of 16 rows in four products of
the state's size, where it reads a page anyway; which of the two is the longer only a device can tell.

Every function launches over ``sequences`` and takes ``state`` [pages, size], a layer of ``states.StatePool``; rows that are padding become
zeros. ValueError is raised for a state of another size."""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.pointwise import activated, sigmoid, softplus
from hasten.backends.cuda.kernels.states import Sequences, clear, span
from hasten.spec import Activation

CLEARED = constexpr(8)  # rows of padding that are cleared at a time


def warps_for(tile: int) -> int:
    """Warps for a tile of so many numbers: sixteen or so a lane."""
    return max(1, min(16, tile // 512))


def check_size(state: Tensor, *shape: int) -> None:
    """Raises ValueError unless a page of ``state`` has ``shape``."""
    if state.shape[1] != math.prod(shape):
        raise ValueError(f"a page of {state.shape[1]} numbers is no state of {' × '.join(map(str, shape))}")


def causal_conv(
    x: Tensor, weight: Tensor, y: Tensor, state: Tensor, sequences: Sequences, *, bias: Tensor | None = None,
    activation: Activation | None = None, channels: int = 256, rows: int = 4,
) -> None:  # fmt: skip
    """CausalConv of x [T, N] into y [T, N]. weight [N, taps], bias [N]; the state is the last taps − 1 rows [taps − 1, N]."""
    count, taps = weight.shape
    check_size(state, taps - 1, count)
    block = min(channels, triton.next_power_of_2(count))
    _causal_conv[sequences.programs, triton.cdiv(count, block)](
        x, weight, bias, y, state, sequences.positions, sequences.offsets, sequences.states, len(x), count, x.stride(0), y.stride(0),
        taps, activation, block, rows, max(1, triton.next_power_of_2(taps - 1)), num_warps=warps_for(block * rows), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _causal_conv(
    x: tensor, weight: tensor, bias: tensor, y: tensor, state: tensor, positions: tensor, offsets: tensor, states: tensor, rows: tensor,
    count: tensor, x_stride: tensor, y_stride: tensor,
    TAPS: constexpr, ACTIVATION: constexpr, CHANNELS: constexpr, ROWS: constexpr, KEPT: constexpr,
) -> None:  # fmt: skip
    """CHANNELS channels of a sequence, ROWS rows at a time; KEPT is TAPS − 1, or the power of two above it."""
    begin, end, page, position = span(positions, offsets, states, rows)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < count
    if page < 0:
        clear(y, y_stride, begin, end, channel, inside, CLEARED)
        return
    state += page * (TAPS - 1) * count
    shift = tl.zeros((CHANNELS,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        kept = (row < end)[:, None] & inside[None, :]
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for i in tl.static_range(TAPS):
            value = _earlier(x, state, row - (TAPS - 1 - i), channel, kept, begin, position > 0, x_stride, count, TAPS)
            total += value * tl.load(weight + channel * TAPS + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        total += shift[None, :]
        if ACTIVATION is not None:
            total = activated(total, ACTIVATION)
        tl.store(y + row.to(tl.int64)[:, None] * y_stride + channel[None, :], total.to(y.dtype.element_ty), mask=kept)
    if TAPS > 1:
        slot = tl.arange(0, KEPT)
        kept = (slot < TAPS - 1)[:, None] & inside[None, :]
        value = _earlier(x, state, end - (TAPS - 1) + slot, channel, kept, begin, position > 0, x_stride, count, TAPS)
        tl.debug_barrier()  # what another warp still reads is not written yet
        tl.store(state + slot[:, None] * count + channel[None, :], value, mask=kept)


@triton.jit
def _earlier(
    x: tensor, state: tensor, row: tensor, channel: tensor, kept: tensor, begin: tensor, past: tensor, x_stride: tensor, count: tensor,
    TAPS: constexpr,
) -> tensor:  # fmt: skip
    """Rows of x, or of the state where they were before its first row: [rows, channels] in float32."""
    here = (row >= begin)[:, None]
    given = tl.load(x + row.to(tl.int64)[:, None] * x_stride + channel[None, :], mask=kept & here, other=0.0).to(tl.float32)
    if TAPS == 1:
        return given
    else:
        before = (row < begin)[:, None]
        old = tl.load(state + (row - begin + TAPS - 1)[:, None] * count + channel[None, :], mask=kept & before, other=0.0)
        return tl.where(here, given, tl.where(past, old, 0.0))


def selective_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor, y: Tensor, state: Tensor, sequences: Sequences,
    *, channels: int = 32,
) -> None:  # fmt: skip
    """SelectiveScan of x, dt [T, N] and b, c [T, states] into y [T, N]. a_log [N, states], d, dt_bias [N]; the state is [N, states]."""
    count, size = a_log.shape
    check_size(state, count, size)
    block, wide = min(channels, triton.next_power_of_2(count)), triton.next_power_of_2(size)
    _selective_scan[sequences.programs, triton.cdiv(count, block)](
        x, dt, b, c, a_log, d, dt_bias, y, state, sequences.positions, sequences.offsets, sequences.states, len(x), count,
        *(each.stride(0) for each in (x, dt, b, c, y)),
        size, block, wide, num_warps=warps_for(block * wide), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _selective_scan(
    x: tensor, dt: tensor, b: tensor, c: tensor, a_log: tensor, d: tensor, dt_bias: tensor, y: tensor, state: tensor, positions: tensor,
    offsets: tensor, states: tensor, rows: tensor, count: tensor, x_stride: tensor, dt_stride: tensor, b_stride: tensor, c_stride: tensor,
    y_stride: tensor,
    STATES: constexpr, CHANNELS: constexpr, WIDE: constexpr,
) -> None:  # fmt: skip
    """CHANNELS channels of a sequence: h [CHANNELS, WIDE]."""
    begin, end, page, position = span(positions, offsets, states, rows)
    channel, column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, WIDE)
    inside, real = channel < count, column < STATES
    if page < 0:
        clear(y, y_stride, begin, end, channel, inside, CLEARED)
        return
    at, kept = channel[:, None] * STATES + column[None, :], inside[:, None] & real[None, :]
    state += page * count * STATES + at
    h = tl.where(position > 0, tl.load(state, mask=kept, other=0.0), 0.0)
    decay = -tl.exp(tl.load(a_log + at, mask=kept, other=0.0).to(tl.float32))
    skip = tl.load(d + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(dt_bias + channel, mask=inside, other=0.0).to(tl.float32)
    first = begin.to(tl.int64)
    x += first * x_stride + channel
    dt += first * dt_stride + channel
    b += first * b_stride + column
    c += first * c_stride + column
    y += first * y_stride + channel
    x_row, dt_row = tl.load(x, mask=inside, other=0.0), tl.load(dt, mask=inside, other=0.0)
    b_row, c_row = tl.load(b, mask=real, other=0.0), tl.load(c, mask=real, other=0.0)
    for row in range(begin, end):
        u, rate = x_row.to(tl.float32), softplus(dt_row.to(tl.float32) + shift)
        into, out = b_row.to(tl.float32), c_row.to(tl.float32)
        x += x_stride  # the next row is on its way while this one is computed
        dt += dt_stride
        b += b_stride
        c += c_stride
        channels, columns = tl.where(row + 1 < end, count, 0), tl.where(row + 1 < end, STATES, 0)
        x_row, dt_row = tl.load(x, mask=channel < channels, other=0.0), tl.load(dt, mask=channel < channels, other=0.0)
        b_row, c_row = tl.load(b, mask=column < columns, other=0.0), tl.load(c, mask=column < columns, other=0.0)
        h = tl.exp(rate[:, None] * decay) * h + (rate * u)[:, None] * into[None, :]
        result = tl.sum(h * out[None, :], axis=1) + skip * u
        tl.store(y, result.to(y.dtype.element_ty), mask=inside)
        y += y_stride
    tl.store(state, h, mask=kept)


def gated_delta_scan(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, y: Tensor, state: Tensor, sequences: Sequences,
    *, key_heads: int, value_heads: int, values: int = 32,
) -> None:  # fmt: skip
    """GatedDeltaScan of q, k [T, key_heads·key_dim], v [T, value_heads·value_dim] and a, b [T, value_heads] into y, of v's shape.

    a_log, dt_bias [value_heads]; the state is [value_heads, key_dim, value_dim]."""
    key_dim, value_dim = k.shape[1] // key_heads, v.shape[1] // value_heads
    check_size(state, value_heads, key_dim, value_dim)
    tall, block = triton.next_power_of_2(key_dim), min(values, triton.next_power_of_2(value_dim))
    _gated_delta_scan[sequences.programs, value_heads, triton.cdiv(value_dim, block)](
        q, k, v, a, b, a_log, dt_bias, y, state, sequences.positions, sequences.offsets, sequences.states, len(q),
        *(each.stride(0) for each in (q, k, v, a, b, y)), key_dim**-0.5,
        value_heads // key_heads, key_dim, value_dim, tall, block, num_warps=warps_for(tall * block), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _unit(x: tensor) -> tensor:
    """x at unit length, with the 1e-6 that keeps zeros zero."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) + 1e-6)


@triton.jit(do_not_specialize=["rows"])
def _gated_delta_scan(
    q: tensor, k: tensor, v: tensor, a: tensor, b: tensor, a_log: tensor, dt_bias: tensor, y: tensor, state: tensor, positions: tensor,
    offsets: tensor, states: tensor, rows: tensor, q_stride: tensor, k_stride: tensor, v_stride: tensor, a_stride: tensor,
    b_stride: tensor, y_stride: tensor, scale: tensor,
    RATIO: constexpr, KEY_DIM: constexpr, VALUE_DIM: constexpr, TALL: constexpr, VALUES: constexpr,
) -> None:  # fmt: skip
    """VALUES features of the values of a sequence's head: s [TALL, VALUES]."""
    begin, end, page, position = span(positions, offsets, states, rows)
    head, feature, value = tl.program_id(1), tl.arange(0, TALL), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    real, inside = feature < KEY_DIM, value < VALUE_DIM
    if page < 0:
        clear(y, y_stride, begin, end, head * VALUE_DIM + value, inside, CLEARED)
        return
    kept = real[:, None] & inside[None, :]
    state += (page * tl.num_programs(1) + head) * KEY_DIM * VALUE_DIM + feature[:, None] * VALUE_DIM + value[None, :]
    s = tl.where(position > 0, tl.load(state, mask=kept, other=0.0), 0.0)
    decay, shift = -tl.exp(tl.load(a_log + head).to(tl.float32)), tl.load(dt_bias + head).to(tl.float32)
    first = begin.to(tl.int64)
    q += first * q_stride + head // RATIO * KEY_DIM + feature
    k += first * k_stride + head // RATIO * KEY_DIM + feature
    v += first * v_stride + head * VALUE_DIM + value
    a += first * a_stride + head
    b += first * b_stride + head
    y += first * y_stride + head * VALUE_DIM + value
    q_row, k_row, v_row = tl.load(q, mask=real, other=0.0), tl.load(k, mask=real, other=0.0), tl.load(v, mask=inside, other=0.0)
    a_row, b_row = tl.load(a), tl.load(b)
    for row in range(begin, end):
        key, query = _unit(k_row.to(tl.float32)), _unit(q_row.to(tl.float32)) * scale
        wanted, beta = v_row.to(tl.float32), sigmoid(b_row.to(tl.float32))
        s *= tl.exp(decay * softplus(a_row.to(tl.float32) + shift))
        q += q_stride  # the next row is on its way while this one is computed
        k += k_stride
        v += v_stride
        a += a_stride
        b += b_stride
        keys, values = tl.where(row + 1 < end, KEY_DIM, 0), tl.where(row + 1 < end, VALUE_DIM, 0)
        q_row, k_row = tl.load(q, mask=feature < keys, other=0.0), tl.load(k, mask=feature < keys, other=0.0)
        v_row = tl.load(v, mask=value < values, other=0.0)
        a_row, b_row = tl.load(a, mask=row + 1 < end, other=0.0), tl.load(b, mask=row + 1 < end, other=0.0)
        change = (wanted - tl.sum(s * key[:, None], axis=0)) * beta
        s += key[:, None] * change[None, :]
        tl.store(y, tl.sum(s * query[:, None], axis=0).to(y.dtype.element_ty), mask=inside)
        y += y_stride
    tl.store(state, s, mask=kept)
