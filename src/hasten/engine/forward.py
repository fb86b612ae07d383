"""Forward: from planned entries to the logits that tokens are drawn from."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.engine.live import Live, Step
from hasten.engine.plan import Entry
from hasten.engine.session import Session
from hasten.program import Batch, StateLostError

if TYPE_CHECKING:
    from hasten.engine.sampler import Sampler
    from hasten.engine.scoring import PromptScores

Rows = list[tuple[int, NDArray[np.float32]]]
"""Logits [vocab] by sequence."""


def compute(session: Session, sampler: "Sampler", live: Live, entries: Sequence[Entry], step: Step) -> Rows:
    """Logits of each entry that draws. What fails is tried again in halves, to find whose fault it is."""
    try:
        logits = session.run(batch_of(entries, live.scores), [entry.pages for entry in entries])
    except StateLostError as error:
        step.errors.update((entry.sequence, str(error)) for entry in entries)
        return []
    except Exception as error:
        if len(entries) == 1:
            step.errors[entries[0].sequence] = f"{type(error).__name__}: {error}"
            return []
        half = len(entries) // 2
        return compute(session, sampler, live, entries[:half], step) + compute(session, sampler, live, entries[half:], step)
    if live.scores:
        logits = _scored(sampler, live, entries, logits, step)
    drawing = [entry.sequence for entry in entries if entry.draws]
    return [(sequence, row) for sequence, row in zip(drawing, logits, strict=True) if sequence in live.requests]


def _scored(
    sampler: "Sampler", live: Live, entries: Sequence[Entry], logits: NDArray[np.float32], step: Step
) -> NDArray[np.float32]:  # fmt: skip
    """Take the rows that prompts are scored by; the others, one for each entry that draws."""
    drawing, at = list[int](), 0
    for entry in entries:
        if (scores := live.scores.get(entry.sequence)) is not None:
            count = len(scores.wanted(entry.start, len(entry.tokens)))
            try:
                scores.take(logits[at : at + count], sampler)
            except ValueError as error:
                step.errors[entry.sequence] = str(error)
            at += count
            if entry.draws:
                live.requests[entry.sequence].prompt_logprobs = tuple(scores.entries)
                del live.scores[entry.sequence]
        if entry.draws:
            drawing.append(at)
            at += 1
    return logits[drawing]


def batch_of(entries: Sequence[Entry], scores: "Mapping[int, PromptScores] | None" = None) -> Batch:
    """The entries' tokens laid end to end, with the last row of those that draw, and before it those that prompts are scored by."""
    tokens: list[int] = []
    positions: list[int] = []
    offsets, rows = [0], list[int]()
    for entry in entries:
        if scores and entry.sequence in scores:
            wanted, shift = scores[entry.sequence].wanted(entry.start, len(entry.tokens)), len(tokens) - entry.start
            rows += range(wanted.start + shift, wanted.stop + shift)
        tokens += entry.tokens
        positions += range(entry.start, entry.start + len(entry.tokens))
        offsets.append(len(tokens))
        if entry.draws:
            rows.append(len(tokens) - 1)
    return Batch(*(np.array(numbers, np.int32) for numbers in (tokens, positions, offsets, rows)))
