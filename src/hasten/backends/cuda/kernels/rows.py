"""Ops of which a row needs no other row: norms (behind a residual add, before rounding), gates, and what is done number by number.

Rows of every tensor may have any stride; their features are contiguous. Arithmetic is float32, rounded once to what is written; where an
op reads what the one before it wrote, it reads it rounded, also when both are one kernel. Sums over a row go over one tile whose shape
follows from the row's length, so a row's bits do not depend on how many rows there are."""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.pointwise import activated, magnitude, rounded, row_scale, sigmoid, tanh
from hasten.spec import Activation, ClampedSwiglu

LONGEST = 1 << 16  # features of one tile: what one program's registers hold, 128 a lane
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclasses.dataclass(frozen=True, slots=True)
class Rounded:
    """Where rounded rows go: ``q`` [T, N] int8 (QuantizeRows) or float8_e4m3fn (QuantizeFp8), ``scale`` float32 [T, 1]."""

    q: Tensor
    scale: Tensor


def _warps(block: int) -> int:
    """Lanes for a tile of so many numbers: about sixteen each."""
    return max(1, min(16, block // 512))


def norm(
    x: Tensor, weight: Tensor, dtype: torch.dtype, *, eps: float, group: int, y: Tensor | None = None, quantized: Rounded | None = None,
    offset: float = 0.0, bias: Tensor | None = None, centred: bool = False, branch: Tensor | None = None, added: Tensor | None = None,
) -> None:  # fmt: skip
    """RmsNorm of x [T, N] in runs of ``group`` features, LayerNorm where ``centred``; ``weight``, ``bias`` [group] or [N].

    With ``branch`` [T, N] it is x + branch that is normalized (Add); ``added`` takes that sum, in x's dtype, and may be x itself.
    ``y`` [T, N] takes the result, rounded to ``dtype`` first and then to its own (Cast); ``quantized`` its rows rounded (of shorter
    runs in a second kernel, which reads ``y``, of ``dtype`` then). Raises ValueError for shapes that do not go together."""
    rows, size = x.shape
    if size % group or len(weight) not in {group, size} or (bias is not None and len(bias) != len(weight)):
        raise ValueError(f"rows of {size} features, runs of {group} and a weight of {len(weight)} do not go together")
    if group > LONGEST or (branch is None) != (added is None):
        raise ValueError(f"runs are of {LONGEST} features at most, not {group}, and what is added has its sum written")
    if not rows:
        return
    if quantized is not None and group != size:
        if y is None or y.dtype != dtype:
            raise ValueError("rows of several runs are rounded from what was written, which has to be in the norm's own dtype")
        norm(x, weight, dtype, eps=eps, group=group, y=y, offset=offset, bias=bias, centred=centred, branch=branch, added=added)
        quantize_rows(y, quantized)
        return
    block = triton.next_power_of_2(group)
    runs = max(1, 2048 // block)  # short runs share a program
    q, scale = (None, None) if quantized is None else (quantized.q, quantized.scale)
    _norm[(triton.cdiv(rows * (size // group), runs),)](
        x, branch, added, weight, bias, y, q, scale, rows, size // group, eps, offset,
        *(0 if each is None else each.stride(0) for each in (x, branch, added, y, q)),
        group, len(weight) == size, centred, TL_DTYPES[dtype], block, runs, num_warps=_warps(block * runs), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x: tensor, branch: tensor, added: tensor, weight: tensor, bias: tensor, y: tensor, q: tensor, scale: tensor, rows: tensor,
    per_row: tensor, eps: tensor, offset: tensor, x_stride: tensor, branch_stride: tensor, added_stride: tensor, y_stride: tensor,
    q_stride: tensor,
    GROUP: constexpr, FULL: constexpr, CENTRED: constexpr, DTYPE: constexpr, BLOCK: constexpr, RUNS: constexpr,
) -> None:  # fmt: skip
    """RUNS runs of GROUP features, in a tile [RUNS, BLOCK]."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    row, which = run // per_row, (run % per_row) * GROUP
    feature = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (feature < GROUP)
    at = which[:, None] + feature
    value = tl.load(x + row[:, None] * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        value += tl.load(branch + row[:, None] * branch_stride + at, mask=inside, other=0.0).to(tl.float32)
        narrow = value.to(added.dtype.element_ty)
        tl.store(added + row[:, None] * added_stride + at, narrow, mask=inside)
        value = narrow.to(tl.float32)
    if CENTRED:
        mean = tl.sum(value, axis=1) / GROUP
        value = tl.where(inside, value - mean[:, None], 0.0)
    variance = tl.sum(value * value, axis=1) / GROUP
    value *= tl.rsqrt(variance + eps)[:, None]
    factor_at = at if FULL else feature
    value *= tl.load(weight + factor_at, mask=inside, other=0.0).to(tl.float32) + offset
    if bias is not None:
        value += tl.load(bias + factor_at, mask=inside, other=0.0).to(tl.float32)
    value = value.to(DTYPE)
    if y is not None:
        tl.store(y + row[:, None] * y_stride + at, value.to(y.dtype.element_ty), mask=inside)
    if q is not None:
        value = value.to(tl.float32)
        step = row_scale(tl.max(magnitude(value), axis=1), q.dtype.element_ty)
        numbers = rounded(value, tl.broadcast_to(step[:, None], (RUNS, BLOCK)), q.dtype.element_ty)
        tl.store(q + row[:, None] * q_stride + at, numbers, mask=inside)
        tl.store(scale + row, step, mask=row < rows)


def quantize_rows(x: Tensor, quantized: Rounded) -> None:
    """QuantizeRows or QuantizeFp8 of x [T, N], or of [T, A, N] contiguous, every one of its rows apart; any N."""
    wide = _rows(x)
    if len(wide):
        _gate[(len(wide),)](
            None, wide, None, _rows(quantized.q), quantized.scale, len(wide), wide.shape[1], 0, wide.stride(0), 0,
            _rows(quantized.q).stride(0), 0.0, 0.0, None, False, tl.float32, True, 2048, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def quantize_fixed(x: Tensor, quantized: Rounded, step: float) -> None:
    """QuantizeFixed of x [T, N]: int8 of one ``step`` for all."""
    wide, q = _rows(x), _rows(quantized.q)
    if len(wide):
        _fixed[(len(wide), triton.cdiv(wide.shape[1], 1024))](
            wide, q, quantized.scale, wide.shape[1], wide.stride(0), q.stride(0), step, 1024, num_warps=4, enable_fp_fusion=False
        )


@triton.jit
def _fixed(x: tensor, q: tensor, scale: tensor, size: tensor, x_stride: tensor, q_stride: tensor, step: tensor, BLOCK: constexpr) -> None:
    row, feature = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + feature, mask=feature < size, other=0.0).to(tl.float32)
    steps = rounded(value, tl.full((BLOCK,), step, tl.float32), tl.int8)
    tl.store(q + row * q_stride + feature, tl.where(value == value, steps, 127), mask=feature < size)
    if tl.program_id(1) == 0:
        tl.store(scale + row, step)


def gate(
    gate: Tensor, up: Tensor, activation: Activation | ClampedSwiglu, dtype: torch.dtype, *, y: Tensor | None = None, quantized: Rounded
    | None = None,
) -> None:  # fmt: skip
    """y = activation(gate) · up, or ClampedSwiglu of both, of gate [T, N] or [T, 1] and up [T, N], or both with an axis [A] between.

    The result is rounded to ``dtype``; ``y`` takes it in its own (Cast), ``quantized`` its rows rounded."""
    gate, up = _rows(gate), _rows(up)
    rows, size = up.shape
    if not rows:
        return
    y, q = (None if each is None else _rows(each) for each in (y, None if quantized is None else quantized.q))
    clamped = activation if isinstance(activation, ClampedSwiglu) else None
    kind, alpha, limit = (activation, 0.0, 0.0) if clamped is None else ("clamped", clamped.alpha, clamped.limit)
    block = min(2048 if quantized else 1024, triton.next_power_of_2(size))
    _gate[(rows,) if quantized else (rows, triton.cdiv(size, block))](
        gate, up, y, q, None if quantized is None else quantized.scale, rows, size,
        *(0 if each is None else each.stride(0) for each in (gate, up, y, q)),
        alpha, limit, kind, gate.shape[1] == 1, TL_DTYPES[dtype], quantized is not None, block,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _gated(
    gate: tensor, up: tensor, at: tensor, inside: tensor, alpha: tensor, limit: tensor,
    KIND: constexpr, ONE: constexpr, DTYPE: constexpr,
) -> tensor:  # fmt: skip
    """Features ``at`` of the gated row, rounded to DTYPE; of ``up`` alone where there is no gate."""
    value = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        by = tl.load(gate).to(tl.float32) if ONE else tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        if KIND == "clamped":
            by = tl.where(by > limit, limit, by)
            value = tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))
            value = by * sigmoid(alpha * by) * (value + 1.0)
        else:
            value = activated(by, KIND) * value
    return value.to(DTYPE)


@triton.jit(do_not_specialize=["rows"])
def _gate(
    gate: tensor, up: tensor, y: tensor, q: tensor, scale: tensor, rows: tensor, size: tensor, gate_stride: tensor, up_stride: tensor,
    y_stride: tensor, q_stride: tensor, alpha: tensor, limit: tensor,
    KIND: constexpr, ONE: constexpr, DTYPE: constexpr, QUANTIZE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """One row, twice over where it is rounded: its largest number comes first. Else BLOCK features of one row."""
    row = tl.program_id(0).to(tl.int64)
    if gate is not None:
        gate += row * gate_stride
    up += row * up_stride
    if QUANTIZE:
        most = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = _gated(gate, up, at, at < size, alpha, limit, KIND, ONE, DTYPE)
            if y is not None:
                tl.store(y + row * y_stride + at, value.to(y.dtype.element_ty), mask=at < size)
            most = tl.maximum(most, magnitude(value.to(tl.float32)))
        step = row_scale(tl.max(most, axis=0), q.dtype.element_ty)
        tl.store(scale + row, step)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = _gated(gate, up, at, at < size, alpha, limit, KIND, ONE, DTYPE).to(tl.float32)
            tl.store(q + row * q_stride + at, rounded(value, tl.broadcast_to(step, (BLOCK,)), q.dtype.element_ty), mask=at < size)
    else:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = _gated(gate, up, at, at < size, alpha, limit, KIND, ONE, DTYPE)
        tl.store(y + row * y_stride + at, value.to(y.dtype.element_ty), mask=at < size)


def activate(x: Tensor, y: Tensor, activation: Activation) -> None:
    """y = activation(x), both [T, N] or contiguous with any axes between."""
    _map(x, y, activation, 0.0)


def scale(x: Tensor, y: Tensor, factor: float) -> None:
    """y = x · factor."""
    _map(x, y, "scale", factor)


def clip(x: Tensor, y: Tensor, limit: float) -> None:
    """y = min(max(x, −limit), limit); what is not a number stays so."""
    _map(x, y, "clip", limit)


def soft_cap(x: Tensor, y: Tensor, cap: float) -> None:
    """y = cap · tanh(x / cap)."""
    _map(x, y, "soft_cap", cap)


def cast(x: Tensor, y: Tensor) -> None:
    """y = x in y's dtype, round to nearest even."""
    _map(x, y, "cast", 0.0)


def add(a: Tensor, b: Tensor, y: Tensor) -> None:
    """y = a + b, y in a's dtype (Add); y may be a."""
    _map(a, y, "add", 0.0, b)


def _map(x: Tensor, y: Tensor, kind: str, parameter: float, other: Tensor | None = None) -> None:
    x, y, b = _rows(x), _rows(y), None if other is None else _rows(other)
    rows, size = x.shape
    if rows:
        _mapped[(rows, triton.cdiv(size, 1024))](
            x, b, y, size, x.stride(0), 0 if b is None else b.stride(0), y.stride(0), parameter, kind, 1024,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _mapped(
    x: tensor, other: tensor, y: tensor, size: tensor, x_stride: tensor, other_stride: tensor, y_stride: tensor, parameter: tensor,
    KIND: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """BLOCK features of one row."""
    row, feature = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < size
    value = tl.load(x + row * x_stride + feature, mask=inside, other=0.0).to(tl.float32)
    if KIND == "add":
        value += tl.load(other + row * other_stride + feature, mask=inside, other=0.0).to(tl.float32)
    elif KIND == "scale":
        value *= parameter
    elif KIND == "clip":
        value = tl.where(value > parameter, parameter, tl.where(value < -parameter, -parameter, value))
    elif KIND == "soft_cap":
        value = parameter * tanh(value / parameter)
    elif KIND != "cast":
        value = activated(value, KIND)
    tl.store(y + row * y_stride + feature, value.to(y.dtype.element_ty), mask=inside)


def embed(weight: Tensor, tokens: Tensor, y: Tensor, *, factor: float = 1.0, offset: int = 0) -> None:
    """y[T, D] = weight[tokens + offset] · factor (Embed; EmbedPositions of positions). weight [V, D], tokens int32 [T].

    Rows of a negative token are zeros."""
    _taken(weight, tokens, y, factor, offset)


def select_rows(x: Tensor, rows: Tensor, y: Tensor) -> None:
    """y[R, N] = x[rows], in the same dtype; rows int32 [R]. Those of a negative number are zeros."""
    _taken(x, rows, y, 1.0, 0)


def _taken(source: Tensor, rows: Tensor, y: Tensor, factor: float, offset: int) -> None:
    if len(rows):
        _take[(len(rows), triton.cdiv(y.shape[1], 1024))](
            source, rows, y, y.shape[1], source.stride(0), y.stride(0), offset, factor, 1024, num_warps=4, enable_fp_fusion=False
        )


@triton.jit
def _take(
    source: tensor, rows: tensor, y: tensor, size: tensor, source_stride: tensor, y_stride: tensor, offset: tensor, factor: tensor,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    row, feature = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    taken = tl.load(rows + row).to(tl.int64)
    there = feature < tl.where(taken >= 0, size, 0)
    value = tl.load(source + (taken + offset) * source_stride + feature, mask=there, other=0.0).to(tl.float32) * factor
    tl.store(y + row * y_stride + feature, value.to(y.dtype.element_ty), mask=feature < size)


def head_split(x: Tensor, ys: tuple[Tensor, ...], heads: int) -> None:
    """HeadSplit of x [T, H·Σn] into contiguous ``ys`` [T, H·n]: copies, for a head's features have to lie beside the next head's."""
    parts = x.unflatten(-1, (heads, -1)).split([y.shape[-1] // heads for y in ys], dim=-1)
    for part, y in zip(parts, ys, strict=True):
        y.unflatten(-1, (heads, -1)).copy_(part)


def concat(xs: tuple[Tensor, ...], y: Tensor, heads: int) -> None:
    """Concat of ``xs`` [T, H·n] into y [T, H·Σn], head by head."""
    parts = y.unflatten(-1, (heads, -1)).split([x.shape[-1] // heads for x in xs], dim=-1)
    for part, x in zip(parts, xs, strict=True):
        part.copy_(x.unflatten(-1, (heads, -1)))


def _rows(x: Tensor) -> Tensor:
    """x as [rows, features], without a copy."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])
