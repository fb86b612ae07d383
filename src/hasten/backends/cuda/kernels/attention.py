"""Attention over paged keys and values (ops.Attend): one kernel for prompts and decode, whose rows never depend on the batch.

A program takes a tile: some rows of one sequence times the query heads that share a key/value head, ``lanes`` at most, always of the same
shape, so that a row that decodes and a row of a prompt go through the same instructions. Keys are read in blocks of ``keys`` positions, and
summed in parts of ``part`` positions, both counted from position 0; the parts are added in order. Which program sums a part changes no
bit: with few tiles the parts of one are spread over the device and a second kernel adds them up, else the tile's program does it all.

Scores are in base 2 and the running maximum is rounded up to a whole number, so that what was summed before is rescaled by a power of two,
exactly: a sum does not depend on when its maximum was met. Rescaling on the way: Milakov & Gimelshein 2018 (arXiv:1805.02867); tiles of
queries and the split over keys: Dao 2023 (arXiv:2307.08691); pages: Kwon et al. 2023 (arXiv:2309.06180)."""

import dataclasses
import itertools
import math

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.cache import PAGE, LayerCache
from hasten.base.errors import UnsupportedError
from hasten.program import ops
from hasten.spec import Causal, SegmentMemory, SlidingWindow, Visibility

LOG2E = constexpr(math.log2(math.e))


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """How attention is cut up. ``keys`` and ``part`` (positions; part is a multiple of keys), ``lanes`` (rows times heads of a tile) and
    ``warps`` say what is summed in which order, so they stay the same for a model on a device; ``values`` (features of a value that a
    program sums at most) and ``stages`` are speed only. Powers of two; the first three and ``values`` are 16 at least."""

    keys: int = 64
    part: int = 512
    lanes: int = 64
    values: int = 256
    warps: int = 4
    stages: int = 2


DEFAULT = Blocks()


