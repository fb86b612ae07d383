"""Tokens from rows of logits on the device, in the engine's own bits (``native/src/sampling.hpp`` says what a draw means, step by step).

Several programs share a row, each a part of its ids. What they hand on is a largest rank, integer sums of counts or masses, or a largest
score with its lowest id: exact in any order, so a token depends neither on how a row is cut nor on the rows beside it. Nothing else rounds
but float64 additions, multiplications and divisions in the engine's order (noise.py): no device may differ, not by a last bit.

1. ``_rank``: each part's likeliest id that the mask leaves, after bias and penalties.
2. ``_search``, eight launches for top-k and eight for top-p: the last logit kept, found four bits at a time by what each of their sixteen
   values holds. Of the ids that share it the lowest are kept, as many as are still missing.
3. ``_draw``: each part's best score. Only ids whose noise can beat the row's likeliest id are scored.
4. ``_choose``: the best of the parts, which the request's history then holds.
"""

import dataclasses
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from hasten.backends.cuda.drawing import DRAWN, FIELDS, MOST_VOCAB
from hasten.backends.cuda.kernels.history import History, changed, note
from hasten.backends.cuda.kernels.noise import LARGEST, LOWER_HALF, exp_bound, gumbel, logit_of, mass_of, natural_log, noise_words, order_of

