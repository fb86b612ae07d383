"""Recurrences in chunks: what a row gives is its product with the state before its chunk, and a triangle of products within the chunk.

A chunk is CHUNK positions from a multiple of CHUNK on, whatever a step holds of it, and the state is kept as it was where the chunk began.
What later rows need of a chunk that is not full yet is kept beside it, in the dtype of the rows; only a full chunk moves the state on. So
every row is computed by the same operations in the same order, in a prompt of any cut and when decoding, which then reads the state
without writing it. That takes three things. Products sum along the rows of a chunk or the features of a state, whole, in the
instruction's own order: tiles differ only in how many rows they ask for, as those of linear.py. Logarithms of decays are summed as whole
numbers, so that no layout of a sum shows. And kept rows are copied by a launch of their own behind the recurrence, for many programs read
what one of them would overwrite."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.states import Sequences, span

CHUNK = 64
"""Positions of a chunk."""
FEW = 16
"""Rows that are asked for at once when decoding."""

_FORGOTTEN = constexpr(-128.0)  # of a decay's logarithm: exp of less is nothing beside any float32
_UNIT = constexpr(2.0**-40)  # of logarithms as whole numbers: 2¹⁰ rows of the least fit into 2⁵⁷ of them


def rows_at_once(rows: int, sequences: int, chunk: int) -> int:
    """Rows that a program asks for at once in a bucket of so many: few where each sequence has few."""
    return min(chunk, FEW if rows <= FEW * sequences else chunk)


def kept_numbers(widths: tuple[int, ...], row_bytes: int, chunk: int = CHUNK) -> int:
    """Numbers of float32 that the rows of a chunk take, of such widths and so many bytes a number."""
    return -(-chunk * sum(widths) * row_bytes // 4)


def keep(sources: tuple[Tensor, ...], state: Tensor, first: int, sequences: Sequences, *, chunk: int = CHUNK, columns: int = 1024) -> None:
    """Rows of a chunk that ``sequences`` leave unfilled go to their pages of ``state`` [pages, size], from number ``first`` on: those of
    the first source [T, N] end to end, then those of the next; three sources at most, of one dtype."""
    padded: list[Tensor | None] = [*sources, None, None]
    a, b, c = padded[:3]
    widths, strides = [0 if x is None else x.shape[1] for x in padded[:3]], [0 if x is None else x.stride(0) for x in padded[:3]]
    block = min(columns, triton.next_power_of_2(max(widths)))
    _keep[sequences.programs, len(sources), triton.cdiv(max(widths), block)](
        a, b, c, state, sequences.positions, sequences.offsets, sequences.states, *strides, *widths, state.stride(0), first,
        chunk, block, 8, num_warps=4,
    )  # fmt: skip


@triton.jit
def _keep(
    a: tensor, b: tensor, c: tensor, state: tensor, positions: tensor, offsets: tensor, states: tensor, a_stride: tensor, b_stride: tensor,
    c_stride: tensor, a_width: tensor, b_width: tensor, c_width: tensor, size: tensor, first: tensor,
    CHUNK: constexpr, COLUMNS: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    """COLUMNS columns of a source of a sequence."""
    begin, end, page, position = span(positions, offsets, states, 0)
    filled = (position + end - begin) % CHUNK
    if page < 0 or filled == 0:
        return
    recent = (state + page * size + first).to(tl.pointer_type(a.dtype.element_ty), bitcast=True)
    if tl.program_id(1) == 0:
        _keep_one(a, a_stride, a_width, recent, begin, end, filled, COLUMNS, ROWS)
    if b is not None:  # noqa: SIM102 (known when it is compiled, and the other not)
        if tl.program_id(1) == 1:
            _keep_one(b, b_stride, b_width, recent + CHUNK * a_width, begin, end, filled, COLUMNS, ROWS)
    if c is not None:  # noqa: SIM102
        if tl.program_id(1) == 2:
            _keep_one(c, c_stride, c_width, recent + CHUNK * (a_width + b_width), begin, end, filled, COLUMNS, ROWS)


@triton.jit
def _keep_one(
    x: tensor,
    stride: tensor,
    width: tensor,
    recent: tensor,
    begin: tensor,
    end: tensor,
    filled: tensor,
    COLUMNS: constexpr,
    ROWS: constexpr,
) -> None:
    """The last ``filled`` rows before ``end``, as far as they are of this step."""
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    for start in range(tl.maximum(begin, end - filled), end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside)
        tl.store(recent + (row - (end - filled))[:, None] * width + column[None, :], value, mask=inside)


@triton.jit
def rows_of(
    x: tensor, stride: tensor, recent: tensor, width: tensor, row: tensor, slot: tensor, begin: tensor, end: tensor, feature: tensor,
    inside: tensor,
) -> tensor:  # fmt: skip
    """Features [N] of rows [CHUNK] of x, ``slot`` their places in the chunk: this step's, or kept ones before; zeros behind its last."""
    here = tl.load(
        x + row.to(tl.int64)[:, None] * stride + feature[None, :], mask=((row >= begin) & (row < end))[:, None] & inside[None, :], other=0.0
    )
    before = (row < begin)[:, None]
    kept = tl.load(recent + slot[:, None] * width + feature[None, :], mask=before & inside[None, :], other=0.0)
    return tl.where(before, kept, here)


@triton.jit
def number_of(
    x: tensor, stride: tensor, recent: tensor, width: tensor, row: tensor, slot: tensor, begin: tensor, end: tensor, feature: tensor
) -> tensor:
    """One feature of rows [CHUNK] of x as ``rows_of`` has them, in float32."""
    here = tl.load(x + row.to(tl.int64) * stride + feature, mask=(row >= begin) & (row < end), other=0.0)
    kept = tl.load(recent + slot * width + feature, mask=row < begin, other=0.0)
    return tl.where(row < begin, kept, here).to(tl.float32)


@triton.jit
def decays(logarithm: tensor) -> tensor:
    """Sums of logarithms [CHUNK] ≤ 0 up to and with each row, as whole numbers: the same in any order."""
    return tl.cumsum((tl.maximum(logarithm, _FORGOTTEN).to(tl.float64) * (1.0 / _UNIT)).to(tl.int64), axis=0)


@triton.jit
def row_sums(x: tensor) -> tensor:
    """Sums over the features of rows [N, features] of numbers from 0 to 1, as whole numbers: the same in any order."""
    return (tl.sum((x.to(tl.float64) * (1.0 / _UNIT)).to(tl.int64), axis=1).to(tl.float64) * _UNIT).to(tl.float32)


@triton.jit
def at_slot(numbers: tensor, slot: tensor, wanted: tensor) -> tensor:
    """numbers [CHUNK] at ``wanted`` [ROWS] slots; 0 where there is none."""
    return tl.sum(tl.where(slot[:, None] == wanted[None, :], numbers[:, None], 0), axis=0)


@triton.jit
def decayed(difference: tensor) -> tensor:
    """exp of a difference of ``decays``."""
    return tl.exp(difference.to(tl.float32) * _UNIT)


@triton.jit
def product(a: tensor, b: tensor) -> tensor:
    """a · b in float32: exact products of bfloat16, else as good as float32's."""
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        return tl.dot(a, b)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
