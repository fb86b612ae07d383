"""Tokens from rows of logits on the device, in the engine's own bits (``native/src/sampling.hpp`` says what a draw means, step by step).

Several programs share a row, each a part of its ids. What they hand on is a largest rank, integer sums of counts or masses, or a largest
score with its lowest id: exact in any order, so a token depends neither on how a row is cut nor on the rows beside it.

1. ``_scan``: each part's likeliest id that the mask leaves.
2. ``_search``, eight launches for top-k and eight for top-p: the rank of the last id kept, found four bits of its logit at a time by what
   each of their sixteen values holds. Ids of the very last logit are kept from the lowest up, as many as are still missing.
3. ``_draw``: each part's best score. Only ids whose noise can beat the row's likeliest id are scored.
4. ``_choose``: the best of the parts.
"""

import dataclasses
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.kernels.noise import (
    LARGEST, LOWER_HALF, SMALLEST, exp_bound, logit_of, mass_of, natural_log, noise_halves, order_of, uniform,
)  # fmt: skip

FIELDS = ("drawn", "masked", "seed", "position", "choice", "purpose", "top_k", "temperature", "top_p", "min_p")
"""Rows of ``settings`` int64 [FIELDS, R]; the last three hold the bits of float64. ``drawn`` and ``masked`` are 0 or 1."""

DRAWN, MASKED, SEED, POSITION, CHOICE, PURPOSE, TOP_K, TEMPERATURE, TOP_P, MIN_P = (constexpr(i) for i in range(len(FIELDS)))
MOST_VOCAB = 1 << 20  # ids whose masses sum exactly in int64, with room to spare

