"""Engine: requests in, tokens out. A scheduler that decides, a backend's session that computes, a sampler that draws."""

import itertools
import time
from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.cache import Cache, page_groups
from hasten.engine.plan import Counters, Entry, Job, Settings
from hasten.engine.request import Chunk, Request
from hasten.engine.scheduler import Scheduler
from hasten.engine.session import Session
from hasten.program import Batch

IDLE_S = 0.001
"""How long to wait for a batch that is not to begin yet."""


class Engine:
    """Runs requests over a backend's ``session``, which nobody else uses. ``swap_bytes`` may be taken outside the session's pages by
    requests that must wait; ``prefixes`` lets requests of one key share what they begin with; ``clock`` tells seconds."""

    def __init__(
        self, session: Session, settings: Settings, *, swap_bytes: int = 0, prefixes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        from hasten.engine.sampler import Sampler  # late: it needs the native code, which importing the engine does not

        self._session, self._clock = session, clock
        groups = page_groups(session.program.states, session.page, session.pages)
        whole = sum(group.pages * group.page_bytes for group in groups)
        places = [swap_bytes * group.pages // max(1, whole) for group in groups]
        self.cache = Cache(groups, session.page, places, prefixes)
        self.scheduler = Scheduler(self.cache, settings)
        self._sampler = Sampler(session.threads)
        self._ids = itertools.count()
        self._running: dict[int, Request] = {}  # by sequence
        self._outputs: dict[int, list[int]] = {}  # by request: the sequences of its outputs, the first of which is its number
        self._number: dict[int, int] = {}  # by sequence: of its request

    @property
    def busy(self) -> bool:
        """Is there work?"""
        return bool(self._running)

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self.scheduler.counters

    def submit(self, outputs: Sequence[Request], *, priority: int = 0, key: Hashable | None = None) -> int:
        """Take the request whose ``outputs`` are to be made of one prompt; returns its number. ``key`` is what its prefixes have in common
        with those it may share, None for none. Raises NeverFitsError for one that could not run even alone."""
        first, sequences = outputs[0], [next(self._ids) for _ in outputs]
        job = Job(sequences[0], first.prompt, max(output.most for output in outputs), len(outputs), priority, key)
        self.scheduler.submit(job, sequences[0], self._clock())
        self._running.update(zip(sequences, outputs))
        self._number.update(dict.fromkeys(sequences, job.id))
        self._outputs[job.id] = sequences
        return job.id

    def abort(self, number: int) -> None:
        """End a request, wherever it is; an unknown one has ended already."""
        self.scheduler.abort(number)
        for sequence in self._outputs.pop(number, ()):
            self._running.pop(sequence, None)
            self._number.pop(sequence, None)

    def step(self, held: Collection[int] = ()) -> list[Chunk]:
        """Compute one step; what became known by it. Requests of the numbers ``held`` are not to draw in it."""
        plan = self.scheduler.plan(self._clock(), held)
        if not plan.entries:
            if self.busy and not held:
                time.sleep(IDLE_S)
            return []
        self._session.carry_out(plan.moves)
        errors: dict[int, str] = {}
        draws = self._draw(self._compute(plan.entries, errors), errors)
        chunks: list[Chunk] = []
        for sequence, token in self.scheduler.commit(plan, draws, errors):
            request = self._running[sequence]
            chunks.append(request.take(token))
            if request.finish_reason is not None:
                self.scheduler.finish(sequence)
                self._forget(sequence)
        for sequence, error in errors.items():
            chunks += self._fail(sequence, error)
        return chunks

    def _compute(self, entries: Sequence[Entry], errors: dict[int, str]) -> list[tuple[int, NDArray[np.float32]]]:
        """Logits [vocab] of each entry that draws, by sequence. What fails is tried again in halves, to find whose fault it is."""
        try:
            logits = self._session.run(batch_of(entries), [entry.pages for entry in entries])
        except Exception as error:
            if len(entries) == 1:
                errors[entries[0].sequence] = f"{type(error).__name__}: {error}"
                return []
            half = len(entries) // 2
            return self._compute(entries[:half], errors) + self._compute(entries[half:], errors)
        drawing = [entry.sequence for entry in entries if entry.draws]
        return [(sequence, row) for sequence, row in zip(drawing, logits, strict=True) if sequence in self._running]

    def _draw(self, rows: Sequence[tuple[int, NDArray[np.float32]]], errors: dict[int, str]) -> dict[int, list[tuple[int, int]]]:
        """How each sequence goes on: at the end of its prompt, into all outputs of its request."""
        draws: dict[int, list[tuple[int, int]]] = {sequence: [] for sequence, _ in rows}
        asked: list[tuple[int, int, NDArray[np.float32]]] = []
        for sequence, row in rows:
            begins = sequence in self._outputs and not self._running[sequence].output
            asked += [(sequence, each, row) for each in (self._outputs[sequence] if begins else [sequence])]
        for (sequence, each, _), token in zip(asked, self._tokens(asked, errors)):
            if token is not None:
                draws[sequence].append((each, token))
        return draws

    def _tokens(self, asked: Sequence[tuple[int, int, NDArray[np.float32]]], errors: dict[int, str]) -> list[int | None]:
        """A token for each (drawing sequence, sequence that it is for, logits), None for those in ``errors``."""
        if not asked:
            return []
        try:
            tokens = self._sampler.draw(np.stack([row for _, _, row in asked]), [self._running[each] for _, each, _ in asked])
        except Exception as error:
            if len(asked) == 1:
                errors[asked[0][0]] = str(error)
                return [None]
            return [token for one in asked for token in self._tokens([one], errors)]
        return list(tokens)

    def _fail(self, sequence: int, error: str) -> list[Chunk]:
        """End all outputs of the request that ``sequence`` is of."""
        number = self._number.get(sequence, sequence)
        ended = [self._running[each].end("error", error) for each in self._outputs.get(number, ()) if each in self._running]
        self.abort(number)
        return ended

    def _forget(self, sequence: int) -> None:
        number = self._number.pop(sequence)
        del self._running[sequence]
        if not any(each in self._running for each in self._outputs[number]):
            del self._outputs[number]


def batch_of(entries: Sequence[Entry]) -> Batch:
    """The entries' tokens laid end to end, with the last row of those that draw."""
    tokens: list[int] = []
    positions: list[int] = []
    offsets, rows = [0], []
    for entry in entries:
        tokens += entry.tokens
        positions += range(entry.start, entry.start + len(entry.tokens))
        offsets.append(len(tokens))
        if entry.draws:
            rows.append(len(tokens) - 1)
    return Batch(*(np.array(numbers, np.int32) for numbers in (tokens, positions, offsets, rows)))
