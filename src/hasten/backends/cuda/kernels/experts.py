"""Mixtures of experts: who is chosen, which rows each expert reads, their products, and the sum of what they say.

The rows of a step are told apart by expert on the device, into blocks of ``block`` places of one expert each: places that nobody takes
hold −1. How many blocks there can be follows from the shapes alone, so nothing is waited for and the grid is always the same; a block
without an expert ends at once. A row's product is summed as linear.py sums it, so it has the same bits in any block."""

import dataclasses

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.linear import Order, Tiles, check, constants, default_order, finished, stacked_stride, sum_of_parts
from hasten.backends.cuda.kernels.pack import PackedWeight
from hasten.backends.cuda.kernels.pointwise import sigmoid
from hasten.program import ops

_LISTED = 1024  # choices that one pass over them reads


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """Which rows an expert reads. ``places`` int32 [blocks · block]: a choice (token · A + which) or −1; ``experts`` int32 [blocks]: whose
    block it is, or −1; ``counts`` int32 [E]: rows of each expert."""

    places: Tensor
    experts: Tensor
    counts: Tensor

    @property
    def block(self) -> int:
        """Places of a block."""
        return len(self.places) // len(self.experts)


def most_blocks(choices: int, experts: int, block: int) -> int:
    """Blocks that ``choices`` (T · A) can fill, however they fall: every expert that is chosen may leave one unfilled."""
    return choices // block + min(experts, choices)