_DIGITS, _BITS = constexpr(8), constexpr(4)  # of 32 bits of a logit's order
_VALUES = constexpr(16)
_NOTHING = constexpr(0x007FFFFF)  # the order of −inf
_INFINITE = constexpr(0xFF800000)  # the order of +inf
_NO_ID = constexpr((1 << 31) - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Scratch:
    """What the kernels hand on to each other, for R rows that are each shared by ``parts`` programs; nothing of it outlives a call.

    ``ranks`` int64 and ``scores`` float64 and ``ids`` int32 [R, parts]; ``totals`` int64 [R, 2, 8, 16], ``states`` int64 [R, 2, 8, 2] and
    ``ties`` int64 [R, 2, parts, 16] of the searches for top-k and top-p."""

    ranks: Tensor
    scores: Tensor
    ids: Tensor
    totals: Tensor
    states: Tensor
    ties: Tensor

    @classmethod
    def of(cls, rows: int, parts: int, device: torch.device | str) -> Self:
        """Room for ``rows``."""
        digits, values = _DIGITS.value, _VALUES.value
        return cls(
            torch.empty(rows, parts, dtype=torch.int64, device=device), torch.empty(rows, parts, dtype=torch.float64, device=device),
            torch.empty(rows, parts, dtype=torch.int32, device=device), torch.empty(rows, 2, digits, values, dtype=torch.int64, device=device),
            torch.empty(rows, 2, digits, 2, dtype=torch.int64, device=device),
            torch.empty(rows, 2, parts, values, dtype=torch.int64, device=device),
        )  # fmt: skip


def default_parts(rows: int, vocab: int, programs: int = 264) -> int:
    """Programs that share a row: of about ``programs`` in all (two a multiprocessor of an H200), each with a thousand ids or more."""
    return max(1, min(-(-vocab // 1024), programs // max(rows, 1)))


def sample(
    logits: Tensor, masks: Tensor, settings: Tensor, tokens: Tensor, scratch: Scratch, *, top_k: bool = True, top_p: bool = True,
    block: int = 1024, warps: int = 8,
) -> None:  # fmt: skip
    """tokens int32 [R]: the engine's own token for each row of logits float32 [R, V], −1 where nothing is drawn.

    ``settings`` int64 [FIELDS, R] says how (`hasten.backends.cuda.drawing` fills it); ``masks`` int32 [R, ⌈V / 32⌉], bit i % 32 of word
    i / 32 allows id i, is read for rows with ``masked``. −1 is given where ``drawn`` is 0, where logits hold NaN or +inf, and where no id
    may come. ``top_k`` or ``top_p`` False leaves its launches out: no row of this call may ask for it. Raises ValueError for shapes that do
    not go together."""
    rows, vocab = logits.shape
    if not 1 <= vocab <= MOST_VOCAB or block & (block - 1) or block < 4:
        raise ValueError(f"rows are of 1 to {MOST_VOCAB} logits, blocks of a power of two from 4 on, not {vocab} and {block}")
    parts = scratch.ranks.shape[1]
    if settings.shape != (len(FIELDS), rows) or masks.shape != (rows, -(-vocab // 32)) or len(tokens) != rows or len(scratch.ranks) != rows:
        raise ValueError(f"settings, masks, tokens and scratch are not for {rows} rows of {vocab} logits")
    if logits.stride(1) != 1 or not masks.is_contiguous() or not settings.is_contiguous():
        raise ValueError("rows of logits are contiguous, and so are masks and settings")
    if not rows:
        return
    its = (settings, logits, masks, rows, vocab, logits.stride(0), masks.shape[1], triton.cdiv(triton.cdiv(vocab, parts), block) * block)
    wide = triton.next_power_of_2(parts)
    grid, launch = (rows, parts), {"num_warps": warps, "enable_fp_fusion": False}
    _scan[grid](*its, scratch.ranks, scratch.totals, wide, block, **launch)
    for search, asked in enumerate((top_k, top_p)):
        for digit in range(_DIGITS.value if asked else 0):
            _search[grid](
                *its, scratch.ranks, scratch.totals, scratch.states, scratch.ties, parts, search, digit, top_k, wide, block, **launch
            )
    _draw[grid](
        *its, scratch.ranks, scratch.totals, scratch.states, scratch.ties, scratch.scores, scratch.ids, parts, top_k, top_p, wide, block,
        **launch,
    )  # fmt: skip
    _choose[(rows,)](settings, scratch.ranks, scratch.scores, scratch.ids, tokens, rows, parts, wide, num_warps=1, enable_fp_fusion=False)


@triton.jit
def _setting(settings: tensor, rows: tensor, row: tensor, FIELD: constexpr) -> tensor:
    return tl.load(settings + FIELD * rows + row)


@triton.jit
def _real(settings: tensor, rows: tensor, row: tensor, FIELD: constexpr) -> tensor:
    return tl.load(settings + FIELD * rows + row).to(tl.float64, bitcast=True)


@triton.jit
def _logits(logits: tensor, masks: tensor, row: tensor, id: tensor, vocab: tensor, stride: tensor, words: tensor, masked: tensor) -> tensor:
    """A tile's logits as they came, and as the mask leaves them: −inf where it forbids, and beyond the vocabulary."""
    x = tl.load(logits + row * stride + id, mask=id < vocab, other=-float("inf"))
    word = tl.load(masks + row * words + id // 32, mask=id < tl.where(masked != 0, vocab, 0), other=-1)
    return x, tl.where(((word >> (id % 32)) & 1) != 0, x, -float("inf"))


@triton.jit
def _scan(
    settings: tensor, logits: tensor, masks: tensor, rows: tensor, vocab: tensor, stride: tensor, words: tensor, share: tensor,
    ranks: tensor, totals: tensor, WIDE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """The best rank of a part: order of the logit, then the lower id, in an int64; and zeros for the sums of the searches."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _setting(settings, rows, row, DRAWN) == 0:
        return
    if part == 0:
        sums = tl.arange(0, 2 * _DIGITS * _VALUES)
        tl.store(totals + row * (2 * _DIGITS * _VALUES) + sums, tl.zeros((2 * _DIGITS * _VALUES,), tl.int64))
    masked = _setting(settings, rows, row, MASKED)
    best = tl.full((BLOCK,), -0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(part * share, tl.minimum((part + 1) * share, vocab), BLOCK):
        id = start + tl.arange(0, BLOCK)
        came, x = _logits(logits, masks, row, id, vocab, stride, words, masked)
        order = tl.where((came != came) | (came == float("inf")), _INFINITE, order_of(x))
        rank = ((order.to(tl.int64) - 0x80000000) << 32) + (0xFFFFFFFF - id.to(tl.int64))
        best = tl.maximum(best, tl.where(id < vocab, rank, best))
    tl.store(ranks + row * tl.num_programs(1) + part, tl.max(best, axis=0))


@triton.jit
def _likeliest(ranks: tensor, row: tensor, parts: tensor, WIDE: constexpr) -> tensor:
    """Order of the row's largest logit, and its lowest id."""
    part = tl.arange(0, WIDE)
    rank = tl.max(tl.load(ranks + row * parts + part, mask=part < parts, other=-0x7FFFFFFFFFFFFFFF), axis=0)
    return ((rank >> 32) + 0x80000000).to(tl.uint32), (0xFFFFFFFF - (rank & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _scale(settings: tensor, rows: tensor, row: tensor, order: tensor) -> tensor:
    """The largest logit and 1 / temperature, float64."""
    inverse = 1.0 / _real(settings, rows, row, TEMPERATURE)
    return logit_of(order).to(tl.float64), tl.where(inverse > LARGEST, LARGEST, inverse)


@triton.jit
def _chosen(totals: tensor, row: tensor, target: tensor, SEARCH: constexpr, DIGIT: constexpr) -> tensor:
    """The digit at which sums from the largest down reach ``target``, what of it is missing there, and what there is there."""
    value, other = tl.arange(0, _VALUES), tl.arange(0, _VALUES)
    at = totals + ((row * 2 + SEARCH) * _DIGITS + DIGIT) * _VALUES
    sums = tl.load(at + value)
    reached = tl.sum(tl.where(other[None, :] >= value[:, None], tl.load(at + other)[None, :], 0), axis=1)
    digit = tl.max(tl.where(reached >= target, value, 0), axis=0)
    return digit, target - tl.sum(tl.where(value > digit, sums, 0), axis=0), tl.sum(tl.where(value == digit, sums, 0), axis=0)


@triton.jit
def _found(totals: tensor, states: tensor, row: tensor, SEARCH: constexpr) -> tensor:
    """Where a whole search ended: the order of the last logit kept, what of the target its ids still have to hold, what they hold."""
    state = states + ((row * 2 + SEARCH) * _DIGITS + _DIGITS - 1) * 2
    digit, left, there = _chosen(totals, row, tl.load(state + 1), SEARCH, _DIGITS - 1)
    return tl.load(state).to(tl.uint32) * _VALUES + digit.to(tl.uint32), left, there


@triton.jit
def _limited(settings: tensor, rows: tensor, row: tensor, vocab: tensor) -> tensor:
    """Whether top-k leaves any id out."""
    top_k = _setting(settings, rows, row, TOP_K)
    return (top_k > 0) & (top_k < vocab)


@triton.jit
def _search(
    settings: tensor, logits: tensor, masks: tensor, rows: tensor, vocab: tensor, stride: tensor, words: tensor, share: tensor,
    ranks: tensor, totals: tensor, states: tensor, ties: tensor, parts: tensor,
    SEARCH: constexpr, DIGIT: constexpr, LIMITED: constexpr, WIDE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """What the values of one digit hold, of ids whose logits begin with the digits found so far: ids (SEARCH 0) or masses (SEARCH 1)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (_setting(settings, rows, row, DRAWN) == 0) | (_real(settings, rows, row, TEMPERATURE) == 0.0):
        return
    limited = _limited(settings, rows, row, vocab)
    if SEARCH == 0:
        if limited == 0:
            return
    else:
        if _real(settings, rows, row, TOP_P) >= 1.0:
            return
    top, _ = _likeliest(ranks, row, parts, WIDE)
    largest, inverse = _scale(settings, rows, row, top)
    last = tl.full((), 0, tl.uint32)  # what top-k keeps down to
    surplus = tl.full((), 0, tl.int64)  # mass of its last logit's ids that it does not keep
    if SEARCH == 1 and LIMITED and DIGIT < 2:
        if limited:
            last, left, there = _found(totals, states, row, 0)
            surplus = (there - left) * mass_of((logit_of(last).to(tl.float64) - largest) * inverse)
    prefix = tl.full((), 0, tl.int64)
    if DIGIT > 0:
        if DIGIT > 1:
            state = states + ((row * 2 + SEARCH) * _DIGITS + DIGIT - 1) * 2
            prefix, target = tl.load(state), tl.load(state + 1)
        elif SEARCH == 0:
            target = _setting(settings, rows, row, TOP_K)
        else:
            value = tl.arange(0, _VALUES)
            whole = tl.sum(tl.load(totals + (row * 2 + SEARCH) * _DIGITS * _VALUES + value), axis=0) - surplus
            share_of = tl.ceil(_real(settings, rows, row, TOP_P) * whole.to(tl.float64))
            target = tl.maximum(tl.where(share_of >= whole.to(tl.float64), whole, share_of.to(tl.int64)), 1)
        digit, left, _ = _chosen(totals, row, target, SEARCH, DIGIT - 1)
        prefix = prefix * _VALUES + digit
        if part == 0:
            state = states + ((row * 2 + SEARCH) * _DIGITS + DIGIT) * 2
            tl.store(state, prefix)
            tl.store(state + 1, left)
    masked = _setting(settings, rows, row, MASKED)
    value = tl.arange(0, _VALUES)
    sums = tl.zeros((_VALUES,), tl.int64)
    for start in range(part * share, tl.minimum((part + 1) * share, vocab), BLOCK):
        id = start + tl.arange(0, BLOCK)
        _, x = _logits(logits, masks, row, id, vocab, stride, words, masked)
        order = order_of(x)
        counted = (id < vocab) & (order >= last)
        if DIGIT > 0:
            counted &= (order >> (32 - _BITS * DIGIT)) == prefix.to(tl.uint32)
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            if SEARCH == 0:
                weight = counted.to(tl.int64)
            else:
                weight = tl.where(counted, mass_of((x.to(tl.float64) - largest) * inverse), 0)
            digits = ((order >> (32 - _BITS * (DIGIT + 1))) & (_VALUES - 1)).to(tl.int32)
            sums += tl.sum(tl.where(digits[:, None] == value[None, :], weight[:, None], 0), axis=0)
    tl.atomic_add(totals + ((row * 2 + SEARCH) * _DIGITS + DIGIT) * _VALUES + value, sums, mask=sums > 0, sem="relaxed")
    if DIGIT == _DIGITS - 1:
        tl.store(ties + ((row * 2 + SEARCH) * parts + part) * _VALUES + value, sums)


@triton.jit
def _draw(
    settings: tensor, logits: tensor, masks: tensor, rows: tensor, vocab: tensor, stride: tensor, words: tensor, share: tensor,
    ranks: tensor, totals: tensor, states: tensor, ties: tensor, scores: tensor, ids: tensor, parts: tensor,
    LIMITED: constexpr, NUCLEUS: constexpr, WIDE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """The best score of a part and its lowest id; of ids that are kept and whose noise may beat the row's likeliest id."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (_setting(settings, rows, row, DRAWN) == 0) | (_real(settings, rows, row, TEMPERATURE) == 0.0):
        return
    most, likeliest = _likeliest(ranks, row, parts, WIDE)
    largest, inverse = _scale(settings, rows, row, most)
    seed, position = _setting(settings, rows, row, SEED), _setting(settings, rows, row, POSITION)
    choice, purpose = _setting(settings, rows, row, CHOICE), _setting(settings, rows, row, PURPOSE)
    min_p = _real(settings, rows, row, MIN_P)
    least = tl.where(min_p > 0.0, natural_log(tl.maximum(min_p, SMALLEST)), -LARGEST)

    # Ids above `last` are kept, and of those at it the lowest `tied`; `before` of them lie in earlier parts.
    last, tied, before = tl.full((), _NOTHING, tl.uint32), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    earlier, column = tl.arange(0, WIDE), ties + row * 2 * parts * _VALUES
    if LIMITED:
        if _limited(settings, rows, row, vocab):
            last, tied, _ = _found(totals, states, row, 0)
            digit = (last & (_VALUES - 1)).to(tl.int32)
            before = tl.sum(tl.load(column + earlier * _VALUES + digit, mask=earlier < part, other=0), axis=0)
    if NUCLEUS:
        if _real(settings, rows, row, TOP_P) < 1.0:
            last, left, _ = _found(totals, states, row, 1)
            mass = tl.maximum(mass_of((logit_of(last).to(tl.float64) - largest) * inverse), 1)
            digit = (last & (_VALUES - 1)).to(tl.int32)
            tied = (left + mass - 1) // mass
            before = tl.sum(tl.load(column + (parts + earlier) * _VALUES + digit, mask=earlier < part, other=0), axis=0) // mass

    four, place = tl.arange(0, 4), likeliest % 4
    noise = uniform(
        noise_halves(seed, position, choice, purpose, likeliest - place, 0, 4),
        noise_halves(seed, position, choice, purpose, likeliest - place, LOWER_HALF, 4),
    )
    its = tl.sum(tl.where(four == place, -natural_log(-natural_log(1.0 - noise)), 0.0), axis=0)

    masked = _setting(settings, rows, row, MASKED)
    best, winner = tl.full((BLOCK,), -float("inf"), tl.float64), tl.full((BLOCK,), _NO_ID, tl.int32)
    for start in range(part * share, tl.minimum((part + 1) * share, vocab), BLOCK):
        id = start + tl.arange(0, BLOCK)
        _, x = _logits(logits, masks, row, id, vocab, stride, words, masked)
        order = order_of(x)
        weight = (x.to(tl.float64) - largest) * inverse
        at_last = ((order == last) & (id < vocab)).to(tl.int64)
        kept = (order > last) | ((at_last > 0) & (before + tl.cumsum(at_last, axis=0) <= tied))
        kept &= (order > _NOTHING) & (weight >= least)
        before += tl.sum(at_last, axis=0)
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            upper = noise_halves(seed, position, choice, purpose, start, 0, BLOCK)
            may = kept & (upper.to(tl.float64) * 2.0**-32 <= exp_bound(tl.where(kept, weight, 0.0) - its))
            if tl.max(may.to(tl.int32), axis=0) > 0:
                lower = noise_halves(seed, position, choice, purpose, start, LOWER_HALF, BLOCK)
                score = weight - natural_log(-natural_log(1.0 - uniform(upper, lower)))
                better = may & (score > best)
                best, winner = tl.where(better, score, best), tl.where(better, id, winner)
    top = tl.max(best, axis=0)
    tl.store(scores + row * parts + part, top)
    tl.store(ids + row * parts + part, tl.min(tl.where(best == top, winner, _NO_ID), axis=0))


@triton.jit
def _choose(
    settings: tensor, ranks: tensor, scores: tensor, ids: tensor, tokens: tensor, rows: tensor, parts: tensor, WIDE: constexpr
) -> None:
    """The token of a row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.full((), -1, tl.int32)
    if _setting(settings, rows, row, DRAWN) != 0:
        order, likeliest = _likeliest(ranks, row, parts, WIDE)
        if (order > _NOTHING) & (order < _INFINITE):
            token = likeliest
            if _real(settings, rows, row, TEMPERATURE) > 0.0:
                part = tl.arange(0, WIDE)
                score = tl.load(scores + row * parts + part, mask=part < parts, other=-float("inf"))
                best = score == tl.max(score, axis=0)
                token = tl.min(tl.where(best, tl.load(ids + row * parts + part, mask=part < parts, other=_NO_ID), _NO_ID), axis=0)
    tl.store(tokens + row, token)
