"""Products with the weight of a linear layer, in every format, of which a row's bits never depend on the other rows.

Weights stand on the side of the matrix instruction whose size is fixed (64 output channels), rows on the side that may be 16 or 256, so
decoding and prompts go through the same instruction, and weights that are taken apart in registers are where Hopper's wgmma takes
registers. What is summed in which order is said by ``Order``, which goes with the weight: K in steps of ``step`` inputs, in ``parts`` runs
that are summed apart and then added up in order. ``Tiles`` goes with the number of rows and changes no bit: with few rows the parts run
side by side, so that the whole device reads, and the last one to end adds them up; with many, one program goes through all of them.

Codes of integers and of fp8 are exact in bfloat16, so a group's sum of code · x is a sum of exact products in float32; its scale comes
once, behind. With int8 rows a group's sum is an exact integer. Fp8 rows meet fp8 codes as they are: on Hopper, whose product of them adds
with fewer bits than float32 has, sums go on to float32 every ``PRECISE`` inputs, wherever the tile's are."""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.nibbles import quarter
from hasten.backends.cuda.kernels.pack import PackedWeight
from hasten.base.errors import UnsupportedError

PROGRAMS = 264  # two for each of an H200's 132 multiprocessors: what it takes to keep its memory busy
MOST_PARTS = 8
PRECISE = constexpr(128)  # inputs
LEAST_STEPS = 4  # of a part, or filling the pipeline costs what the other parts gain


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """What a row's bits depend on. ``step`` inputs, a power of two of 32 at least, are one block product; ``parts`` runs of steps are
    summed apart, then in order. Raises ValueError for what is no such order."""

    step: int
    parts: int = 1

    def __post_init__(self) -> None:
        if self.step < 32 or self.step & (self.step - 1) or self.parts < 1:
            raise ValueError(f"{self} is no order of sums: steps are powers of two of 32 at least, parts are 1 at least")


@dataclasses.dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut over the device, for one bucket of rows. ``split`` runs the parts of K side by side; ``stages`` loads are under
    way; tiles of the same weights run ``swizzle`` at a time. Raises ValueError where the device would take another instruction than it
    takes for other tiles: then a row's bits might depend on its bucket."""

    out: int = 64
    rows: int = 16
    warps: int = 4
    stages: int = 4
    split: bool = False
    swizzle: int = 8

    def __post_init__(self) -> None:
        powers = all(each > 0 and not each & (each - 1) for each in (self.out, self.rows, self.warps))
        if not powers or self.out < 64 or self.rows < 16 or self.warps not in {4, 8} or min(self.stages, self.swizzle) < 1:
            raise ValueError(f"{self} are no tiles: out is a power of two of 64 at least, rows of 16 at least, warps are 4 or 8")


@dataclasses.dataclass(frozen=True, slots=True)
class Scratch:
    """Where parts of K that run side by side leave their sums, and how many of a tile have. ``sums`` float32 [room]; ``arrived`` int32
    [tiles], zero before the first product and after each. One scratch serves any number of products of one stream."""

    sums: Tensor
    arrived: Tensor


