"""The paged cache: rows turned and written to it in one pass (ops.Rotate, ops.AppendKv), and pages moved between places.

Page p of a sequence holds its positions 16·p to 16·p + 15; ``pages`` [S, most] says where in the pool it lies. What is written is to the
bit what ``hasten.formats.cache`` says: rows rounded to bf16, or to one byte an element with a scale a row, which is a float16's value
kept in float32."""

import dataclasses
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.base.errors import ConfigError
from hasten.formats.cache import LEAST_SCALE, MOST_SCALE, ROW_FORMATS, ScaledRows

PAGE = 16
"""Tokens of a page."""

_LEAST, _MOST = constexpr(LEAST_SCALE), constexpr(MOST_SCALE)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclasses.dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's pages: keys [pages, K, 16, key_dim], values [pages, K, 16, value_dim] (None in a latent group, whose one head's keys are
    its values), and where they are kept in a byte an element key_scales and value_scales [pages, K, 16] float32."""

    keys: Tensor
    values: Tensor | None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.keys.shape[1]

    @property
    def key_dim(self) -> int:
        """Features of a key."""
        return self.keys.shape[3]


@dataclasses.dataclass(frozen=True, slots=True)
class GroupCache:
    """A state group's pages, the layers in front: the same tensors with [layers, …]."""

    keys: Tensor
    values: Tensor | None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @staticmethod
    def of(layers: int, pages: int, kv_heads: int, key_dim: int, value_dim: int | None, form: str, device: torch.device) -> "GroupCache":
        """Zeros in the format ``form``, one of float32, bfloat16, int8 and fp8; a latent group has no value_dim. Raises ConfigError."""
        if form not in _DTYPES:
            raise ConfigError(f"cache format {form!r} has no CUDA kernel; accepted are {', '.join(_DTYPES)}")
        rows = (layers, pages, kv_heads, PAGE)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        scaled = isinstance(ROW_FORMATS[form], ScaledRows)
        return GroupCache(
            zeros((*rows, key_dim), _DTYPES[form]),
            None if value_dim is None else zeros((*rows, value_dim), _DTYPES[form]),
            zeros(rows, torch.float32) if scaled else None,
            zeros(rows, torch.float32) if scaled and value_dim is not None else None,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those there are."""
        return tuple(x for x in (self.keys, self.values, self.key_scales, self.value_scales) if x is not None)

    def layer(self, slot: int) -> LayerCache:
        """Layer ``slot``, over the same memory."""
        values, key_scales, value_scales = (None if x is None else x[slot] for x in (self.values, self.key_scales, self.value_scales))
        return LayerCache(self.keys[slot], values, key_scales, value_scales)


class Paged(Protocol):
    """What has pages that ``move_pages`` moves: a group's keys and values here, its recurrent state in ``states``."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors [layers, pages, …], contiguous."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """Which features of a head are turned, as ops.Rotate says. cosines and sines float32 [T, dims / 2], by ``rotary_tables``."""

    cosines: Tensor
    sines: Tensor
    start: int = 0
    interleaved: bool = False


def rotary_tables(
    positions: Tensor, frequencies: Tensor, cosines: Tensor, sines: Tensor, *, magnitude: float = 1.0, rows: int = 16
) -> None:
    """cosines and sines [T, n] float32 of positions int32 [T] times frequencies float32 [n], times ``magnitude``. Once a step: every layer
    and every head turns by the same."""
    count, pairs = cosines.shape
    block = triton.next_power_of_2(pairs)
    _rotary_tables[(triton.cdiv(count, rows),)](
        positions, frequencies, cosines, sines, count, magnitude, PAIRS=pairs, BLOCK=block, ROWS=rows, enable_fp_fusion=False
    )


def rotate(x: Tensor, y: Tensor, turn: Turn, sequence: Tensor, *, heads: int, rows: int = 8) -> None:
    """y of x, both [T, H·d] of one dtype (rows may lie apart, as slices of wider ones do; y is not x): ops.Rotate. Computed in float32 and
    rounded once. Rows of no sequence become zeros."""
    _launch(x, None, None, y, turn, None, None, sequence, None, heads, rows)


def append(k: Tensor, v: Tensor | None, cache: LayerCache, positions: Tensor, sequence: Tensor, pages: Tensor, *, rows: int = 8) -> None:
    """k[T, K·key_dim] and v[T, K·value_dim] go to their places in the cache: ops.AppendKv. Rows of no sequence go nowhere.

    positions and sequence int32 [T], pages int32 [S, most]."""
    _launch(None, k, v, None, None, cache, positions, sequence, pages, 0, rows)


def rotate_append(
    q: Tensor, k: Tensor, v: Tensor | None, y: Tensor, turn: Turn, cache: LayerCache, positions: Tensor, sequence: Tensor, pages: Tensor, *,
    heads: int, rows: int = 8,
) -> None:  # fmt: skip
    """``rotate`` of q into y, and of k on its way to the cache, and ``append`` of k and v, to the same bits in one launch.

    q and y [T, H·key_dim], the rest as there."""
    _launch(q, k, v, y, turn, cache, positions, sequence, pages, heads, rows)


def _launch(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, y: Tensor | None, turn: Turn | None, cache: LayerCache | None,
    positions: Tensor | None, sequence: Tensor, pages: Tensor | None, heads: int, rows: int,
) -> None:  # fmt: skip
    dims = 2 * turn.cosines.shape[1] if turn else 0
    kv_heads = cache.kv_heads if cache else 0
    key_dim = cache.key_dim if cache else (q.shape[1] // heads if q is not None else 0)
    value_dim = v.shape[1] // kv_heads if v is not None else 0
    scaled = cache is not None and cache.key_scales is not None
    largest = ROW_FORMATS["int8" if cache.keys.dtype == torch.int8 else "fp8"] if cache is not None and scaled else None

    def given(*candidates: Tensor | None) -> Tensor:  # the last stands for a pointer that is not followed
        return next(x for x in (*candidates, sequence) if x is not None)

    grid = (triton.cdiv(len(sequence), rows), heads + kv_heads * (1 if v is None else 2))
    _rotate_append[grid](
        given(q), given(k), given(v), given(y), given(turn.cosines if turn else None), given(turn.sines if turn else None),
        *(given(x) for x in ((cache.keys, cache.values, cache.key_scales, cache.value_scales) if cache else (None,) * 4)),
        given(positions), sequence, given(pages), len(sequence),
        given(q).stride(0), given(k).stride(0), given(v).stride(0), given(y).stride(0), given(pages).stride(0), turn.start if turn else 0,
        HEADS=heads, KV_HEADS=kv_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, DIMS=dims, INTERLEAVED=bool(turn and turn.interleaved),
        LARGEST=largest.largest if isinstance(largest, ScaledRows) else 0.0, PAGE=PAGE,
        BLOCK=triton.next_power_of_2(max(key_dim, value_dim)), ROWS=rows, enable_fp_fusion=False,
    )  # fmt: skip


def move_pages(pool: Paged, outside: Paged | None, moves: Tensor, *, words: int = 1024) -> None:
    """Copies whole pages of all layers, one move after the other. moves int32 [count, 2]: from page, to page; −1 for none.

    Pages of ``outside`` (pinned memory of the host, or any other place of the same shape but for the count) are numbered behind those of
    the pool, so that the same list copies, swaps out and swaps in."""
    outside = outside or pool
    for here, there in zip(pool.tensors, outside.tensors, strict=True):
        word = torch.int64 if here[0, 0].nbytes % 8 == 0 else torch.int32
        inside, other = (x.flatten(2).view(word) for x in (here, there))
        layers, pages, size = inside.shape
        if size:
            grid = (layers, triton.cdiv(size, words))
            _move_pages[grid](inside, other, moves, len(moves), pages, other.shape[1], size, WORDS=words)


@triton.jit
def _rotary_tables(
    positions: tensor, frequencies: tensor, cosines: tensor, sines: tensor, count: tensor, magnitude: tensor,
    PAIRS: constexpr, BLOCK: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, BLOCK)
    kept = (row < count)[:, None] & (pair < PAIRS)[None, :]
    position = tl.load(positions + row, mask=row < count, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(frequencies + pair, mask=pair < PAIRS, other=0.0)[None, :]
    at = row[:, None] * PAIRS + pair[None, :]
    tl.store(cosines + at, tl.cos(angle) * magnitude, mask=kept)
    tl.store(sines + at, tl.sin(angle) * magnitude, mask=kept)


@triton.jit
def _turned(
    x: tensor, row: tensor, kept: tensor, cosines: tensor, sines: tensor, start: tensor,
    DIM: constexpr, DIMS: constexpr, INTERLEAVED: constexpr, BLOCK: constexpr,
) -> tensor:  # fmt: skip
    """A head's features with the DIMS from ``start`` turned, [ROWS, BLOCK] of x's dtype. x [ROWS, 1] points to the heads."""
    feature = tl.arange(0, BLOCK)
    there = kept[:, None] & (feature < DIM)[None, :]
    plain = tl.load(x + feature[None, :], mask=there, other=0.0)
    if DIMS == 0:
        return plain
    else:
        half: constexpr = DIMS // 2
        i = feature - start
        if INTERLEAVED:
            second = i % 2 == 1
            partner = tl.where(second, feature - 1, feature + 1)
            pair = i // 2
        else:
            second = i >= half
            partner = tl.where(second, feature - half, feature + half)
            pair = i % half
        turned = there & ((i >= 0) & (i < DIMS))[None, :]
        other = tl.load(x + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        at = row[:, None] * half + pair[None, :]
        cosine = tl.load(cosines + at, mask=turned, other=1.0)
        sine = tl.load(sines + at, mask=turned, other=0.0)
        result = plain.to(tl.float32) * cosine + tl.where(second[None, :], other, -other) * sine
        return tl.where(turned, result.to(x.dtype.element_ty), plain)


@triton.jit
def _write(
    rows: tensor, cache: tensor, scales: tensor, at: tensor, kept: tensor, DIM: constexpr, LARGEST: constexpr, BLOCK: constexpr
) -> None:
    """rows [ROWS, BLOCK] become rows ``at`` of the cache, in its format: formats.cache.ScaledRows where LARGEST says so."""
    feature = tl.arange(0, BLOCK)
    there = kept[:, None] & (feature < DIM)[None, :]
    place = cache + at[:, None] * DIM + feature[None, :]
    if LARGEST == 0:
        tl.store(place, rows.to(cache.dtype.element_ty), mask=there)
    else:
        exact = rows.to(tl.float32)
        sane = (exact == exact) & (tl.abs(exact) != float("inf"))
        finite = tl.min(sane.to(tl.int32), 1) == 1
        exact = tl.where(finite[:, None], exact, 0.0)
        most = tl.max(tl.abs(exact), 1)
        wanted = tl.div_rn(most, tl.zeros_like(most) + LARGEST)
        wanted = tl.minimum(tl.maximum(wanted, _LEAST), _MOST)
        near = wanted.to(tl.float16)
        bits = near.to(tl.int16, bitcast=True) + (near.to(tl.float32) < wanted).to(tl.int16)  # the next float16 where this is below
        scale = bits.to(tl.float16, bitcast=True).to(tl.float32)
        ratio = tl.div_rn(exact, tl.broadcast_to(scale[:, None], exact.shape))
        ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
        step = tl.zeros_like(ratio) + 1.0
        if cache.dtype.element_ty != tl.int8:  # e4m3 has steps of 2^(exponent − 3), of 2⁻⁹ at least
            exponent = tl.maximum((ratio.to(tl.int32, bitcast=True) >> 23) & 255, 121)
            step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        steps = (tl.div_rn(ratio, step) + 12582912.0) - 12582912.0  # 1.5 · 2²³: to a whole number, half to even
        ratio = steps * step
        tl.store(place, ratio.to(cache.dtype.element_ty), mask=there)
        tl.store(scales + at, tl.where(finite, scale, float("nan")), mask=kept)


@triton.jit
def _rotate_append(
    q: tensor, k: tensor, v: tensor, y: tensor, cosines: tensor, sines: tensor, keys: tensor, values: tensor, key_scales: tensor,
    value_scales: tensor, positions: tensor, sequence: tensor, pages: tensor, count: tensor,
    q_stride: tensor, k_stride: tensor, v_stride: tensor, y_stride: tensor, pages_stride: tensor, start: tensor,
    HEADS: constexpr, KV_HEADS: constexpr, KEY_DIM: constexpr, VALUE_DIM: constexpr, DIMS: constexpr,
    INTERLEAVED: constexpr, LARGEST: constexpr, PAGE: constexpr, BLOCK: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    """ROWS rows of one head: HEADS of queries, then KV_HEADS of keys, then as many of values where there are any."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    owner = tl.load(sequence + row, mask=row < count, other=-1)
    kept = owner >= 0
    if head < HEADS:
        turned = _turned(q + row[:, None] * q_stride + head * KEY_DIM, row, kept, cosines, sines, start, KEY_DIM, DIMS, INTERLEAVED, BLOCK)
        feature = tl.arange(0, BLOCK)
        whole = (row < count)[:, None] & (feature < KEY_DIM)[None, :]
        tl.store(y + row[:, None] * y_stride + head * KEY_DIM + feature[None, :], turned, mask=whole)
    elif KV_HEADS:
        position = tl.load(positions + row, mask=kept, other=0)
        page = tl.load(pages + owner.to(tl.int64) * pages_stride + position // PAGE, mask=kept, other=0).to(tl.int64)
        kv_head = (head - HEADS) % KV_HEADS
        at = (page * KV_HEADS + kv_head) * PAGE + position % PAGE
        if head < HEADS + KV_HEADS:
            key_at = k + row[:, None] * k_stride + kv_head * KEY_DIM
            turned = _turned(key_at, row, kept, cosines, sines, start, KEY_DIM, DIMS, INTERLEAVED, BLOCK)
            _write(turned, keys, key_scales, at, kept, KEY_DIM, LARGEST, BLOCK)
        elif VALUE_DIM:
            value_at = v + row[:, None] * v_stride + kv_head * VALUE_DIM
            plain = _turned(value_at, row, kept, cosines, sines, start, VALUE_DIM, 0, INTERLEAVED, BLOCK)
            _write(plain, values, value_scales, at, kept, VALUE_DIM, LARGEST, BLOCK)


@triton.jit(do_not_specialize=["count"])
def _move_pages(
    here: tensor, other: tensor, moves: tensor, count: tensor, pages: tensor, others: tensor, size: tensor,
    WORDS: constexpr,
) -> None:  # fmt: skip
    """One layer's WORDS words of a page, of every move in order: nobody else reads or writes them, so moves may build on one another."""
    layer = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    for i in range(count):
        source, target = tl.load(moves + 2 * i), tl.load(moves + 2 * i + 1)
        if source >= 0:
            if source < pages:
                words = tl.load(here + (layer * pages + source) * size + word, mask=word < size)
            else:
                words = tl.load(other + (layer * others + source - pages) * size + word, mask=word < size)
            if target < pages:
                tl.store(here + (layer * pages + target) * size + word, words, mask=word < size)
            else:
                tl.store(other + (layer * others + target - pages) * size + word, words, mask=word < size)
        tl.debug_barrier()