KIND, MASKED, SLOT, SEED, POSITION, CHOICE, PURPOSE, TOP_K, TOP_P, MIN_P, INVERSE, REPETITION, PRESENCE, FREQUENCY = (
    constexpr(i) for i in range(len(FIELDS))
)
_DRAWN = constexpr(DRAWN)
_NOTHING = constexpr(0x007FFFFF)  # the order of −inf
_INFINITE = constexpr(0xFF800000)  # the order of +inf
_NO_ID = constexpr((1 << 31) - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Scratch:
    """What the kernels hand on to each other, for R rows that are each shared by ``parts`` programs; nothing of it outlives a call.

    ``ranks`` int64, ``scores`` float64 and ``ids`` int32 [R, parts]; ``totals`` int64 [R, 2, digits, values], ``states`` int64
    [R, 2, digits, 2] and ``ties`` int64 [R, 2, parts, values] of the searches for top-k and top-p, where digits are 32 / log₂ values."""

    ranks: Tensor
    scores: Tensor
    ids: Tensor
    totals: Tensor
    states: Tensor
    ties: Tensor

    @classmethod
    def of(cls, rows: int, parts: int, device: torch.device | str, *, bits: int = 4) -> Self:
        """Room for ``rows``; searches go by ``bits`` at a time, a power of two: more take fewer launches of more work each."""
        digits, values = 32 // bits, 1 << bits
        ranks, scores = (torch.empty(rows, parts, dtype=dtype, device=device) for dtype in (torch.int64, torch.float64))
        ids = torch.empty(rows, parts, dtype=torch.int32, device=device)
        sums = ((rows, 2, digits, values), (rows, 2, digits, 2), (rows, 2, parts, values))
        return cls(ranks, scores, ids, *(torch.empty(shape, dtype=torch.int64, device=device) for shape in sums))

    def first(self, rows: int) -> Self:
        """Of these, for so many rows."""
        return type(self)(*(each[:rows] for each in self._all))

    @property
    def nbytes(self) -> int:
        """All together."""
        return sum(each.nbytes for each in self._all)

    @property
    def _all(self) -> tuple[Tensor, ...]:
        return self.ranks, self.scores, self.ids, self.totals, self.states, self.ties


def default_parts(rows: int, vocab: int, programs: int = 264) -> int:
    """Programs that share a row: of about ``programs`` in all (two a multiprocessor of an H200), each with a thousand ids or more."""
    return max(1, min(-(-vocab // 1024), programs // max(rows, 1)))


def sample(
    logits: Tensor, masks: Tensor, settings: Tensor, tokens: Tensor, scratch: Scratch, history: History | None = None, *,
    top_k: bool = True, top_p: bool = True, block: int = 1024, warps: int = 8,
) -> None:  # fmt: skip
    """tokens int32 [R]: the engine's own token for each row of logits float32 [R, V], −1 where nothing is drawn.

    ``settings`` int64 [FIELDS, R] says how (`hasten.backends.cuda.drawing` fills it); ``masks`` int32 [R, ⌈V / 32⌉], bit i % 32 of word
    i / 32 allows id i, is read for rows with ``masked``. −1 is given where ``kind`` is 0, where logits hold NaN or +inf, and where no id
    may come. Rows with a slot of ``history``, no two the same one, have their logits changed by it and their token noted there.
    ``top_k`` or ``top_p`` False leaves its launches out: no row of this call asks for it then. Raises ValueError for shapes that do not
    go together."""
    rows, vocab = logits.shape
    if not 1 <= vocab <= MOST_VOCAB or block & (block - 1) or block < 4:
        raise ValueError(f"rows are of 1 to {MOST_VOCAB} logits, blocks of a power of two from 4 on, not {vocab} and {block}")
    parts, digits, values = scratch.ranks.shape[1], *scratch.totals.shape[2:]
    if settings.shape != (len(FIELDS), rows) or masks.shape != (rows, -(-vocab // 32)) or len(tokens) != rows or len(scratch.ranks) != rows:
        raise ValueError(f"settings, masks, tokens and scratch are not for {rows} rows of {vocab} logits")
    if logits.stride(1) != 1 or not masks.is_contiguous() or not settings.is_contiguous():
        raise ValueError("rows of logits are contiguous, and so are masks and settings")
    if history is not None and (history.words.shape[1] != vocab or not history.words.is_contiguous()):
        raise ValueError(f"a history of {history.words.shape[1]} ids is not for rows of {vocab} logits")
    if not rows:
        return
    words, biases = (None, None) if history is None else (history.words, history.biases)
    share = triton.cdiv(triton.cdiv(vocab, parts), block) * block
    its = (settings, logits, masks, words, biases, rows, vocab, logits.stride(0), masks.shape[1], share)
    wide, bits = triton.next_power_of_2(parts), 32 // digits
    grid, launch = (rows, parts), {"num_warps": warps, "enable_fp_fusion": False}
    _rank[grid](*its, scratch.ranks, scratch.totals, 2 * digits * values, block, **launch)
    for search, asked in enumerate((top_k, top_p)):
        for digit in range(digits if asked else 0):
            _search[grid](
                *its, scratch.ranks, scratch.totals, scratch.states, scratch.ties, parts, digit, search, top_k, bits, wide, block,
                **launch,
            )  # fmt: skip
    _draw[grid](
        *its, scratch.ranks, scratch.totals, scratch.states, scratch.ties, scratch.scores, scratch.ids, parts, top_k, top_p, bits,
        wide, block, **launch,
    )  # fmt: skip
    _choose[(rows,)](
        settings, scratch.ranks, scratch.scores, scratch.ids, tokens, words, rows, vocab, parts, wide, num_warps=1, enable_fp_fusion=False
    )


def feed(tokens: Tensor, drawn: Tensor) -> None:
    """tokens int32 [T]: −2 − i becomes drawn[i]; all others stay. ``drawn`` int32 [R] is what `sample` gave."""
    _feed[(triton.cdiv(len(tokens), 128),)](tokens, drawn, len(tokens), len(drawn), 128, num_warps=1)


@triton.jit
def _feed(tokens: tensor, drawn: tensor, count: tensor, rows: tensor, BLOCK: constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + at, mask=at < count, other=0)
    row = -2 - token
    due = (row >= 0) & (row < rows)
    tl.store(tokens + at, tl.load(drawn + row, mask=due, other=0), mask=due)


@triton.jit
def _logits(
    settings: tensor, logits: tensor, masks: tensor, seen: tensor, biases: tensor, rows: tensor, row: tensor, id: tensor, vocab: tensor,
    stride: tensor, words: tensor,
) -> tensor:  # fmt: skip
    """A tile's logits as they came, and as they rank: −inf where the mask forbids and beyond the vocabulary, with bias and penalties."""
    came = tl.load(logits + row * stride + id, mask=id < vocab, other=-float("inf"))
    masked = tl.load(settings + MASKED * rows + row)
    word = tl.load(masks + row * words + id // 32, mask=id < tl.where(masked != 0, vocab, 0), other=-1)
    x = tl.where(((word >> (id % 32)) & 1) != 0, came, -float("inf"))
    if seen is not None:
        repetition = tl.load(settings + REPETITION * rows + row).to(tl.float64, bitcast=True)
        presence = tl.load(settings + PRESENCE * rows + row).to(tl.float64, bitcast=True)
        frequency = tl.load(settings + FREQUENCY * rows + row).to(tl.float64, bitcast=True)
        x = changed(x, seen, biases, tl.load(settings + SLOT * rows + row), id, vocab, repetition, presence, frequency)
    return came, x


@triton.jit
def _rank(
    settings: tensor, logits: tensor, masks: tensor, seen: tensor, biases: tensor, rows: tensor, vocab: tensor, stride: tensor,
    words: tensor, share: tensor,
    ranks: tensor, totals: tensor, SUMS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """The best rank of a part: order of the logit, then the lower id, in an int64; and zeros for the sums of the searches."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(settings + KIND * rows + row) == 0:
        return
    if part == 0:
        tl.store(totals + row * SUMS + tl.arange(0, SUMS), tl.zeros((SUMS,), tl.int64))
    best = tl.full((BLOCK,), -0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(part * share, tl.minimum((part + 1) * share, vocab), BLOCK):
        id = start + tl.arange(0, BLOCK)
        came, x = _logits(settings, logits, masks, seen, biases, rows, row, id, vocab, stride, words)
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
def _chosen(sums_at: tensor, target: tensor, BITS: constexpr) -> tensor:
    """The digit at which sums from the largest down reach ``target``, what of it is missing there, and what there is there."""
    value, other = tl.arange(0, 1 << BITS), tl.arange(0, 1 << BITS)
    sums = tl.load(sums_at + value)
    reached = tl.sum(tl.where(other[None, :] >= value[:, None], tl.load(sums_at + other)[None, :], 0), axis=1)
    digit = tl.max(tl.where(reached >= target, value, 0), axis=0)
    return digit, target - tl.sum(tl.where(value > digit, sums, 0), axis=0), tl.sum(tl.where(value == digit, sums, 0), axis=0)


@triton.jit
def _found(totals: tensor, states: tensor, row: tensor, SEARCH: constexpr, BITS: constexpr) -> tensor:
    """Where a whole search ended: the order of the last logit kept, what of the target its ids still have to hold, what they hold."""
    end = (row * 2 + SEARCH + 1) * (32 // BITS) - 1
    digit, left, there = _chosen(totals + (end << BITS), tl.load(states + end * 2 + 1), BITS)
    return ((tl.load(states + end * 2) << BITS) | digit).to(tl.uint32), left, there


@triton.jit(do_not_specialize=["digit"])
def _search(
    settings: tensor, logits: tensor, masks: tensor, seen: tensor, biases: tensor, rows: tensor, vocab: tensor, stride: tensor,
    words: tensor, share: tensor,
    ranks: tensor, totals: tensor, states: tensor, ties: tensor, parts: tensor, digit: tensor,
    SEARCH: constexpr, LIMITED: constexpr, BITS: constexpr, WIDE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """What the values of one digit hold, of ids whose logits begin with the digits found so far: ids (SEARCH 0) or masses (SEARCH 1)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top_k = tl.load(settings + TOP_K * rows + row)
    if SEARCH == 0:
        if top_k == 0:
            return
    else:
        top_p = tl.load(settings + TOP_P * rows + row).to(tl.float64, bitcast=True)
        if top_p >= 1.0:
            return
        inverse = tl.load(settings + INVERSE * rows + row).to(tl.float64, bitcast=True)
        top, likeliest = _likeliest(ranks, row, parts, WIDE)
        largest = logit_of(top).to(tl.float64)
    at = (row * 2 + SEARCH) * (32 // BITS) + digit
    value, sums = tl.arange(0, 1 << BITS), tl.zeros((1 << BITS,), tl.int64)

    last = tl.full((), 0, tl.uint32)  # what top-k keeps down to
    surplus = tl.full((), 0, tl.int64)  # mass of its last logit's ids that it does not keep
    if SEARCH == 1 and LIMITED:
        limited = (top_k > 0) & (digit < 2)
        if limited:
            last, kept, there = _found(totals, states, row, 0, BITS)
            surplus = (there - kept) * mass_of((logit_of(last).to(tl.float64) - largest) * inverse)

    prefix, target = tl.full((), 0, tl.int64), top_k
    if digit > 0:
        if digit > 1:
            prefix, target = tl.load(states + (at - 1) * 2), tl.load(states + (at - 1) * 2 + 1)
        elif SEARCH == 1:
            whole = tl.sum(tl.load(totals + ((at - 1) << BITS) + value), axis=0) - surplus
            share_of_it = tl.ceil(top_p * whole.to(tl.float64))
            target = tl.where(share_of_it >= whole.to(tl.float64), whole, tl.maximum(share_of_it.to(tl.int64), 1))
        found, left, held = _chosen(totals + ((at - 1) << BITS), target, BITS)
        prefix = (prefix << BITS) | found
        if part == 0:
            tl.store(states + at * 2, prefix)
            tl.store(states + at * 2 + 1, left)

    beyond = 32 - BITS * digit
    for start in range(part * share, tl.minimum((part + 1) * share, vocab), BLOCK):
        id = start + tl.arange(0, BLOCK)
        came, x = _logits(settings, logits, masks, seen, biases, rows, row, id, vocab, stride, words)
        order = order_of(x)
        long = order.to(tl.int64)
        counted = (id < vocab) & (order >= last) & ((long >> beyond) == prefix)
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            if SEARCH == 0:
                weight = counted.to(tl.int64)
            else:
                weight = tl.where(counted, mass_of((x.to(tl.float64) - largest) * inverse), 0)
            its = ((long >> (beyond - BITS)) & ((1 << BITS) - 1)).to(tl.int32)
            sums += tl.sum(tl.where(its[:, None] == value[None, :], weight[:, None], 0), axis=0)
    tl.atomic_add(totals + (at << BITS) + value, sums, mask=sums > 0, sem="relaxed")
    if beyond == BITS:
        tl.store(ties + (((row * 2 + SEARCH) * parts + part) << BITS) + value, sums)


@triton.jit
def _draw(
    settings: tensor, logits: tensor, masks: tensor, seen: tensor, biases: tensor, rows: tensor, vocab: tensor, stride: tensor,
    words: tensor, share: tensor,
    ranks: tensor, totals: tensor, states: tensor, ties: tensor, scores: tensor, ids: tensor, parts: tensor,
    LIMITED: constexpr, NUCLEUS: constexpr, BITS: constexpr, WIDE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """The best score of a part and its lowest id; of ids that are kept and whose noise may beat the row's likeliest id."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(settings + KIND * rows + row) != _DRAWN:
        return
    top, likeliest = _likeliest(ranks, row, parts, WIDE)
    largest, inverse = logit_of(top).to(tl.float64), tl.load(settings + INVERSE * rows + row).to(tl.float64, bitcast=True)
    seed, position = tl.load(settings + SEED * rows + row), tl.load(settings + POSITION * rows + row)
    choice, purpose = tl.load(settings + CHOICE * rows + row), tl.load(settings + PURPOSE * rows + row)
    min_p, least = tl.load(settings + MIN_P * rows + row).to(tl.float64, bitcast=True), tl.full((), -LARGEST, tl.float64)
    if min_p > 0.0:
        least = natural_log(min_p)

    # Ids above `last` are kept, and of those at it the lowest `tied`; `before` of them lie in earlier parts.
    last, tied, before = tl.full((), _NOTHING, tl.uint32), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    earlier, column = tl.arange(0, WIDE), ties + ((row * 2 * parts) << BITS)
    if LIMITED:
        top_k = tl.load(settings + TOP_K * rows + row)
        if top_k > 0:
            last, tied, there = _found(totals, states, row, 0, BITS)
            at = column + (earlier << BITS) + (last & ((1 << BITS) - 1)).to(tl.int32)
            before = tl.sum(tl.load(at, mask=earlier < part, other=0), axis=0)
    if NUCLEUS:
        top_p = tl.load(settings + TOP_P * rows + row).to(tl.float64, bitcast=True)
        if top_p < 1.0:
            last, left, there = _found(totals, states, row, 1, BITS)
            mass = tl.maximum(mass_of((logit_of(last).to(tl.float64) - largest) * inverse), 1)
            tied = (left + mass - 1) // mass
            at = column + ((parts + earlier) << BITS) + (last & ((1 << BITS) - 1)).to(tl.int32)
            before = tl.sum(tl.load(at, mask=earlier < part, other=0), axis=0) // mass

    quarter, eight = (likeliest // 4).to(tl.uint32), tl.arange(0, 8)
    both = noise_words(seed, position, choice, purpose, tl.where(tl.arange(0, 2) == 0, quarter, quarter | LOWER_HALF))
    lead_upper = tl.sum(tl.where(eight == likeliest % 4, both, both ^ both), axis=0)
    lead_lower = tl.sum(tl.where(eight == likeliest % 4 + 4, both, both ^ both), axis=0)
    lead = gumbel(lead_upper, lead_lower)

    best, winner = tl.full((BLOCK,), -float("inf"), tl.float64), tl.full((BLOCK,), _NO_ID, tl.int32)
    for start in range(part * share, tl.minimum((part + 1) * share, vocab), BLOCK):
        id = start + tl.arange(0, BLOCK)
        came, x = _logits(settings, logits, masks, seen, biases, rows, row, id, vocab, stride, words)
        order = order_of(x)
        weight = (x.to(tl.float64) - largest) * inverse
        at_last = ((order == last) & (id < vocab)).to(tl.int64)
        kept = (order > last) | ((at_last > 0) & (before + tl.cumsum(at_last, axis=0) <= tied))
        kept &= (order > _NOTHING) & (weight >= least)
        before += tl.sum(at_last, axis=0)
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
            upper = noise_words(seed, position, choice, purpose, counter)
            may = kept & (upper.to(tl.float64) * 2.0**-32 <= exp_bound(tl.where(kept, weight, 0.0) - lead))
            if tl.max(may.to(tl.int32), axis=0) > 0:
                lower = noise_words(seed, position, choice, purpose, counter | LOWER_HALF)
                score = weight + gumbel(upper, lower)
                better = may & (score > best)
                best, winner = tl.where(better, score, best), tl.where(better, id, winner)
    top = tl.max(best, axis=0)
    tl.store(scores + row * parts + part, top)
    tl.store(ids + row * parts + part, tl.min(tl.where(best == top, winner, _NO_ID), axis=0))


@triton.jit
def _choose(
    settings: tensor, ranks: tensor, scores: tensor, ids: tensor, tokens: tensor, seen: tensor, rows: tensor, vocab: tensor, parts: tensor,
    WIDE: constexpr,
) -> None:  # fmt: skip
    """The token of a row."""
    row = tl.program_id(0).to(tl.int64)
    token, kind = tl.full((), -1, tl.int32), tl.load(settings + KIND * rows + row)
    if kind != 0:
        order, likeliest = _likeliest(ranks, row, parts, WIDE)
        if (order > _NOTHING) & (order < _INFINITE):
            token = likeliest
            if kind == _DRAWN:
                part = tl.arange(0, WIDE)
                score = tl.load(scores + row * parts + part, mask=part < parts, other=-float("inf"))
                id = tl.load(ids + row * parts + part, mask=part < parts, other=_NO_ID)
                token = tl.min(tl.where(score == tl.max(score, axis=0), id, _NO_ID), axis=0)
    tl.store(tokens + row, token)
    if seen is not None:
        slot = tl.load(settings + SLOT * rows + row)
        if (token >= 0) & (slot >= 0):
            note(seen, slot, vocab, token)
