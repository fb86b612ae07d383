"""Forward: from planned entries to the logits that tokens are drawn from."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.engine.live import Live, Step
from hasten.engine.plan import Entry
from hasten.engine.session import Session
from hasten.program import Batch, HostLogits, Logits, StateLostError

if TYPE_CHECKING:
    from hasten.engine.sampler import Sampler
    from hasten.engine.scoring import PromptScores


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What tokens are drawn from: ``logits``, and ``at``, each drawing sequence with its row of them."""

    logits: Logits
    at: Sequence[tuple[int, int]]

    def numpy(self) -> NDArray[np.float32]:
        """The rows of ``at`` on the host, in its order."""
        return self.logits.numpy([row for _, row in self.at])


def compute(session: Session, sampler: "Sampler", live: Live, entries: Sequence[Entry], step: Step) -> Rows:
    """Logits of each entry that draws. What fails is tried again in halves, to find whose fault it is."""
    try:
        logits = run(session, live, entries)
    except StateLostError as error:
        return lost(entries, error, step)
    except Exception as error:
        if len(entries) == 1:
            step.errors[entries[0].sequence] = f"{type(error).__name__}: {error}"
            return _nothing()
        half = len(entries) // 2
        return _together([_on_host(compute(session, sampler, live, some, step), step) for some in (entries[:half], entries[half:])])
    return rows_of(sampler, live, entries, logits, step)


def lost(entries: Sequence[Entry], error: StateLostError, step: Step) -> Rows:
    """None can go on from its pages, nor be tried again: ``error`` is every entry's."""
    step.errors.update((entry.sequence, str(error)) for entry in entries)
    return _nothing()


def run(session: Session, live: Live, entries: Sequence[Entry]) -> Logits:
    """All rows of a step: those that prompts are scored by, and those that are drawn from."""
    return session.run(batch_of(entries, live.scores), [entry.pages for entry in entries])


def rows_of(sampler: "Sampler", live: Live, entries: Sequence[Entry], logits: Logits, step: Step) -> Rows:
    """Which of the rows that `run` gave are drawn from; the others score prompts, and are taken."""
    if not live.scores:
        drawing = [entry.sequence for entry in entries if entry.draws]
        return Rows(logits, list(zip(drawing, range(len(drawing)))))
    at, row = list[tuple[int, int]](), 0
    for entry in entries:
        if (scores := live.scores.get(entry.sequence)) is not None:
            count = len(scores.wanted(entry.start, len(entry.tokens)))
            try:
                scores.take(logits.numpy(range(row, row + count)), sampler)
            except ValueError as error:
                step.errors[entry.sequence] = str(error)
            except Exception as error:  # rows that cannot be fetched; what was computed is not computed again
                step.errors[entry.sequence] = f"{type(error).__name__}: {error}"
            row += count
            if entry.draws:
                live.requests[entry.sequence].prompt_logprobs = tuple(scores.entries)
                del live.scores[entry.sequence]
        if entry.draws:
            at.append((entry.sequence, row))
            row += 1
    return Rows(logits, at)


def _nothing() -> Rows:
    """Of a step that failed."""
    return Rows(HostLogits(np.empty((0, 0), np.float32)), [])


def _on_host(rows: Rows, step: Step) -> Rows:
    """The same, for longer than until the next step. Whose rows cannot be fetched fails, for what was computed is not computed again."""
    try:
        return Rows(HostLogits(rows.numpy()), [(sequence, row) for row, (sequence, _) in enumerate(rows.at)])
    except Exception as error:
        step.errors.update((sequence, f"{type(error).__name__}: {error}") for sequence, _ in rows.at)
        return _nothing()


def _together(each: Sequence[Rows]) -> Rows:
    """What several steps gave."""
    some = [rows for rows in each if rows.at]
    if len(some) < 2:
        return some[0] if some else each[0]
    sequences = [sequence for rows in some for sequence, _ in rows.at]
    return Rows(HostLogits(np.concatenate([rows.numpy() for rows in some])), list(zip(sequences, range(len(sequences)))))


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
