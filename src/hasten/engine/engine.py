"""Engine: requests in, tokens out. A scheduler that decides, a backend's session that computes, a sampler that draws."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TYPE_CHECKING

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.cache import Cache, page_groups
from hasten.engine.constraint import Constraints, ConstraintState
from hasten.engine.draw import Draw, TokenLogprob
from hasten.engine.drawing import AnySampler, Drawing, awaited, begin, draw, due, said
from hasten.engine.following import Following
from hasten.engine.forward import Rows, compute, lost, rows_of, run
from hasten.engine.live import Live, Step
from hasten.engine.pace import Pace
from hasten.engine.plan import Costs, Counters, Entry, Job, Settings
from hasten.engine.request import Chunk, Request
from hasten.engine.sampling import SamplingParams
from hasten.engine.scheduler import Scheduler
from hasten.engine.search import Search
from hasten.engine.session import Session
from hasten.program import Move, StateLostError

if TYPE_CHECKING:
    from hasten.engine.sampler import Due

IDLE_S = 0.001
"""How long to wait for a batch that is not to begin yet."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Ahead:
    """A step whose ``tokens`` are due, one for each of ``sequences``. ``timed`` are its entries, or none where they do not say what such a
    step takes."""

    tokens: "Due"
    sequences: Sequence[int]
    timed: Sequence[Entry]
    began_s: float


