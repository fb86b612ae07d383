"""Engine: requests in, tokens out. A scheduler that decides, a backend's session that computes, a sampler that draws."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UserError
from hasten.cache import Cache, page_groups
from hasten.engine.constraint import Constraints, ConstraintState
from hasten.engine.draw import Draw, TokenLogprob
from hasten.engine.pace import Pace
from hasten.engine.plan import Costs, Counters, Entry, Job, Settings
from hasten.engine.request import Chunk, Request
from hasten.engine.scheduler import Scheduler
from hasten.engine.search import Search
from hasten.engine.session import Session
from hasten.program import Batch, Move

if TYPE_CHECKING:
    from hasten.engine.scoring import PromptScores

IDLE_S = 0.001
"""How long to wait for a batch that is not to begin yet."""
MASK_S = 0.003
"""How long a step waits for what a grammar allows next, once a token; who is later than that sits steps out."""

Asked = tuple[int, int, NDArray[np.float32]]
"""A drawing sequence, the sequence that the token is for, and the logits."""


@dataclasses.dataclass(slots=True)
class _Step:
    """What comes of a step beside tokens: ``errors`` by computed sequence, log-probabilities by drawn one, and outputs that ended."""

    errors: dict[int, str] = dataclasses.field(default_factory=dict)
    logprobs: dict[int, TokenLogprob] = dataclasses.field(default_factory=dict)
    chunks: list[Chunk] = dataclasses.field(default_factory=list)


class Engine:
    """Runs requests over a backend's ``session``, which nobody else uses. ``constraints`` are those that the requests' grammars are
    followed by; ``swap_bytes`` may be taken outside the session's pages by requests that must wait; ``prefixes`` lets requests of one key
    share what they begin with; ``clock`` tells seconds."""

    def __init__(
        self, session: Session, settings: Settings, *, constraints: Constraints | None = None, swap_bytes: int = 0, prefixes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        from hasten.engine.sampler import Sampler  # late: it needs the native code, which importing the engine does not

        self._session, self._clock, self._constraints = session, clock, constraints
        groups = page_groups(session.program.states, session.page, session.pages)
        whole = sum(group.pages * group.page_bytes for group in groups)
        places = [swap_bytes * group.pages // max(1, whole) for group in groups]
        self.cache = Cache(groups, session.page, places, prefixes)
        self.scheduler = Scheduler(self.cache, settings)
        self._pace = Pace(settings.costs or Costs(), measured=settings.costs is None)
        self._sampler = Sampler(session.threads)
        self._ids = itertools.count()
        self._running: dict[int, Request] = {}  # by sequence
        self._outputs: dict[int, list[int]] = {}  # by request: the sequences of its outputs or beams, the first of which was its number
        self._number: dict[int, int] = {}  # by sequence: of its request
        self._searches: dict[int, tuple[Search, Sequence[Request]]] = {}  # by request, with the outputs to return
        self._scores: dict[int, PromptScores] = {}  # by sequence
        self._constrained: dict[int, None] = {}  # requests with a grammar
        self._late: Collection[int] = ()  # those of them that the last step did not wait for

    @property
    def session(self) -> Session:
        """The backend's session it runs, for whoever measures."""
        return self._session

    @property
    def busy(self) -> bool:
        """Is there work?"""
        return bool(self._running)

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self.scheduler.counters

    def submit(
        self, outputs: Sequence[Request], *, priority: int = 0, key: Hashable | None = None, search: Search | None = None
    ) -> int:  # fmt: skip
        """Take the request whose ``outputs`` are to be made of one prompt, by ``search`` unless they are drawn; returns its number.

        ``key`` is what its prefixes have in common with those it may share, None for none. Raises NeverFitsError for one that could not run
        even alone."""
        first, sequences = outputs[0], [next(self._ids) for _ in (outputs if search is None else outputs[:1])]
        most, together = max(output.most for output in outputs), len(outputs) if search is None else first.params.sequences
        number, scored = sequences[0], first.params.prompt_logprobs if first.choice == 0 else None
        job = Job(number, first.prompt, most, together, priority, key if scored is None else None)
        self.scheduler.submit(job, number, self._clock())
        self._running.update(zip(sequences, outputs))
        self._number.update(dict.fromkeys(sequences, number))
        self._outputs[number] = sequences
        if search is not None:
            self._searches[number] = search, outputs
        if scored is not None:
            from hasten.engine.scoring import PromptScores  # late, as the sampler

            self._scores[number] = PromptScores(first.prompt, scored)
        if self._states(number):
            self._constrained[number] = None
        return number

    def abort(self, number: int) -> None:
        """End a request, wherever it is; an unknown one has ended already."""
        self.scheduler.abort(number)
        for sequence in self._outputs.pop(number, ()):
            if (request := self._running.pop(sequence, None)) is not None and request.constraint is not None:
                request.constraint.close()
            self._number.pop(sequence, None)
        self._drop(number)

    def step(self) -> list[Chunk]:
        """Compute one step; what became known by it. Requests whose grammar has not said yet what may come next do not draw in it."""
        step = _Step()
        held = self._follow(step) if self._constrained else ()
        began = self._clock()
        plan = self.scheduler.plan(began, held, self._pace.costs)
        self._move(plan.moves)
        if not plan.entries:
            self._wait(held, step)
            return step.chunks
        draws = self._draw(self._compute(plan.entries, step), step)
        chunks, logprobs = step.chunks, step.logprobs
        for sequence, token in self.scheduler.commit(plan, draws, step.errors):
            if self._searches and self._number[sequence] in self._searches:
                continue
            request = self._running[sequence]
            chunks.append(request.take(token, logprobs.get(sequence)))
            if request.finish_reason is not None:
                self.scheduler.finish(sequence)
                self._forget(sequence)
        for sequence, error in step.errors.items():
            chunks += self._fail(self._number.get(sequence, sequence), error)
        if not plan.moves and not step.errors:
            self._pace.note_step(plan.entries, self._clock() - began)
        return chunks

    def _move(self, moves: Sequence[Move]) -> None:
        if moves:
            began = self._clock()
            self._session.carry_out(moves)
            self._pace.note_moves(sum(self.cache.groups[move.group].page_bytes for move in moves), self._clock() - began)

    # --- computing and drawing

    def _compute(self, entries: Sequence[Entry], step: _Step) -> list[tuple[int, NDArray[np.float32]]]:
        """Logits [vocab] of each entry that draws, by sequence. What fails is tried again in halves, to find whose fault it is."""
        try:
            logits = self._session.run(batch_of(entries, self._scores), [entry.pages for entry in entries])
        except Exception as error:
            if len(entries) == 1:
                step.errors[entries[0].sequence] = f"{type(error).__name__}: {error}"
                return []
            half = len(entries) // 2
            return self._compute(entries[:half], step) + self._compute(entries[half:], step)
        if self._scores:
            logits = self._scored(entries, logits, step)
        drawing = [entry.sequence for entry in entries if entry.draws]
        return [(sequence, row) for sequence, row in zip(drawing, logits, strict=True) if sequence in self._running]

    def _scored(self, entries: Sequence[Entry], logits: NDArray[np.float32], step: _Step) -> NDArray[np.float32]:
        """Take the rows that prompts are scored by; the others, one for each entry that draws."""
        drawing, at = list[int](), 0
        for entry in entries:
            if (scores := self._scores.get(entry.sequence)) is not None:
                count = len(scores.wanted(entry.start, len(entry.tokens)))
                try:
                    scores.take(logits[at : at + count], self._sampler)
                except ValueError as error:
                    step.errors[entry.sequence] = str(error)
                at += count
                if entry.draws:
                    self._running[entry.sequence].prompt_logprobs = tuple(scores.entries)
                    del self._scores[entry.sequence]
            if entry.draws:
                drawing.append(at)
                at += 1
        return logits[drawing]

    def _draw(self, rows: Sequence[tuple[int, NDArray[np.float32]]], step: _Step) -> dict[int, list[tuple[int, int]]]:
        """How each sequence goes on: at the end of its prompt, into all outputs of its request; in a search, into the beams that continue
        it."""
        draws: dict[int, list[tuple[int, int]]] = {sequence: [] for sequence, _ in rows}
        asked: list[Asked] = []
        searching: dict[int, dict[int, NDArray[np.float32]]] = {}
        for sequence, row in rows:
            if self._searches and (number := self._number[sequence]) in self._searches:
                searching.setdefault(number, {})[sequence] = row
                continue
            begins = sequence in self._outputs and not self._running[sequence].output
            asked += [(sequence, each, row) for each in (self._outputs[sequence] if begins else [sequence])]
        for (sequence, each, _), draw in zip(asked, self._drawn(asked) if asked else (), strict=True):
            if draw.error is not None:
                request = self._running[each]
                why = request.constraint.error if request.constraint is not None else None
                step.chunks.append(request.end("error", why or draw.error))
                self._forget(each)
                continue
            draws[sequence].append((each, draw.token))
            if draw.logprob is not None:
                step.logprobs[each] = draw.logprob
        for number, found in searching.items():
            draws.update(self._search(number, found, step))
        return draws

    def _drawn(self, asked: Sequence[Asked]) -> list[Draw]:
        try:
            return self._sampler.draw(np.stack([row for _, _, row in asked]), [self._running[each] for _, each, _ in asked])
        except Exception as error:
            if len(asked) == 1:
                return [Draw(-1, error=str(error))]
            return [draw for one in asked for draw in self._drawn([one])]

    def _search(self, number: int, rows: Mapping[int, NDArray[np.float32]], step: _Step) -> dict[int, list[tuple[int, int]]]:
        """How the beams of a search go on; all of them together, or the search has failed."""
        (search, outputs), sequences = self._searches[number], self._outputs[number]
        draws: dict[int, list[tuple[int, int]]] = {sequence: [] for sequence in sequences}
        error = next((step.errors[sequence] for sequence in sequences if sequence in step.errors), None)
        going: list[tuple[int, int]] = []
        if error is None:
            try:
                going = search.advance(np.stack([rows[sequence] for sequence in sequences]))
            except UserError as failure:
                error = str(failure)
        if error is not None:
            step.errors.update(dict.fromkeys(sequences, error))
            return draws
        if not going:
            step.chunks += _found(search, outputs)
            for sequence in sequences:
                del self._running[sequence], self._number[sequence]
            del self._outputs[number]
            self._drop(number)
            return draws
        beams = []
        for parent, token in going:
            at = sequences[parent]
            beams.append(next(self._ids) if draws[at] else at)
            draws[at].append((beams[-1], token))
        for sequence in sequences:
            del self._running[sequence], self._number[sequence]
        self._running.update(dict.fromkeys(beams, outputs[0]))
        self._number.update(dict.fromkeys(beams, number))
        self._outputs[number] = beams
        return draws

    # --- grammars

    def _states(self, number: int) -> list[ConstraintState]:
        """What follows the grammar for each output or beam of a request."""
        if number in self._searches:
            return self._searches[number][0].followed
        each = [self._running[sequence].constraint for sequence in self._outputs[number] if sequence in self._running]
        return [state for state in each if state is not None]

    def _follow(self, step: _Step) -> Collection[int]:
        """Take what grammars said, and end the outputs that they end. Returns the requests that they have not said anything for yet."""
        self._await([number for number in self._constrained if number not in self._late], MASK_S, step)
        held = {number for number in self._constrained if not all(state.ready for state in self._states(number))}
        self._late = held
        for number in [number for number in self._constrained if number not in held and number not in self._searches]:
            self._end_by_grammar(number, step)
        return held

    def _await(self, numbers: Collection[int], seconds: float, step: _Step) -> None:
        """Wait until the grammars of all these requests have said what may come next, for so long at most."""
        if self._constraints is None:
            return
        try:
            self._constraints.wait(seconds, [state for number in numbers for state in self._states(number)])
        except UserError as error:  # nothing can be held to a grammar with this tokenizer
            for number in list(self._constrained):
                step.chunks += self._fail(number, str(error))

    def _end_by_grammar(self, number: int, step: _Step) -> None:
        """End the outputs whose grammar is complete or has failed; before the first token, only if all of them are to end."""
        live = [sequence for sequence in self._outputs[number] if sequence in self._running]
        ended = [sequence for sequence in live if (state := self._running[sequence].constraint) and (state.error or state.complete)]
        if len(ended) < len(live) and not any(self._running[sequence].output for sequence in live):
            return
        for sequence in ended:
            request = self._running[sequence]
            error = None if request.constraint is None else request.constraint.error
            step.chunks.append(request.end("stop" if error is None else "error", error))
            if len(ended) < len(live):
                self.scheduler.finish(sequence)
                self._forget(sequence)
        if ended and len(ended) == len(live):
            self.abort(number)

    def _wait(self, held: Collection[int], step: _Step) -> None:
        """Nothing can be computed now."""
        if held:
            self._await(held, 10 * IDLE_S, step)
        elif self.busy:
            time.sleep(IDLE_S)

    # --- ending

    def _fail(self, number: int, error: str) -> list[Chunk]:
        """End all outputs of a request."""
        if number in self._searches:
            outputs: Sequence[Request] = self._searches[number][1]
        else:
            outputs = [self._running[each] for each in self._outputs.get(number, ()) if each in self._running]
        ended = [output.end("error", error) for output in outputs]
        self.abort(number)
        return ended

    def _forget(self, sequence: int) -> None:
        number = self._number.pop(sequence)
        del self._running[sequence]
        if not any(each in self._running for each in self._outputs[number]):
            del self._outputs[number]
            self._drop(number)

    def _drop(self, number: int) -> None:
        """Forget what only some requests have."""
        self._constrained.pop(number, None)
        self._scores.pop(number, None)
        if (found := self._searches.pop(number, None)) is not None:
            found[0].close()


def _found(search: Search, outputs: Sequence[Request]) -> list[Chunk]:
    """One chunk for each output of a search; those that it did not find are errors."""
    found, chunks = search.best(), list[Chunk]()
    for place, output in enumerate(outputs):
        if place < len(found):
            ended, tokens = found[place].ended, found[place].tokens
            chunks.append(Chunk(output.index, output.text_of(tokens), tokens, "stop" if ended else "length", output.choice))
        else:
            chunks.append(Chunk(output.index, "", (), "error", output.choice, error="the search found fewer outputs"))
    return chunks


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
