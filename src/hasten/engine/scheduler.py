"""Scheduler: which tokens the next step computes, in which pages. Pure: no clock, no randomness, no memory, no model.

There is no prefill and no decode. Every sequence catches its computed tokens up to its known ones (prompt, then output), under one budget
of tokens a step and the pages that the cache can have. Sequences with one token to go come first, each with its own, so that a long
prompt beside them only takes what the budget leaves."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection, Sequence

from hasten.cache import Cache, SequencePages, TokenPages
from hasten.engine.plan import Costs, Counters, Draws, Entry, Job, NeverFitsError, Settings, StepPlan
from hasten.program import Move


class _Sequence:
    """``known`` tokens, of which ``pages.length`` are computed."""

    __slots__ = ("ended", "id", "job", "known", "pages")

    def __init__(self, id: int, job: _Live, known: list[int], pages: SequencePages) -> None:
        self.id, self.job, self.known, self.pages = id, job, known, pages
        self.ended = False  # and there for the rectangle of its batch only


class _Live:
    """A job on its way: waiting, or with its sequences in the batch."""

    __slots__ = ("arrived_s", "counted", "given_up", "job", "joined", "rank", "sequences")

    def __init__(self, job: Job, rank: tuple[float, int], arrived_s: float) -> None:
        self.job, self.rank, self.arrived_s = job, rank, arrived_s
        self.sequences: list[_Sequence] = []
        self.joined = False  # is it in the batch?
        self.given_up = False  # was it, before?
        self.counted: list[int] = []  # pages it is counted with since it joined, by group


class Scheduler:
    """``plan`` says what to compute, ``commit`` takes what came of it; between the two nothing but ``abort``, ``finish`` and ``learn`` may
    come. A token below 0 stands for one that is being drawn; the next plan may be made with it, and the next commit not before it is
    learned."""

    def __init__(self, cache: Cache, settings: Settings) -> None:
        self.cache, self.settings = cache, settings
        self.counters = Counters()
        self._waiting: list[_Live] = []  # by rank
        self._running: list[_Live] = []  # by rank
        self._jobs: dict[int, _Live] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._arrivals = itertools.count()
        self._places = self._places_wanted = 0  # slots of those running, and of those waiting
        self._planned: dict[int, Entry] = {}  # by sequence, while a plan is made
        self._gave_way: list[_Live] = []  # in this plan
        self._held: Collection[int] = ()  # in this plan
        self._may_score = 0  # tokens, in what is left of this plan
        self._now_s = 0.0  # of this plan
        self.let_in: list[tuple[int, float]] = []
        """Of the last plan: the requests that joined the batch for the first time, and how many seconds each had waited."""
        self._scoring: dict[int, int] = {}  # tokens of those, by job that takes them
        self._costs = settings.costs or Costs()  # in this plan
        self._bounded = False  # in this plan: may prompts take less than the budget leaves?

    # --- from outside

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are."""
        return len(self._running)

    def pages(self) -> list[SequencePages]:
        """Of all sequences, running or swapped out."""
        return [sequence.pages for sequence in self._sequences.values()]

    def hurt(self, moves: Sequence[Move]) -> list[int]:
        """``moves`` failed: the sequences, running or swapped out, that cannot go on from what they have. They are to be ended."""
        lost = self.cache.lose(moves)
        return [id for id, sequence in self._sequences.items() if self.cache.hurt(sequence.pages, lost)]

    def submit(self, job: Job, sequence: int, now_s: float) -> None:
        """Let ``job`` wait; its first sequence is called ``sequence``. Raises NeverFitsError for one that could not run alone."""
        self._check_fits(job)
        waiting = _Live(job, (self.settings.order.rank(now_s, job.priority), next(self._arrivals)), now_s)
        first = _Sequence(sequence, waiting, list(job.prompt), self.cache.start(job.key))
        waiting.sequences.append(first)
        self._jobs[job.id], self._sequences[sequence] = waiting, first
        self._wait(waiting)

    def abort(self, job: int) -> None:
        """End all of a request, wherever it is; an unknown one has ended already."""
        if (found := self._jobs.get(job)) is not None:
            for sequence in list(found.sequences):
                self._remove(sequence)

    def finish(self, sequence: int) -> None:
        """End one sequence; an unknown one has ended already."""
        if (found := self._sequences.get(sequence)) is None:
            return
        if not self.settings.batching.rectangular:
            self._remove(found)
            return
        found.ended = True

    # --- a step

    def plan(self, now_s: float, held: Collection[int] = (), costs: Costs | None = None) -> StepPlan:
        """What to compute next. It has no entries where nothing can be done now: there is no work, or a batch is not to begin yet.

        Of the jobs ``held`` nothing is drawn in this step: their last known token waits. ``costs`` are those of the settings unless
        given."""
        batching = self.settings.batching
        self._planned.clear()
        self._now_s, self.let_in = now_s, []
        self._held = held
        self._costs = costs or self.settings.costs or Costs()
        self._gave_way.clear()
        self._may_score = self.settings.scored_tokens
        self._scoring.clear()
        if batching.rectangular and all(each.ended for running in self._running for each in running.sequences):
            for each in [each for running in self._running for each in running.sequences]:
                self._remove(each)
        each_ready = [(running, _ready(running)) for running in self._running]
        spare = self.settings.step_tokens - sum(len(running.sequences) for running, ready in each_ready if ready)
        beside = self._beside(each_ready, spare)
        self._bounded = beside < spare
        self._add_all(each_ready, beside, now_s)
        if not self._planned and self._bounded:  # who has one token to go has no page for it
            self._bounded = False
            self._add_all(each_ready, spare, now_s)
        if not self._planned and self._gave_way:  # who gave way had taken what others who run, or joined, were left without
            for running in [*self._running]:
                if running.joined:
                    spare = self._add(running, spare, _ready(running))
        return StepPlan(self.cache.take_moves(), tuple(self._planned.values()))

    def commit(self, plan: StepPlan, draws: Draws, failed: Collection[int] = ()) -> list[tuple[int, int]]:
        """Take note that ``plan`` was computed and what was drawn; of ``failed`` sequences nothing was. Returns the (sequence, token) pairs
        that count: those of sequences that have ended meanwhile do not."""
        self.counters.steps += 1
        self.counters.shared_steps += len(plan.entries) > 1
        drawn: list[tuple[int, int]] = []
        for entry in plan.entries:
            sequence = self._sequences.get(entry.sequence)
            if sequence is None or entry.sequence in failed:
                continue
            count = len(entry.tokens)
            if sequence.ended:
                self.counters.padding_tokens += count
                sequence.pages.length = entry.start + count
                continue
            self.counters.computed_tokens += count
            behind = count > 1 or not entry.draws
            self.cache.advance(sequence.pages, sequence.known, entry.start + count, snapshot=behind)
            if entry.draws:
                drawn += self._go_on(sequence, draws[entry.sequence])
        return drawn

    def learn(self, sequence: int, token: int) -> None:
        """The last known token of a sequence, which stood for one that was being drawn, is this; an unknown sequence has ended already."""
        if (found := self._sequences.get(sequence)) is not None:
            found.known[-1] = token

    # --- planning

    def _beside(self, each_ready: Sequence[tuple[_Live, bool]], spare: int) -> int:
        """How much of the budget prompts may take beside those who have one token to go."""
        if math.isinf(self.settings.stretch):
            return spare
        rows = sum(len(running.sequences) for running, ready in each_ready if ready and running.job.id not in self._held)
        joining = max(0, min(self._places_wanted, self.settings.batching.slots - self._places))
        behind = joining + sum(len(running.sequences) for running, ready in each_ready if not ready)
        if not rows or not behind:
            return spare
        return min(spare, self._costs.tokens_beside(rows, behind, self.settings.stretch))

    def _add_all(self, each_ready: Sequence[tuple[_Live, bool]], spare: int, now_s: float) -> None:
        """Plan what those who run compute and let others join, as far as ``spare`` tokens go beside those who are ready."""
        for running, ready in each_ready:
            if running.joined:  # not so who gave way to one before
                spare = self._add(running, spare, ready)
        batching = self.settings.batching
        if self._waiting and batching.opens(len(self._running), self._places_wanted, now_s - self._waiting[0].arrived_s):
            self._let_in(spare)

    def _add(self, running: _Live, spare: int, ready: bool) -> int:
        """Plan what ``running`` computes; what is left of the budget. One that is not ready takes of it, a ready one has its own share."""
        if ready:
            self._add_ready(running)
            return spare
        together = len(running.sequences) > 1
        stays = together or running.job.id in self._held  # several draw together, when all have only that to do
        for sequence in running.sequences:
            if sequence.pages.fresh:
                self.cache.adopt(sequence.pages, self.cache.find(sequence.pages, sequence.known))
            behind = len(sequence.known) - sequence.pages.length - stays
            if behind < 1:
                continue
            most = min(spare, self._may_score) if running.job.scored else spare
            if most and (entry := self._entry(sequence, min(behind, most))) is not None:
                self._planned[entry.sequence] = entry
                spare -= len(entry.tokens)
                if running.job.scored:
                    self._may_score -= len(entry.tokens)
                    self._scoring[running.job.id] = self._scoring.get(running.job.id, 0) + len(entry.tokens)
            if together:
                return spare  # the next one finds this one's prefix when it is done
        if together and spare >= len(running.sequences):
            self._add_ready(running)
            spare -= len(running.sequences)
        return spare

    def _add_ready(self, running: _Live) -> None:
        """Plan one token of each of its sequences, or none."""
        if running.job.id in self._held:
            return
        if len(running.sequences) == 1:  # as nearly always
            if (only := self._entry(running.sequences[0], 1)) is not None:
                self._planned[only.sequence] = only
            return
        live = [(sequence, self._entry(sequence, 1)) for sequence in running.sequences if not sequence.ended]
        if all(entry is not None for _, entry in live):
            padding = [(sequence, self._entry(sequence, 1)) for sequence in running.sequences if sequence.ended]
            self._planned.update((sequence.id, entry) for sequence, entry in live + padding if entry is not None)

    def _entry(self, sequence: _Sequence, count: int) -> Entry | None:
        """The next ``count`` tokens, or fewer; None where there are no pages for them, though those who come later gave up theirs."""
        pages, known = sequence.pages, sequence.known
        start = pages.length
        if sequence.ended and start == len(known):
            known.append(known[-1])  # padding
        if self.cache.snapshots and count > 1:  # end with a page, where a snapshot can be taken
            end = min(start + count, len(known) - 1) // self.cache.page * self.cache.page
            count = end - start if end > start else count
        if not self._make_room(sequence, start + count):
            return None
        draws = start + count == len(known)
        return Entry(sequence.id, start, known[start : start + count], pages.tables, draws)

    def _make_room(self, sequence: _Sequence, length: int) -> bool:
        while not self.cache.grow(sequence.pages, length):
            padding = [each for running in self._running for each in running.sequences if each.ended]
            if sequence.ended:
                return False
            if padding:
                self._remove(padding[-1])
            elif self._running[-1] is not sequence.job:
                self._preempt(self._running[-1])
            else:
                return False
        return True

    def _preempt(self, running: _Live) -> int:
        """Take a job out of the batch, and of the plan; it waits where its rank puts it. Returns how many tokens were planned for it."""
        planned = [self._planned.pop(sequence.id, None) for sequence in running.sequences]
        self._may_score += self._scoring.pop(running.job.id, 0)
        for sequence in [each for each in running.sequences if each.ended]:
            self._remove(sequence)
        tokens = sum(len(entry.tokens) for entry in planned if entry is not None)
        if not running.joined:  # that was all of it
            return tokens
        self._leave(running)
        if self._swap_pays(running):
            self.cache.swap_out(running.sequences[0].pages)
            self.counters.swapped += 1
        else:
            for each in running.sequences:
                self.cache.free(each.pages)
            self.counters.recomputed += 1
        running.given_up = True
        self._gave_way.append(running)
        self._wait(running)
        return tokens

    def _swap_pays(self, running: _Live) -> bool:
        """Are its pages better moved out than computed again? Those that several share would come back apart, and might not fit."""
        cache, pages = self.cache, running.sequences[0].pages
        if len(running.sequences) > 1 or not pages.length or not cache.can_swap_out(pages):
            return False
        size = sum(cache.held(pages, index) * group.page_bytes for index, group in enumerate(cache.groups))
        return self._costs.swap_pays(pages.length, size)

    def _wait(self, live: _Live) -> None:
        bisect.insort(self._waiting, live, key=_rank)
        self._places_wanted += live.job.sequences

    def _wait_no_more(self, live: _Live) -> None:
        self._waiting.remove(live)
        self._places_wanted -= live.job.sequences

    def _join(self, waiting: _Live) -> None:
        self._wait_no_more(waiting)
        bisect.insort(self._running, waiting, key=_rank)
        self._places += waiting.job.sequences
        waiting.joined = True
        waiting.counted = [self._counted(waiting, index) for index in range(len(self.cache.groups))]

    def _leave(self, running: _Live) -> None:
        self._running.remove(running)
        self._places -= running.job.sequences
        running.joined = False

    def _let_in(self, spare: int) -> None:
        """Let those who wait join, in their order, while there are slots, tokens and pages; who ranks behind gives way to who ranks
        before. Nobody overtakes one who waits."""
        while self._waiting and self._waiting[0] not in self._gave_way:
            first = self._waiting[0]
            # A batch is not smaller for prompts that take several steps.
            while not (joins := (spare > 0 or self.settings.batching.rectangular) and self._can_join(first)):
                if (behind := self._who_gives_way(first, spare)) is None:
                    break
                spare += self._preempt(behind)
            if not joins:
                return
            self._join(first)
            sequence = first.sequences[0]
            if sequence.pages.places is not None:
                self.cache.swap_in(sequence.pages)
            elif not first.given_up:
                match = self.cache.find(sequence.pages, sequence.known)
                if self.cache.adopt(sequence.pages, match):
                    self.counters.hit_tokens += sequence.pages.length
                self.counters.prompt_tokens += len(first.job.prompt)
                self.let_in.append((first.job.id, self._now_s - first.arrived_s))
            spare = self._add(first, spare, ready=False)

    def _who_gives_way(self, first: _Live, spare: int) -> _Live | None:
        """The last who ranks behind ``first``. Where time bounds prompts and only tokens are short, the last who computes a prompt."""
        tokens_alone = self._bounded and spare <= 0
        for running in reversed(self._running):
            if running.rank <= first.rank:
                return None
            entries = [self._planned[each.id] for each in running.sequences if each.id in self._planned]
            if not tokens_alone or any(not entry.draws or len(entry.tokens) > 1 for entry in entries):
                return running
        return None

    def _can_join(self, waiting: _Live) -> bool:
        """Is there a slot, and room for what it is counted with beside what the others are?"""
        if self._places + waiting.job.sequences > self.settings.batching.slots:
            return False
        cache, sequence = self.cache, waiting.sequences[0]
        match = cache.find(sequence.pages, sequence.known) if sequence.pages.fresh else None
        for index, pool in enumerate(cache.pools):
            needed = self._counted(waiting, index)
            if match is not None and match.nodes and isinstance(cache.groups[index], TokenPages):
                needed = max(0, needed - len(match.nodes)) + cache.cost(match, index)
            promised = sum(
                max(0, running.counted[index] - sum(cache.held(each.pages, index) for each in running.sequences))
                for running in self._running
            )
            if pool.available < needed + promised:
                return False
        return True

    def _counted(self, running: _Live, index: int) -> int:
        """Pages of a group that a job is counted with."""
        longest = max(len(sequence.known) for sequence in running.sequences)
        most = len(running.job.prompt) + running.job.most - 1
        expected = len(running.job.prompt) + int(self.settings.output_share * running.job.most)
        return self._pages(running.job, min(max(longest + 1, expected), max(most, longest)), index)

    def _pages(self, job: Job, length: int, index: int) -> int:
        """Pages of a group for all of a job's sequences with ``length`` tokens each. Full pages of the prompt they have in common, where
        nothing but the tokens decides what is found again."""
        cache = self.cache
        each = cache.pages_for(index, length, self.settings.step_tokens)
        found_again = cache.tree is not None and job.key is not None
        by_tokens_alone = all(isinstance(group, TokenPages) and group.sees_all for group in cache.groups)
        common = min((len(job.prompt) - 1) // cache.page, each) if found_again and by_tokens_alone else 0
        return common + job.sequences * (each - common)

    def _check_fits(self, job: Job) -> None:
        length = len(job.prompt) + job.most - 1
        if job.sequences > self.settings.batching.slots:
            slots = self.settings.batching.slots
            raise NeverFitsError(f"{job.sequences} sequences are more than the {slots} that run together; ask for fewer")
        for index, group in enumerate(self.cache.groups):
            if (needed := self._pages(job, length, index)) > group.pages:
                raise NeverFitsError(
                    f"{len(job.prompt)} tokens and {job.most} more, {job.sequences} times, need {needed} pages of {group.name}, and the "
                    f"cache has {group.pages}; ask for fewer tokens, or give it {needed * group.page_bytes:,} bytes for {group.name}"
                )

    # --- committing

    def _go_on(self, sequence: _Sequence, tokens: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Append what was drawn for ``sequence`` and for those that fork from it here."""
        if len(tokens) == 1 and tokens[0][0] == sequence.id:  # as nearly always
            sequence.known.append(tokens[0][1])
            self.counters.drawn_tokens += 1
            return list(tokens)
        drawn = []
        for id, token in tokens:
            if id != sequence.id:
                fork = _Sequence(id, sequence.job, list(sequence.known), self.cache.fork(sequence.pages))
                fork.known.append(token)
                sequence.job.sequences.append(fork)
                self._sequences[id] = fork
                self.counters.forks += 1
                drawn.append((id, token))
        if own := [(id, token) for id, token in tokens if id == sequence.id]:
            sequence.known.append(own[0][1])
            drawn.insert(0, own[0])
        else:
            self._remove(sequence)
        self.counters.drawn_tokens += len(drawn)
        return drawn

    def _remove(self, sequence: _Sequence) -> None:
        self.cache.free(sequence.pages)
        running = sequence.job
        running.sequences.remove(sequence)
        del self._sequences[sequence.id]
        self._planned.pop(sequence.id, None)
        if running.sequences:
            return
        del self._jobs[running.job.id]
        if running.joined:
            self._leave(running)
        else:
            self._wait_no_more(running)


def _rank(running: _Live) -> tuple[float, int]:
    return running.rank


def _ready(running: _Live) -> bool:
    """Has each of its sequences one token to go?"""
    for sequence in running.sequences:  # noqa: SIM110 (asked of every sequence at every step: all() takes twice as long)
        if len(sequence.known) - sequence.pages.length != 1 and not sequence.ended:
            return False
    return True
