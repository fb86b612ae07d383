"""What a step's draws are, in plain data: how each row's token is to be drawn, which rows the device draws, and those it leaves, with why.

Of a `Wanted` a row comes a `Drawing`: what `hasten.backends.cuda.kernels.sampling` reads, filled up to the bucket, and the rows whose
logits the engine has to fetch and draw itself. A token of −1 from a row that was not left means that its logits held NaN or +inf or that
no id might come: the engine's own sampler says which, from that row's logits."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.program import Wanted

FIELDS = (
    "kind", "masked", "slot", "seed", "position", "choice", "purpose", "top_k", "top_p", "min_p", "inverse", "repetition", "presence",
    "frequency",
)  # fmt: skip
"""Rows of settings int64 [FIELDS, R], from ``top_p`` on the bits of float64. ``kind`` is NOT_DRAWN, LIKELIEST or DRAWN; ``masked`` 0 or 1;
``slot`` −1 for none; ``min_p`` 0 or a normal number; ``inverse`` 1 / temperature. But for rows that are DRAWN, top_k is 0 and top_p 1."""

REALS = FIELDS[FIELDS.index("top_p") :]

_FLOAT64 = np.finfo(np.float64)
NOT_DRAWN, LIKELIEST, DRAWN = 0, 1, 2
MOST_VOCAB = 1 << 20
"""Ids whose masses sum exactly in int64, with room to spare."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """``settings`` int64 [FIELDS, R] and ``masks`` int32 [R, ⌈V / 32⌉] (None where no row has one) of a bucket of R rows.

    ``left``: the rows that the engine draws, each with the reason. ``top_k``, ``top_p``: whether any row needs that search."""

    settings: NDArray[np.int64]
    masks: NDArray[np.int32] | None
    left: dict[int, str]
    top_k: bool
    top_p: bool


def changes(wanted: Wanted) -> bool:
    """Whether logits are changed before they are ranked: such a request needs a slot of the device's history."""
    return bool(wanted.bias) or (wanted.repetition_penalty, wanted.presence_penalty, wanted.frequency_penalty) != (1, 0, 0)


def refused(wanted: Wanted, slot: int | None, vocab: int) -> str | None:
    """Why the device does not draw such a row, with that slot or none, or None."""
    if vocab > MOST_VOCAB:
        return f"a vocabulary of {vocab} ids; sums of masses are exact for up to {MOST_VOCAB}"
    if changes(wanted) and slot is None:
        return "bias and penalties go by a slot of the device's history, and it has none"
    if wanted.logprobs is not None:
        return "log-probabilities are reported by the engine, from the whole row of logits"
    return None


def drawing(rows: Sequence[Wanted], slots: Sequence[int | None], bucket: int, vocab: int) -> Drawing:
    """Rows 0 … of a step, with their slots of the device's history, in a bucket of ``bucket`` rows; the rest draw nothing. Raises
    ValueError where there are more.

    The tokens of rows that are left have to be added to their history anew (`History.begin`), should they have one."""
    if len(rows) > bucket:
        raise ValueError(f"{len(rows)} rows are more than the bucket's {bucket}")
    settings = np.zeros((len(FIELDS), bucket), np.int64)
    named = {name: settings[at] for at, name in enumerate(FIELDS)}
    reals = {name: named[name].view(np.float64) for name in REALS}
    reals["top_p"][:] = 1
    named["slot"][:] = -1
    masks = np.zeros((bucket, -(-vocab // 32)), np.int32) if any(wanted.mask is not None for wanted in rows) else None
    left: dict[int, str] = {}
    for row, (wanted, slot) in enumerate(zip(rows, slots, strict=True)):
        why = refused(wanted, slot, vocab)
        if why is None and changes(wanted) and slot in named["slot"]:
            why = f"another row of the step has slot {slot}, whose history one token at a time is noted in"
        if why is not None:
            left[row] = why
            continue
        named["kind"][row] = DRAWN if wanted.temperature > 0 else LIKELIEST
        if masks is not None and wanted.mask is not None:
            named["masked"][row] = 1
            masks[row] = wanted.mask.view(np.int32)
        if slot is not None and changes(wanted):
            named["slot"][row] = slot
            penalties = (wanted.repetition_penalty, wanted.presence_penalty, wanted.frequency_penalty)
            for name, penalty in zip(("repetition", "presence", "frequency"), penalties):
                reals[name][row] = penalty
        if wanted.temperature > 0:
            for name in ("seed", "position", "choice", "purpose"):
                named[name][row] = getattr(wanted, name)
            named["top_k"][row] = wanted.top_k if wanted.top_k < vocab else 0
            reals["top_p"][row] = wanted.top_p
            reals["min_p"][row] = max(wanted.min_p, _FLOAT64.tiny) if wanted.min_p else 0
            reals["inverse"][row] = min(1 / wanted.temperature, _FLOAT64.max)
    return Drawing(settings, masks, left, bool(named["top_k"].any()), bool((reals["top_p"] < 1).any()))