def blocks_for(key_dim: int) -> Blocks:
    """Blocks to begin with: what fits a Hopper's 227 KiB of shared memory, latent rows of 576 features too."""
    return DEFAULT if key_dim <= 256 else Blocks(keys=32, warps=8)


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """Where the parts of every row lie until they are added up, made once and used by every layer.

    sums [T, H, parts, value_dim], totals and maxima [T, H, parts], float32. ``programs`` work on the parts of a tile side by side."""

    sums: Tensor
    totals: Tensor
    maxima: Tensor
    programs: int

    @staticmethod
    def of(rows: int, heads: int, value_dim: int, context: int, programs: int, room: Tensor, blocks: Blocks = DEFAULT) -> "Parts":
        """For ``rows`` rows whose sequences have ``context`` tokens at most, in ``room`` float32 of ``Parts.numbers`` or more."""
        shape = (rows, heads, triton.cdiv(context, blocks.part))
        count = math.prod(shape)
        cuts = (0, value_dim * count, (value_dim + 1) * count, (value_dim + 2) * count)
        sums, totals, maxima = (room[first:last] for first, last in itertools.pairwise(cuts))
        return Parts(sums.view(*shape, value_dim), totals.view(shape), maxima.view(shape), programs)

    @staticmethod
    def numbers(rows: int, heads: int, value_dim: int, context: int, blocks: Blocks = DEFAULT) -> int:
        """How many numbers that takes: rows · heads · parts · (value_dim + 2)."""
        return rows * heads * -(-context // blocks.part) * (value_dim + 2)


def tile_rows(heads: int, kv_heads: int, blocks: Blocks = DEFAULT) -> int:
    """Rows of a sequence that one tile holds."""
    return blocks.lanes // _span(heads // kv_heads, blocks.lanes)


def most_tiles(rows: int, sequences: int, per_tile: int) -> int:
    """Tiles that any batch of ``rows`` rows of at most ``sequences`` sequences (and a run of padding) has at most."""
    return rows // per_tile + min(rows, sequences + 1)


def tiles_of(sequence: NDArray[np.int32], per_tile: int, count: int) -> NDArray[np.int32]:
    """First row and number of rows of every tile, [count, 2]; the rest are empty. ``sequence`` [T] as the kernels get it, padding too."""
    rows = np.arange(len(sequence))
    begins = np.r_[True, sequence[1:] != sequence[:-1]] if len(sequence) else np.zeros(0, bool)
    run = np.maximum.accumulate(np.where(begins, rows, 0))
    first = np.flatnonzero((rows - run) % per_tile == 0)
    tiles = np.zeros((count, 2), np.int32)
    tiles[: len(first), 0] = first
    tiles[: len(first), 1] = np.diff(np.r_[first, len(sequence)])
    return tiles


def refusal(op: ops.Op) -> str | None:
    """Why ``attend`` cannot play the op; None where it can."""
    match op:
        case ops.Attend():
            return None
        case ops.AttendRelative():
            return "scores by learned projections of the distance have no CUDA kernel"
        case ops.AttentionMap() | ops.AttentionMapRelative():
            return "the CUDA kernel keeps no probabilities, so there is no attention map to tap"
    return f"{type(op).__name__} is no attention"


def attend(
    q: Tensor, cache: LayerCache, y: Tensor, positions: Tensor, sequence: Tensor, pages: Tensor, tiles: Tensor, *, heads: int, scale: float,
    visible: Visibility, softcap: float | None = None, slopes: Tensor | None = None, sinks: Tensor | None = None,
    parts: Parts | None = None, blocks: Blocks = DEFAULT,
) -> None:  # fmt: skip
    """y[T, H·value_dim] of q[T, H·key_dim], as ops.Attend says; both in bf16, or in float32 and then multiplied as such (slowly).

    positions and sequence int32 [T], pages int32 [S, most], tiles int32 as ``tiles_of`` makes them for ``tile_rows`` rows; rows of no
    sequence (−1) become zeros. slopes float32 [H], sinks [H]. What the rows themselves add to the cache is there already. With ``parts`` a
    tile's parts are summed side by side, and added up by a second kernel. The bits are the same."""
    group, latent = heads // cache.kv_heads, cache.values is None
    span = _span(group, blocks.lanes)
    key_dim, value_dim = cache.key_dim, y.shape[1] // heads
    wide = min(blocks.values, max(16, triton.next_power_of_2(value_dim)))
    dim, rest = _pieces(key_dim)
    mode, near, memory = _visibility(visible)
    values = cache.keys if latent else cache.values
    anything = y  # stands for pointers that are not followed
    factor = scale * math.log2(math.e) * (1.0 if softcap is None else 2.0 / softcap)
    split, chunks = parts is not None, triton.cdiv(value_dim, wide)
    grid = (tiles.shape[0], cache.kv_heads * triton.cdiv(group, span), chunks * (parts.programs if parts else 1))
    _attend[grid](
        q, cache.keys, values, _or(cache.key_scales, anything), _or(cache.key_scales if latent else cache.value_scales, anything), y,
        parts.sums if parts else anything, parts.totals if parts else anything, parts.maxima if parts else anything,
        positions, sequence, pages, tiles, _or(slopes, anything), _or(sinks, anything),
        q.stride(0), y.stride(0), pages.stride(0), heads, parts.totals.shape[2] if parts else 1, chunks, near, memory,
        factor, (softcap or 0.0) * math.log2(math.e),
        GROUP=group, SPAN=span, KV_HEADS=cache.kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        VALUE_WIDTH=key_dim if latent else value_dim, DIM=dim, REST=rest, VALUES=wide, PAGE=PAGE, KEYS=blocks.keys, PART=blocks.part,
        LANES=blocks.lanes, SCALED=cache.key_scales is not None, CAPPED=softcap is not None, SLOPES=slopes is not None,
        SINKS=sinks is not None, VISIBLE=mode, SPLIT=split, num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if parts is None:
        return
    _add_parts[len(q), heads](
        parts.sums, parts.totals, parts.maxima, y, positions, sequence, _or(sinks, anything), y.stride(0), heads, parts.totals.shape[2],
        near, memory,
        VALUE_DIM=value_dim, VALUES=max(16, triton.next_power_of_2(value_dim)), PART=blocks.part, MAXIMA=128, TOGETHER=8,
        SINKS=sinks is not None, VISIBLE=mode, enable_fp_fusion=False,
    )  # fmt: skip


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    return other if given is None else given


def _span(group: int, lanes: int) -> int:
    """Heads of a group that one tile holds: all, or equal shares of more than fit."""
    return int(triton.cdiv(group, triton.cdiv(group, lanes)))


def _pieces(dim: int) -> tuple[int, int]:
    """Two powers of two that cover ``dim`` features, the second 0 where one will do: 576 is 512 and 64, where one would be 1024."""
    whole = max(16, triton.next_power_of_2(dim))
    if whole <= 64 or dim == whole:
        return whole, 0
    rest = max(16, triton.next_power_of_2(dim - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def _visibility(visible: Visibility) -> tuple[int, int, int]:
    """VISIBLE, near and memory as ``_oldest`` takes them."""
    match visible:
        case Causal():
            return 0, 0, 0
        case SlidingWindow(size=size):
            return 1, size, 0
        case SegmentMemory(segment=segment, memory=memory):
            return 2, segment, memory
    raise UnsupportedError(f"{type(visible).__name__} has no CUDA kernel; Causal, SlidingWindow and SegmentMemory have")


@triton.jit
def _oldest(position: tensor, near: tensor, memory: tensor, VISIBLE: constexpr) -> tensor:
    """First position that a query sees; it may be below 0."""
    if VISIBLE == 1:
        return position - near + 1
    elif VISIBLE == 2:
        return position // near * near - memory
    else:
        return position * 0


@triton.jit
def _finite(maximum: tensor) -> tensor:
    """The maximum, or 0 where nothing was seen, so that no difference is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _finished(summed: tensor, total: tensor, shrunk: tensor, sink: tensor) -> tensor:
    """summed / (total + sink) where the first two are to be shrunk by a power of two; 0 where nothing was seen."""
    total = total * shrunk + sink
    return tl.where(total == 0, 0.0, summed * shrunk / total)


@triton.jit
def _scores(
    q: tensor, q_rest: tensor, keys: tensor, key_scales: tensor, at: tensor, held: tensor, factor: tensor, bound: tensor,
    KEY_DIM: constexpr, DIM: constexpr, REST: constexpr, SCALED: constexpr, CAPPED: constexpr,
) -> tensor:  # fmt: skip
    """q · k · scale of every lane and key, squashed where asked, times log2 e: [LANES, KEYS]."""
    feature = tl.arange(0, DIM)
    kept = held[:, None]
    if DIM > KEY_DIM:
        kept = kept & (feature < KEY_DIM)[None, :]
    k = tl.load(keys + at[:, None] * KEY_DIM + feature[None, :], mask=kept, other=0.0)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if REST:
        feature = DIM + tl.arange(0, REST)
        k = tl.load(keys + at[:, None] * KEY_DIM + feature[None, :], mask=held[:, None] & (feature < KEY_DIM)[None, :], other=0.0)
        scores = tl.dot(q_rest, tl.trans(k.to(q.dtype)), scores, input_precision="ieee")
    if SCALED:
        scores = scores * tl.load(key_scales + at, mask=held, other=0.0)[None, :]
    scores = scores * factor
    if CAPPED:
        scores = bound * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))  # tanh
    return scores


@triton.jit
def _attend(
    q: tensor, keys: tensor, values: tensor, key_scales: tensor, value_scales: tensor, y: tensor, sums: tensor, totals: tensor,
    maxima: tensor, positions: tensor, sequence: tensor, pages: tensor, tiles: tensor, slopes: tensor, sinks: tensor,
    q_stride: tensor, y_stride: tensor, pages_stride: tensor, heads: tensor, parts: tensor, chunks: tensor, near: tensor, memory: tensor,
    factor: tensor, bound: tensor,
    GROUP: constexpr, SPAN: constexpr, KV_HEADS: constexpr, KEY_DIM: constexpr, VALUE_DIM: constexpr,
    VALUE_WIDTH: constexpr, DIM: constexpr, REST: constexpr, VALUES: constexpr, PAGE: constexpr, KEYS: constexpr,
    PART: constexpr, LANES: constexpr, SCALED: constexpr, CAPPED: constexpr, SLOPES: constexpr, SINKS: constexpr,
    VISIBLE: constexpr, SPLIT: constexpr,
) -> None:  # fmt: skip
    """A tile, a share of a group's heads and up to VALUES features of the values: all parts, or every so manieth where SPLIT."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last rows see most: they begin first
    first = tl.load(tiles + tile * 2)
    count = tl.load(tiles + tile * 2 + 1)
    if count == 0:
        return
    owner = tl.load(sequence + first)
    shares: constexpr = (GROUP + SPAN - 1) // SPAN
    kv_head = tl.program_id(1) // shares
    chunk = tl.program_id(2) % chunks
    lane = tl.arange(0, LANES)
    in_group = tl.program_id(1) % shares * SPAN + lane % SPAN
    live = (lane // SPAN < count) & (in_group < GROUP)
    row = (first + lane // SPAN).to(tl.int64)
    head = kv_head * GROUP + in_group
    value = chunk * VALUES + tl.arange(0, VALUES)
    y_at = y + row[:, None] * y_stride + (head * VALUE_DIM)[:, None] + value[None, :]
    written = live[:, None] & (value < VALUE_DIM)[None, :]
    if owner < 0:
        if not SPLIT:
            tl.store(y_at, tl.zeros([LANES, VALUES], tl.float32).to(y.dtype.element_ty), mask=written)
        return

    position = tl.load(positions + row, mask=live, other=-1)
    sees_from = _oldest(position, near, memory, VISIBLE)
    last = tl.load(positions + first + count - 1)
    oldest = tl.maximum(_oldest(tl.load(positions + first), near, memory, VISIBLE), 0)
    feature = tl.arange(0, DIM)
    q_at = q + row * q_stride + head * KEY_DIM
    queries = tl.load(q_at[:, None] + feature[None, :], mask=live[:, None] & (feature < KEY_DIM)[None, :], other=0.0)
    rest = queries
    if REST:
        feature = DIM + tl.arange(0, REST)
        rest = tl.load(q_at[:, None] + feature[None, :], mask=live[:, None] & (feature < KEY_DIM)[None, :], other=0.0)
    if SLOPES:
        slope = tl.load(slopes + head, mask=live, other=0.0) * LOG2E

    all_sum = tl.zeros([LANES, VALUES], tl.float32)
    all_total = tl.zeros([LANES], tl.float32)
    all_maximum = tl.full([LANES], float("-inf"), tl.float32)
    step = 1
    begin = oldest // PART
    if SPLIT:
        step = tl.num_programs(2) // chunks
        begin += tl.program_id(2) // chunks
    for part in range(begin, last // PART + 1, step):
        part_sum = tl.zeros([LANES, VALUES], tl.float32)
        part_total = tl.zeros([LANES], tl.float32)
        part_maximum = tl.full([LANES], float("-inf"), tl.float32)
        # A block that no lane sees would add zeros: leaving it out changes no bit.
        for start in range(tl.maximum(part * PART, oldest // KEYS * KEYS), tl.minimum(part * PART + PART, last + 1), KEYS):
            key = start + tl.arange(0, KEYS)
            held = (key >= oldest) & (key <= last)
            page = tl.load(pages + owner.to(tl.int64) * pages_stride + key // PAGE, mask=held, other=0).to(tl.int64)
            at = (page * KV_HEADS + kv_head) * PAGE + key % PAGE
            scores = _scores(queries, rest, keys, key_scales, at, held, factor, bound, KEY_DIM, DIM, REST, SCALED, CAPPED)
            if SLOPES:
                scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
            seen = key[None, :] <= position[:, None]
            if VISIBLE:
                seen = seen & (key[None, :] >= sees_from[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            maximum = tl.maximum(part_maximum, tl.ceil(tl.max(scores, 1)))
            weights = tl.exp2(scores - _finite(maximum)[:, None])
            shrunk = tl.exp2(part_maximum - _finite(maximum))
            part_maximum = maximum
            part_total = part_total * shrunk + tl.sum(weights, 1)
            if SCALED:
                weights = weights * tl.load(value_scales + at, mask=held, other=0.0)[None, :]
            kept = held[:, None]
            if VALUE_DIM % VALUES:
                kept = kept & (value < VALUE_DIM)[None, :]
            v = tl.load(values + at[:, None] * VALUE_WIDTH + value[None, :], mask=kept, other=0.0)
            part_sum = tl.dot(weights.to(q.dtype.element_ty), v.to(q.dtype.element_ty), part_sum * shrunk[:, None], input_precision="ieee")
        if SPLIT:
            place = (row * heads + head) * parts + part
            tl.store(sums + place[:, None] * VALUE_DIM + value[None, :], part_sum, mask=written)
            if chunk == 0:
                tl.store(totals + place, part_total, mask=live)
                tl.store(maxima + place, part_maximum, mask=live)
        else:
            maximum = tl.maximum(all_maximum, part_maximum)
            shrunk = tl.exp2(all_maximum - _finite(maximum))
            part_shrunk = tl.exp2(part_maximum - _finite(maximum))
            all_maximum = maximum
            all_total = all_total * shrunk + part_total * part_shrunk
            all_sum = all_sum * shrunk[:, None] + part_sum * part_shrunk[:, None]
    if not SPLIT:
        maximum = _finite(all_maximum)
        sink = tl.zeros([LANES], tl.float32)
        if SINKS:
            given = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
            maximum = tl.maximum(maximum, tl.ceil(given))
            sink = tl.exp2(given - maximum)
        shrunk = tl.exp2(all_maximum - maximum)
        result = _finished(all_sum, all_total[:, None], shrunk[:, None], sink[:, None])
        tl.store(y_at, result.to(y.dtype.element_ty), mask=written)


@triton.jit
def _add_parts(
    sums: tensor, totals: tensor, maxima: tensor, y: tensor, positions: tensor, sequence: tensor, sinks: tensor,
    y_stride: tensor, heads: tensor, parts: tensor, near: tensor, memory: tensor,
    VALUE_DIM: constexpr, VALUES: constexpr, PART: constexpr, MAXIMA: constexpr, TOGETHER: constexpr, SINKS: constexpr,
    VISIBLE: constexpr,
) -> None:  # fmt: skip
    """A row and a head: its parts in order, as one program would have added them."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    value = tl.arange(0, VALUES)
    y_at = y + row * y_stride + head * VALUE_DIM + value
    if tl.load(sequence + row) < 0:
        tl.store(y_at, tl.zeros([VALUES], tl.float32).to(y.dtype.element_ty), mask=value < VALUE_DIM)
        return
    position = tl.load(positions + row)
    begin, end = tl.maximum(_oldest(position, near, memory, VISIBLE), 0) // PART, position // PART + 1
    place = (row * heads + head) * parts
    greatest = tl.full([MAXIMA], float("-inf"), tl.float32)
    for start in range(begin, end, MAXIMA):
        part = start + tl.arange(0, MAXIMA)
        greatest = tl.maximum(greatest, tl.load(maxima + place + part, mask=part < end, other=float("-inf")))
    maximum = tl.max(greatest, 0)
    all_sum = tl.zeros([VALUES], tl.float32)
    all_total = 0.0
    for start in range(begin, end, TOGETHER):
        for i in tl.static_range(TOGETHER):  # written out, so that loads run ahead of the sum
            part = tl.minimum(start + i, end - 1)
            shrunk = tl.exp2(tl.load(maxima + place + part) - maximum)
            shrunk = tl.where(start + i < end, shrunk, 0.0)
            all_total += tl.load(totals + place + part) * shrunk
            all_sum += tl.load(sums + (place + part) * VALUE_DIM + value, mask=value < VALUE_DIM, other=0.0) * shrunk
    highest, sink = maximum, 0.0
    if SINKS:
        given = tl.load(sinks + head).to(tl.float32) * LOG2E
        highest = tl.maximum(maximum, tl.ceil(given))
        sink = tl.exp2(given - highest)
    result = _finished(all_sum, all_total, tl.exp2(maximum - highest), sink)
    tl.store(y_at, result.to(y.dtype.element_ty), mask=value < VALUE_DIM)