def default_order(weight: PackedWeight) -> Order:
    """From the weight's shape and layout alone."""
    step = weight.span or min(64, weight.group or 64)
    steps = -(-weight.size // step)
    wanted = PROGRAMS // -(-weight.out // 64)
    return Order(step, max(1, min(MOST_PARTS, wanted, steps // LEAST_STEPS)))


def default_tiles(rows: int, order: Order) -> Tiles:
    """For a bucket of ``rows``. Long steps fill the shared memory with fewer stages."""
    if rows <= 64:
        return Tiles(rows=max(16, triton.next_power_of_2(rows)), split=order.parts > 1)
    return Tiles(out=128, rows=128, warps=8, stages=3 if order.step <= 128 else 2)


def scratch_size(rows: int, out: int, order: Order, tiles: Tiles, stacked: int = 1) -> tuple[int, int]:
    """Elements that a Scratch needs for one product of ``rows`` rows: of ``sums`` and of ``arrived``."""
    if not tiles.split or order.parts == 1:
        return 0, 0
    return order.parts * stacked * rows * out, stacked * triton.cdiv(out, tiles.out) * triton.cdiv(rows, tiles.rows)


def linear(
    x: Tensor, weight: PackedWeight, y: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None, scratch: Scratch | None =
    None, order: Order | None = None, tiles: Tiles | None = None,
) -> None:  # fmt: skip
    """y[T, out] = x[T, size] · weightᵀ + bias; of a stacked weight, head by head: y[T, H·out] from x[T, H·size] (HeadLinear).

    x is bfloat16, float16 or float32, and codes are taken as numbers of that dtype; or of ``scale`` float32 [T, 1], int8 where codes
    are integers, float8_e4m3fn where they are that. y is of any of the wider floats, ``bias`` [(H·)out] too. Rows of x and y may have
    any stride. ``scratch`` is needed where tiles split K. Raises UnsupportedError for dtypes that do not go together, ValueError for
    shapes that do not."""
    order = order or default_order(weight)
    tiles = tiles or default_tiles(x.shape[0], order)
    count = weight.codes.shape[0] if weight.codes.dim() == 3 else 1
    check(x, weight, scale, order)
    if x.shape[1] != count * weight.size or y.shape != (x.shape[0], count * weight.out):
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} do not fit {count} weights of {weight.out} × {weight.size}")
    rows, split = x.shape[0], tiles.split and order.parts > 1
    if not rows:
        return
    needed = scratch_size(rows, weight.out, order, tiles, count)
    if split and (scratch is None or scratch.sums.numel() < needed[0] or scratch.arrived.numel() < needed[1]):
        raise ValueError(f"a product of {rows} rows in {order.parts} parts needs a scratch of {needed[0]} sums and {needed[1]} counters")
    grid = (triton.cdiv(weight.out, tiles.out) * triton.cdiv(rows, tiles.rows), order.parts if split else 1, count)
    integer = x.dtype == torch.int8 and not weight.group
    _linear[grid](
        x, weight.codes, weight.scales, weight.zeros, scale, bias, y,
        (scratch.sums.view(torch.int32) if integer else scratch.sums) if split and scratch else None,
        scratch.arrived if split and scratch else None,
        rows, weight.out, weight.size, weight.codes.stride(-2), x.stride(0), y.stride(0), weight.group, stacked_stride(weight),
        *constants(weight, order), order.parts, split, tiles.out, tiles.rows, tiles.swizzle,
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip


def check(x: Tensor, weight: PackedWeight, scale: Tensor | None, order: Order) -> None:
    """Raise UnsupportedError where ``x`` cannot be multiplied with the codes to the bit, ValueError for an order the weight has not."""
    codes = weight.codes.dtype
    exact: dict[torch.dtype, tuple[torch.dtype, ...]] = {
        torch.int8: (torch.int8, torch.int16),
        torch.float8_e4m3fn: (torch.float8_e4m3fn,),
        torch.bfloat16: (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int16),
        torch.float16: (torch.float16, torch.float8_e4m3fn, torch.int8, torch.int16),
        torch.float32: (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.int16),
    }
    if codes not in exact.get(x.dtype, ()):
        raise UnsupportedError(f"rows of {x.dtype} are not multiplied with codes of {codes}, which that does not hold exactly")
    if x.dtype == torch.int8 and codes == torch.int8 and weight.zeros is not None:
        raise UnsupportedError("int8 rows are not multiplied with int8 codes that have zero points: their difference takes nine bits")
    if (x.dtype in {torch.int8, torch.float8_e4m3fn}) != (scale is not None):
        raise ValueError("int8 and fp8 rows come with a scale each, others without")
    if weight.span and order.step != weight.span:
        raise ValueError(f"a step of {order.step} inputs does not go with a weight packed in spans of {weight.span}")
    if not weight.span and weight.group % order.step:
        raise ValueError(f"a step of {order.step} inputs does not divide groups of {weight.group}")


def constants(weight: PackedWeight, order: Order) -> tuple[int, bool, bool, bool, bool]:
    """What tile_sum is compiled for: step, nibbles, whether the last step ends behind x's rows, or the weight's, and groups."""
    return order.step, weight.layout == "nibbles", weight.size % order.step != 0, weight.width % order.step != 0, weight.group > 0


def stacked_stride(weight: PackedWeight) -> int:
    """Scales (and zero points) from one stacked weight to the next."""
    return weight.scales.stride(0) if weight.scales is not None and weight.scales.dim() == 3 else 0


@triton.jit
def _operand(codes: tensor, zeros: tensor, x_dtype: constexpr) -> tensor:
    """Codes less their zero points as numbers of x's dtype; all of them are exact there."""
    if zeros is not None:
        if codes.dtype == tl.bfloat16:
            codes = codes - zeros[:, None].to(tl.bfloat16)
        else:
            codes = codes.to(tl.int16) - zeros[:, None].to(tl.int16)
    return codes if codes.dtype == x_dtype else codes.to(x_dtype)


@triton.jit
def _block(x_rows: tensor, k: tensor, size: tensor, MASK: constexpr) -> tensor:
    """x of inputs k [K] of every row: [K, ROWS], zeros behind its end."""
    at = x_rows[None, :] + k[:, None]  # and 0.0 behind it, for no whole number becomes fp8
    return tl.load(at, mask=(k < size)[:, None], other=0.0) if MASK else tl.load(at)


@triton.jit
def _dot(a: tensor, b: tensor, total: tensor) -> tensor:
    """total + a · b; float32 as float32, fp8 in float32."""
    if total.dtype == tl.int32:
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    elif a.dtype == tl.float8e4nv:
        total = tl.dot(a, b, total, max_num_imprecise_acc=PRECISE if a.shape[1] > PRECISE else a.shape[1])
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _summed(
    total: tensor, numbers: tensor, block: tensor, scales: tensor, zeros: tensor, of_channel: tensor, at: tensor, kept: tensor,
    x_dtype: constexpr, GROUPED: constexpr, OUT: constexpr, ROWS: constexpr,
) -> tensor:  # fmt: skip
    """total + numbers · block; of a group, whose scale and zero point lie ``at``, times its scale."""
    if GROUPED:
        of_group = None if zeros is None else tl.load(zeros + at, mask=kept, other=0)
        none = tl.zeros((OUT, ROWS), dtype=tl.int32 if x_dtype == tl.int8 else tl.float32)
        part = _dot(_operand(numbers, of_group, x_dtype), block, none).to(tl.float32)
        scale = tl.load(scales + at, mask=kept, other=0.0)
        total = tl.fma(part, tl.broadcast_to(scale[:, None], (OUT, ROWS)), total)
    else:
        total = _dot(_operand(numbers, of_channel, x_dtype), block, total)
    return total


@triton.jit
def tile_sum(
    codes: tensor, scales: tensor, zeros: tensor, x_rows: tensor, o: tensor, out: tensor, size: tensor, width: tensor, group: tensor,
    first: tensor, last: tensor,
    STEP: constexpr, NIBBLES: constexpr, MASK_X: constexpr, MASK_W: constexpr, GROUPED: constexpr, OUT: constexpr, ROWS: constexpr,
) -> tensor:  # fmt: skip
    """Steps first … last − 1 of Σₖ (code − zero)[o, k] · x[row, k], groups times their scales: [OUT, ROWS] float32, or int32 where int8
    rows meet one scale a channel. ``x_rows`` [ROWS] points to the rows; ``o`` [OUT] are output channels, any beyond the last repeated."""
    x_dtype: constexpr = x_rows.dtype.element_ty
    SUM: constexpr = tl.int32 if x_dtype == tl.int8 and not GROUPED else tl.float32
    QUARTER: constexpr = STEP // 4
    at_rows = codes + tl.minimum(o, out - 1).to(tl.int64)[:, None] * width
    kept = o < out
    total = tl.zeros((OUT, ROWS), dtype=SUM)
    of_channel = tl.load(zeros + o, mask=kept, other=0) if zeros is not None and not GROUPED else None
    for step in range(first, last):
        if NIBBLES:
            words = tl.load(at_rows + (step * QUARTER + tl.arange(0, QUARTER))[None, :])
            for number in tl.static_range(4):
                start = step * STEP + number * QUARTER
                block = _block(x_rows, start + tl.arange(0, QUARTER), size, MASK_X)
                numbers = quarter(words, number, x_dtype)
                at = start // group * out + o if GROUPED else o
                total = _summed(total, numbers, block, scales, zeros, of_channel, at, kept, x_dtype, GROUPED, OUT, ROWS)
        else:
            k = step * STEP + tl.arange(0, STEP)
            if MASK_W:
                numbers = tl.load(at_rows + k[None, :], mask=(k < size)[None, :], other=0.0)
            else:
                numbers = tl.load(at_rows + k[None, :])
            block = _block(x_rows, k, size, MASK_X)
            at = step * STEP // group * out + o if GROUPED else o
            total = _summed(total, numbers, block, scales, zeros, of_channel, at, kept, x_dtype, GROUPED, OUT, ROWS)
    return total


@triton.jit
def sum_of_parts(
    codes: tensor, scales: tensor, zeros: tensor, x_rows: tensor, o: tensor, out: tensor, size: tensor, width: tensor, group: tensor,
    STEP: constexpr, NIBBLES: constexpr, MASK_X: constexpr, MASK_W: constexpr, GROUPED: constexpr, PARTS: constexpr, OUT: constexpr,
    ROWS: constexpr,
) -> tensor:  # fmt: skip
    """tile_sum of every part of K, added in order."""
    steps = tl.cdiv(size, STEP)
    each = tl.cdiv(steps, PARTS)
    total = tile_sum(
        codes, scales, zeros, x_rows, o, out, size, width, group, 0, tl.minimum(each, steps),
        STEP, NIBBLES, MASK_X, MASK_W, GROUPED, OUT, ROWS,
    )  # fmt: skip
    for part in range(1, PARTS):
        total += tile_sum(
            codes, scales, zeros, x_rows, o, out, size, width, group, part * each, tl.minimum(part * each + each, steps),
            STEP, NIBBLES, MASK_X, MASK_W, GROUPED, OUT, ROWS,
        )  # fmt: skip
    return total


@triton.jit
def finished(
    total: tensor, scales: tensor, row_scale: tensor, bias: tensor, o: tensor, out: tensor, rows: tensor, kept: tensor,
    GROUPED: constexpr,
) -> tensor:  # fmt: skip
    """The sum times what scales are left, plus the bias, float32 [OUT, ROWS]. ``rows`` [ROWS] index row_scale, where ``kept``."""
    value = total.to(tl.float32)
    if scales is not None and not GROUPED:
        value = value * tl.load(scales + o, mask=o < out, other=0.0)[:, None]
    if row_scale is not None:
        value = value * tl.load(row_scale + rows, mask=kept, other=0.0)[None, :]
    if bias is not None:
        value = value + tl.load(bias + o, mask=o < out, other=0.0).to(tl.float32)[:, None]
    return value


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x: tensor, codes: tensor, scales: tensor, zeros: tensor, row_scale: tensor, bias: tensor, y: tensor, sums: tensor, arrived: tensor,
    rows: tensor, out: tensor, size: tensor, width: tensor, x_stride: tensor, y_stride: tensor, group: tensor, scales_stride: tensor,
    STEP: constexpr, NIBBLES: constexpr, MASK_X: constexpr, MASK_W: constexpr, GROUPED: constexpr, PARTS: constexpr, SPLIT: constexpr,
    OUT: constexpr, ROWS: constexpr, SWIZZLE: constexpr,
) -> None:  # fmt: skip
    """One tile of y: of all parts of K, or of part program_id(1)."""
    tiles_out, tiles_rows = tl.cdiv(out, OUT), tl.cdiv(rows, ROWS)
    tile, which = tl.program_id(0), tl.program_id(2).to(tl.int64)
    run = tile // (SWIZZLE * tiles_out) * SWIZZLE
    high = tl.minimum(tiles_rows - run, SWIZZLE)
    within = tile % (SWIZZLE * tiles_out)
    o = within // high * OUT + tl.arange(0, OUT)
    r = (run + within % high) * ROWS + tl.arange(0, ROWS)

    codes += which * out * width
    if scales is not None:
        scales += which * scales_stride
    if zeros is not None:
        zeros += which * scales_stride
    if bias is not None:
        bias += which * out
    x_rows = x + which * size + tl.minimum(r, rows - 1).to(tl.int64) * x_stride
    inside = (o < out)[:, None] & (r < rows)[None, :]

    if SPLIT:
        steps = tl.cdiv(size, STEP)
        each, part = tl.cdiv(steps, PARTS), tl.program_id(1)
        total = tile_sum(
            codes, scales, zeros, x_rows, o, out, size, width, group, part * each, tl.minimum(part * each + each, steps),
            STEP, NIBBLES, MASK_X, MASK_W, GROUPED, OUT, ROWS,
        )  # fmt: skip
        room = sums + which * PARTS * rows * out + r.to(tl.int64)[None, :] * out + o[:, None]
        tl.store(room + part.to(tl.int64) * rows * out, total, mask=inside)
        tl.debug_barrier()  # every lane's sums lie there before one lane says so
        counter = arrived + which * tiles_out * tiles_rows + tile
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            total = tl.load(room, mask=inside, other=0, cache_modifier=".cg")
            for other in range(1, PARTS):
                total += tl.load(room + tl.cast(other, tl.int64) * rows * out, mask=inside, other=0, cache_modifier=".cg")
            value = finished(total, scales, row_scale, bias, o, out, r, r < rows, GROUPED)
            tl.store(y + r.to(tl.int64)[None, :] * y_stride + which * out + o[:, None], value.to(y.dtype.element_ty), mask=inside)
            tl.store(counter, 0)
    else:
        total = sum_of_parts(
            codes, scales, zeros, x_rows, o, out, size, width, group, STEP, NIBBLES, MASK_X, MASK_W, GROUPED, PARTS, OUT, ROWS
        )
        value = finished(total, scales, row_scale, bias, o, out, r, r < rows, GROUPED)
        tl.store(y + r.to(tl.int64)[None, :] * y_stride + which * out + o[:, None], value.to(y.dtype.element_ty), mask=inside)