class Engine:
    """Runs requests over a backend's ``session``, which nobody else uses, in one thread. Where the session draws by itself, a step is
    planned and begun while the one before is computed, and takes the tokens that come of that. ``constraints`` follow the requests'
    grammars; ``swap_bytes`` may be taken outside the session's pages by requests that must wait; ``prefixes`` lets requests of one key
    share what they begin with; ``clock`` tells seconds."""

    def __init__(
        self, session: Session, settings: Settings, *, constraints: Constraints | None = None, swap_bytes: int = 0, prefixes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        from hasten.engine.sampler import Sampler  # late: it needs the native code, which importing the engine does not

        self.session = session
        """The backend's, for whoever measures."""
        groups = page_groups(session.program.states, session.page, session.pages)
        whole = sum(group.pages * group.page_bytes for group in groups)
        places = [swap_bytes * group.pages // max(1, whole) for group in groups]
        self.cache = Cache(groups, session.page, places, prefixes)
        self.scheduler = Scheduler(self.cache, settings)
        self._pace = Pace(settings.costs or Costs(), measured=settings.costs is None)
        self._clock, self._host = clock, Sampler(session.threads)
        self._sampler: AnySampler = self._host
        if session.drawer is not None:
            from hasten.engine.device_sampler import DeviceSampler  # late, as the sampler

            self._sampler = DeviceSampler(session.drawer, self._host)
        self._ahead: _Ahead | None = None  # the step before, while its tokens are due
        self._learned_s = -math.inf  # when they were known last
        self._live = Live()
        self._following = Following(constraints, self._live)
        self._hurt: dict[int, str] = {}  # by sequence: why its pages do not hold what the cache says

    @property
    def busy(self) -> bool:
        """Is there work?"""
        return bool(self._live.requests)

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self.scheduler.counters

    def submit(self, outputs: Sequence[Request], *, priority: int = 0, key: Hashable | None = None) -> int:
        """Take the request whose ``outputs`` are to be made of one prompt, drawn or searched for; the number that `abort` knows it by.

        ``key`` is what its prefixes have in common with those it may share, None for none. Raises NeverFitsError for one that could not run
        even alone."""
        first, live = outputs[0], self._live
        params, beam = first.params, first.params.beam
        sequences = [next(live.ids) for _ in (outputs if beam is None else outputs[:1])]
        most, together = max(output.most for output in outputs), len(outputs) if beam is None else beam.width
        scored = params.prompt_logprobs if first.choice == 0 else None
        states, search, scores = self._states(params, len(sequences)), None, None
        try:
            if beam is not None:
                search = Search(params, beam, max_tokens=first.most, end_ids=first.end_ids, constraint=states[0] if states else None)
            if scored is not None:
                from hasten.engine.scoring import PromptScores  # late, as the sampler

                scores = PromptScores(first.prompt, scored)
            job = Job(sequences[0], first.prompt, most, together, priority, key if scored is None else None, scored is not None)
            self.scheduler.submit(job, sequences[0], self._clock())  # last: whatever fails leaves nothing there
        except Exception:
            for state in states:
                state.close()
            raise
        if beam is None:
            for output, state in zip(outputs, states):
                output.constraint = state
        live.add(sequences, outputs, search, scores)
        return sequences[0]

    def abort(self, number: int) -> None:
        """End a request, wherever it is; an unknown one has ended already. Nothing more is said of it."""
        self.scheduler.abort(number)
        self._live.drop(number)

    def step(self) -> list[Chunk]:
        """Compute one step; what became known by it. Requests whose grammar has not said yet what may come next do not draw in it."""
        step, live = Step(), self._live
        held = self._follow(step) if live.constrained else ()
        began = self._clock()
        plan = self.scheduler.plan(began, held, self._pace.costs)
        self.move(plan.moves)
        step.errors.update(self._hurt)
        self._hurt.clear()
        self._fail_all(step)  # before anything is learned: no token that is due is theirs any more
        entries = [entry for entry in plan.entries if entry.sequence not in step.errors] if step.errors else plan.entries
        if not entries:
            if not self._learn(step) and not step.errors:
                self._wait(held, step)
            return step.chunks
        drawing = self._begin(entries, step)
        self._learn(step)
        tokens = due(live, drawing)
        draws = self._draw(drawing, step) if tokens is None else awaited(drawing)
        for sequence, token in self.scheduler.commit(plan, draws, step.errors):
            if live.searches and live.numbers[sequence] in live.searches:
                continue
            if tokens is None:
                self._take(sequence, token, step.logprobs.get(sequence), step)
            else:
                self._await(sequence)
        self._fail_all(step)
        timed = () if plan.moves or step.errors else plan.entries
        if tokens is None:
            self._pace.note_step(timed, self._clock() - max(began, self._learned_s))
        else:
            self._ahead = _Ahead(tokens, [sequence for sequence, _, _ in drawing.asked], timed, began)
        return step.chunks

    def move(self, moves: Sequence[Move]) -> None:
        """Carry out what the cache has decided; whoever computes on these pages does so before. Where that fails, the next step ends the
        requests whose pages were to be written: of all others nothing is lost."""
        if not moves:
            return
        began = self._clock()
        try:
            self.session.carry_out(moves)
        except Exception as error:
            why = f"moving pages of the cache failed ({type(error).__name__}: {one_line(str(error), 300)}); send the request again"
            live = self._live
            for sequence in self.scheduler.hurt(moves):
                self._hurt.update(dict.fromkeys(live.sequences.get(live.numbers.get(sequence, sequence), ()), why))
            return
        self._pace.note_moves(sum(self.cache.groups[move.group].page_bytes for move in moves), self._clock() - began)

    def _begin(self, entries: Sequence[Entry], step: Step) -> Drawing:
        return begin(self._sampler, self._live, self._compute(entries, step))

    def _compute(self, entries: Sequence[Entry], step: Step) -> Rows:
        live = self._live
        if self._ahead is None:
            return compute(self.session, self._host, live, entries, step)
        try:
            logits = run(self.session, live, entries)
        except StateLostError as error:
            return lost(entries, error, step)
        except Exception:  # to find whose fault it is, steps must be made of tokens that are known
            learned = self._learn(step)
            known = [each._replace(tokens=[learned.get(each.sequence, t) if t < 0 else t for t in each.tokens]) for each in entries]
            return compute(self.session, self._host, live, known, step)
        return rows_of(self._host, live, entries, logits, step)

    def _draw(self, drawing: Drawing, step: Step) -> dict[int, list[tuple[int, int]]]:
        return draw(self._sampler, self._live, drawing, step)

    def _take(self, sequence: int, token: int, logprob: TokenLogprob | None, step: Step) -> None:
        """An output goes on by a token."""
        request = self._live.requests[sequence]
        try:
            step.chunks.append(request.take(token, logprob))
        except Exception as failure:  # of its tokenizer, or of what makes text
            step.chunks.append(request.end("error", said(failure)))
        if request.finish_reason is not None:
            self.scheduler.finish(sequence)
            self._live.forget(sequence)

    def _await(self, sequence: int) -> None:
        """An output goes on by a token that is due."""
        request = self._live.requests[sequence]
        request.due = 1
        if not request.left:
            self.scheduler.finish(sequence)  # nothing is computed for it any more; it ends when the token is there

    def _learn(self, step: Step) -> dict[int, int]:
        """Wait for the tokens that are due and take them; which they are, by sequence. Of those that have ended meanwhile, nothing."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return {}
        learned: dict[int, int] = {}
        try:
            draws = ahead.tokens.draws()
        except Exception as failure:
            draws = [Draw(-1, error=said(failure))] * len(ahead.sequences)
        for sequence, drawn in zip(ahead.sequences, draws, strict=True):
            learned[sequence] = max(drawn.token, 0)
            if (request := self._live.requests.get(sequence)) is None:
                continue
            self.scheduler.learn(sequence, learned[sequence])
            if drawn.error is None:
                self._take(sequence, drawn.token, None, step)
                continue
            step.chunks.append(request.end("error", drawn.error))
            self.scheduler.finish(sequence)
            self._live.forget(sequence)
        began, self._learned_s = max(ahead.began_s, self._learned_s), self._clock()
        self._pace.note_step(ahead.timed, self._learned_s - began)
        return learned

    # --- grammars

    def _states(self, params: SamplingParams, count: int) -> list[ConstraintState]:
        """What will follow the grammar, if any, for so many outputs."""
        if params.grammar is None:
            return []
        if (constraints := self._following.constraints) is None:
            raise ConfigError("an output that follows a grammar needs a tokenizer, which this engine has none of; leave the grammar out")
        return [constraints.start(params.grammar) for _ in range(count)]

    def _follow(self, step: Step) -> Collection[int]:
        """Take what grammars said, and end the outputs that they end. Returns the requests that they have not said anything for yet."""
        live = self._live
        try:
            held = self._following.held()
        except UserError as error:
            self._fail_constrained(str(error), step)
            return ()
        for number in [number for number in live.constrained if number not in held and number not in live.searches]:
            ended = self._following.ended(number)
            whole = len(ended) == len(live.running(number))
            for sequence in ended:
                request = live.requests[sequence]
                why = None if request.constraint is None else request.constraint.error
                step.chunks.append(request.end("stop" if why is None else "error", why))
                if not whole:
                    self.scheduler.finish(sequence)
                    live.forget(sequence)
            if ended and whole:
                self.abort(number)
        return held

    def _wait(self, held: Collection[int], step: Step) -> None:
        """Nothing can be computed now."""
        if held:
            try:
                self._following.wait(held, 10 * IDLE_S)
            except UserError as error:
                self._fail_constrained(str(error), step)
        elif self.busy:
            time.sleep(IDLE_S)

    # --- failing

    def _fail_constrained(self, error: str, step: Step) -> None:
        """End all requests that have a grammar."""
        for number in list(self._live.constrained):
            step.chunks += self._fail(number, error)

    def _fail_all(self, step: Step) -> None:
        """End the requests that the step had errors for."""
        for sequence, error in step.errors.items():
            step.chunks += self._fail(self._live.numbers.get(sequence, sequence), error)

    def _fail(self, number: int, error: str) -> list[Chunk]:
        """End all outputs of a request."""
        live = self._live
        outputs = live.searches[number][1] if number in live.searches else [live.requests[each] for each in live.running(number)]
        ended = [output.end("error", error) for output in outputs]
        self.abort(number)
        return ended