def default_expert_tiles(choices: int, experts: int) -> Tiles:
    """For a bucket of T · A choices, as if they fell evenly."""
    each = -(-choices // experts)
    return Tiles(rows=16) if each <= 16 else Tiles(rows=64) if each <= 64 else Tiles(out=128, rows=128, warps=8, stages=3)


def route(
    op: ops.Route, logits: Tensor, experts: Tensor, weights: Tensor, sequence: Tensor, correction: Tensor | None = None
) -> None:  # fmt: skip
    """Route of logits [T, E]: experts int32 [T, A] and weights [T, A], for ``op``'s attributes. What is not a number is chosen first.

    Rows of no ``sequence`` int32 [T] choose expert −1 with weight 0, so that no weights are read for them."""
    rows, size = logits.shape
    if rows:
        members = size // op.groups
        _route[(rows,)](
            logits, correction, experts, weights, sequence, logits.stride(0), op.scale, members, op.groups, op.top_groups, op.top_k,
            op.score == "sigmoid", op.normalize, triton.next_power_of_2(op.groups), triton.next_power_of_2(members),
            triton.next_power_of_2(op.top_k), num_warps=1 if size <= 64 else 4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _route(
    logits: tensor, correction: tensor, experts: tensor, weights: tensor, sequence: tensor, stride: tensor, scale: tensor,
    MEMBERS: constexpr, GROUPS: constexpr, TOP_GROUPS: constexpr, TOP_K: constexpr, SIGMOID: constexpr, NORMALIZE: constexpr,
    ALL: constexpr, WIDE: constexpr, TOP: constexpr,
) -> None:  # fmt: skip
    """One row, in a tile [ALL groups, WIDE members]."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, TOP)
    if tl.load(sequence + row) < 0:
        tl.store(experts + row * TOP_K + place, tl.full((TOP,), -1, tl.int32), mask=place < TOP_K)
        tl.store(weights + row * TOP_K + place, tl.zeros((TOP,), weights.dtype.element_ty), mask=place < TOP_K)
        return
    group, member = tl.arange(0, ALL)[:, None], tl.arange(0, WIDE)[None, :]
    number, inside = group * MEMBERS + member, (group < GROUPS) & (member < MEMBERS)
    score = tl.load(logits + row * stride + number, mask=inside, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        score = sigmoid(score)
    else:
        score = tl.exp(score - tl.max(tl.max(score, axis=1), axis=0))
        score = tl.div_rn(score, tl.broadcast_to(tl.sum(tl.sum(score, axis=1), axis=0), (ALL, WIDE)))
    ranking = score
    if correction is not None:
        ranking += tl.load(correction + number, mask=inside, other=0.0).to(tl.float32)
    ranking = tl.where(ranking == ranking, ranking, float("inf"))
    lowest = -float("inf")
    if GROUPS > 1:
        ranked = tl.where(inside, ranking, lowest)
        best = tl.max(ranked, axis=1)
        first = tl.min(tl.where(ranked == best[:, None], member, WIDE), axis=1)
        second = tl.max(tl.where(member == first[:, None], lowest, ranked), axis=1)
        both = tl.where(tl.arange(0, ALL) < GROUPS, best + (second if MEMBERS > 1 else 0.0), lowest)
        mine, other = tl.arange(0, ALL)[:, None], tl.arange(0, ALL)[None, :]
        ahead = (both[None, :] > both[:, None]) | ((both[None, :] == both[:, None]) & (other < mine))
        better = tl.sum(ahead.to(tl.int32), axis=1)
        ranking = tl.where((better < TOP_GROUPS)[:, None], ranking, lowest)
    taken = ~inside
    experts_here, weights_here = tl.zeros((TOP,), tl.int32), tl.zeros((TOP,), tl.float32)
    total = 0.0
    for a in tl.static_range(TOP_K):
        left = tl.where(taken, lowest, ranking)
        best = tl.max(tl.max(left, axis=1), axis=0)
        chosen = tl.min(tl.min(tl.where((left == best) & ~taken, number, 2147483647), axis=1), axis=0)
        weight = tl.sum(tl.sum(tl.where(number == chosen, score, 0.0), axis=1), axis=0)
        taken |= number == chosen
        total += weight
        experts_here = tl.where(place == a, chosen, experts_here)
        weights_here = tl.where(place == a, weight, weights_here)
    if NORMALIZE:
        weights_here = tl.div_rn(weights_here, tl.broadcast_to(total, (TOP,)))
    tl.store(experts + row * TOP_K + place, experts_here, mask=place < TOP_K)
    tl.store(weights + row * TOP_K + place, (weights_here * scale).to(weights.dtype.element_ty), mask=place < TOP_K)


def tell_apart(experts: Tensor, blocks: Blocks) -> None:
    """Fill ``blocks`` from experts int32 [T, A], in order of token and choice; a negative expert is nobody's. Raises ValueError for fewer
    than ``most_blocks``."""
    choices, count, room = experts.numel(), len(blocks.counts), len(blocks.experts)
    if not choices:
        return
    block = blocks.block
    if room < (needed := most_blocks(choices, count, block)) or block & (block - 1):
        raise ValueError(f"{choices} choices of {count} experts need {needed} blocks of a power of two places, not {room} of {block}")
    _count[(count,)](experts, blocks.counts, choices, _LISTED, num_warps=4, enable_fp_fusion=False)
    _place[(count + 1,)](
        experts, blocks.counts, blocks.places, blocks.experts, choices, count, room, block, _LISTED, triton.next_power_of_2(count),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _count(experts: tensor, counts: tensor, choices: tensor, LISTED: constexpr) -> None:
    expert, found = tl.program_id(0), tl.zeros((LISTED,), tl.int32)
    for start in range(0, choices, LISTED):
        at = start + tl.arange(0, LISTED)
        found += (tl.load(experts + at, mask=at < choices, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, axis=0))


@triton.jit
def _place(
    experts: tensor, counts: tensor, places: tensor, blocks: tensor, choices: tensor, count: tensor, room: tensor,
    BLOCK: constexpr, LISTED: constexpr, ALL: constexpr,
) -> None:  # fmt: skip
    """The blocks of expert program_id(0); the one behind the last marks the blocks that are left as nobody's."""
    expert = tl.program_id(0)
    every = tl.arange(0, ALL)
    of_each = (tl.load(counts + every, mask=every < count, other=0) + BLOCK - 1) // BLOCK
    first = tl.sum(tl.where(every < expert, of_each, 0), axis=0)
    mine = tl.sum(tl.where(every == expert, of_each, 0), axis=0)
    if expert == count:
        for start in range(first, room, LISTED):
            at = start + tl.arange(0, LISTED)
            tl.store(blocks + at, -1, mask=at < room)
    else:
        for start in range(first, first + mine, LISTED):
            at = start + tl.arange(0, LISTED)
            tl.store(blocks + at, expert, mask=at < first + mine)
        next_place = first * BLOCK
        for start in range(0, choices, LISTED):
            at = start + tl.arange(0, LISTED)
            is_mine = (tl.load(experts + at, mask=at < choices, other=-1) == expert).to(tl.int32)
            tl.store(places + next_place + tl.cumsum(is_mine, axis=0) - 1, at, mask=is_mine > 0)
            next_place += tl.sum(is_mine, axis=0)
        at = next_place + tl.arange(0, BLOCK)
        tl.store(places + at, -1, mask=at < (first + mine) * BLOCK)


def expert_linear(
    x: Tensor, weight: PackedWeight, y: Tensor, blocks: Blocks, tiles: Tiles, *, scale: Tensor | None = None, bias: Tensor | None = None,
    order: Order | None = None,
) -> None:  # fmt: skip
    """ExpertLinear: y[T, A, out] = x · weight[expert]ᵀ + bias[expert], for ``blocks`` told apart with blocks of ``tiles.rows``.

    x is [T, size], read by every chosen expert, or [T, A, size], contiguous; dtypes and ``scale`` (x's shape, 1 in place of its last size)
    as in ``linear``. weight [E, out, size], bias [E, out]. y is contiguous; rows of choices that are nobody's are left as they are."""
    order = order or default_order(weight)
    check(x, weight, scale, order)
    tokens, chosen, out = y.shape
    if not tokens:
        return
    if tiles.rows != blocks.block:
        raise ValueError(f"rows were told apart in blocks of {blocks.block}; tiles of {tiles.rows} do not go with them")
    if x.shape not in {(tokens, weight.size), (tokens, chosen, weight.size)} or out != weight.out:
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} do not fit weights of {weight.out} × {weight.size}")
    bound = most_blocks(tokens * chosen, len(blocks.counts), tiles.rows)
    _experts[(triton.cdiv(out, tiles.out) * bound,)](
        x, weight.codes, weight.scales, weight.zeros, scale, bias, y, blocks.places, blocks.experts, bound, out, weight.size,
        weight.codes.stride(-2), x.stride(-2), weight.group, stacked_stride(weight), chosen if x.dim() == 2 else 1,
        *constants(weight, order), order.parts, tiles.out, tiles.rows, num_warps=tiles.warps, num_stages=tiles.stages,
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _experts(
    x: tensor, codes: tensor, scales: tensor, zeros: tensor, row_scale: tensor, bias: tensor, y: tensor, places: tensor, blocks: tensor,
    bound: tensor, out: tensor, size: tensor, width: tensor, x_stride: tensor, group: tensor, scales_stride: tensor, sharing: tensor,
    STEP: constexpr, NIBBLES: constexpr, MASK_X: constexpr, MASK_W: constexpr, GROUPED: constexpr, PARTS: constexpr, OUT: constexpr,
    ROWS: constexpr,
) -> None:  # fmt: skip
    """One tile of one block's rows. Tiles of the same expert's weights follow one another, as its blocks do."""
    block, expert = tl.program_id(0) % bound, tl.load(blocks + tl.program_id(0) % bound).to(tl.int64)
    if expert >= 0:
        o = tl.program_id(0) // bound * OUT + tl.arange(0, OUT)
        place = tl.load(places + block * ROWS + tl.arange(0, ROWS))
        kept = place >= 0
        place = tl.maximum(place, 0)
        codes += expert * out * width
        if scales is not None:
            scales += expert * scales_stride
        if zeros is not None:
            zeros += expert * scales_stride
        if bias is not None:
            bias += expert * out
        x_rows = x + (place // sharing).to(tl.int64) * x_stride
        total = sum_of_parts(
            codes, scales, zeros, x_rows, o, out, size, width, group, STEP, NIBBLES, MASK_X, MASK_W, GROUPED, PARTS, OUT, ROWS
        )
        value = finished(total, scales, row_scale, bias, o, out, place // sharing, kept, GROUPED)
        tl.store(y + place.to(tl.int64)[None, :] * out + o[:, None], value.to(y.dtype.element_ty), mask=(o < out)[:, None] & kept[None, :])


def combine(x: Tensor, weights: Tensor, y: Tensor, sequence: Tensor) -> None:
    """Combine: y[T, N] = Σₐ weights[T, a] · x[T, a, N], in the order the experts were chosen; x contiguous.

    Rows of no ``sequence`` int32 [T] become zeros: no expert has said anything of them."""
    tokens, chosen, size = x.shape
    if tokens:
        _combine[(tokens, triton.cdiv(size, 1024))](
            x, weights, y, sequence, size, y.stride(0), chosen, 1024, num_warps=4, enable_fp_fusion=False
        )


@triton.jit
def _combine(
    x: tensor, weights: tensor, y: tensor, sequence: tensor, size: tensor, y_stride: tensor,
    CHOSEN: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row, feature = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total, inside = tl.zeros((BLOCK,), tl.float32), feature < size
    said = feature < tl.where(tl.load(sequence + row) >= 0, size, 0)
    for a in tl.static_range(CHOSEN):
        weight = tl.load(weights + row * CHOSEN + a).to(tl.float32)
        value = tl.load(x + (row * CHOSEN + a) * size + feature, mask=said, other=0.0).to(tl.float32)
        total = tl.fma(value, tl.broadcast_to(weight, (BLOCK,)), total)
    tl.store(y + row * y_stride + feature, total.to(y.dtype.element_ty), mask=inside)
