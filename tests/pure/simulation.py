"""A seeded run of scheduler and cache against a backend that only remembers. Every step is checked.

The fake backend keeps, for every token, a hash of it and all before it, where the page table says; it reads back all that the token sees
before it writes. A wrong page, a copy that was forgotten or a stale prefix is another hash. What is drawn hangs on that hash alone, so
that outputs can be told without the scheduler."""

import dataclasses
import math
import random

from hasten.cache import Cache, PageGroup, StatePages, TokenPages
from hasten.engine.batching import Batching, ByPriority, Continuous, Dynamic, FirstCome, Static
from hasten.engine.pace import ENOUGH, Pace
from hasten.engine.plan import Costs, Draws, Entry, Job, NeverFitsError, Settings, StepPlan
from hasten.engine.scheduler import Scheduler
from hasten.program import CopyPage, SwapIn, SwapOut
from hasten.spec import Causal, SegmentMemory, SlidingWindow

LETTERS = 3  # few tokens, so that prompts often begin alike


class Violation(AssertionError):
    """An invariant that does not hold."""


def check(holds: object, what: str) -> None:
    if not holds:
        raise Violation(what)


def chain(before: int, token: int) -> int:
    return hash((before, token))


class FakeBackend:
    """Pages of remembered hashes, by group; ``places`` are those outside."""

    def __init__(self, groups: tuple[PageGroup, ...], page: int) -> None:
        self.groups, self.page = groups, page
        self.stored = [[[0] * page for _ in range(group.pages)] for group in groups]
        self.places: list[dict[int, list[int]]] = [{} for _ in groups]
        self.tokens = 0

    def run(self, plan: StepPlan, hashes: dict[int, list[int]]) -> None:
        """``hashes`` are those of each sequence's known tokens."""
        for move in plan.moves:
            pages, places = self.stored[move.group], self.places[move.group]
            match move:
                case CopyPage():
                    pages[move.target] = list(pages[move.source])
                case SwapOut():
                    places[move.place] = list(pages[move.source])
                case SwapIn():
                    pages[move.target] = places.pop(move.place)
        for entry in plan.entries:
            for index, group in enumerate(self.groups):
                self._read(index, group, entry, hashes[entry.sequence])
        for entry in plan.entries:
            self.tokens += len(entry.tokens)
            for index, group in enumerate(self.groups):
                self._write(index, group, entry, hashes[entry.sequence])
        for entry in plan.entries:  # what one wrote must not be where another reads
            for index, group in enumerate(self.groups):
                self._read(index, group, entry, hashes[entry.sequence], len(entry.tokens))

    def _read(self, index: int, group: PageGroup, entry: Entry, hashes: list[int], more: int = 0) -> None:
        end, table, stored = entry.start + more, entry.pages[index], self.stored[index]
        if isinstance(group, StatePages):
            check(len(table) == 1 and (not end or stored[table[0]][0] == hashes[end - 1]), f"{group.name}: not the state at {end}")
            return
        for position in range(group.oldest(entry.start) // self.page * self.page, end, self.page):
            begin, upto = max(position, group.oldest(entry.start)), min(position + self.page, end)
            kept = stored[table[position // self.page]][begin - position : upto - position]
            check(kept == hashes[begin:upto], f"{group.name}: not the tokens {begin} to {upto}")

    def _write(self, index: int, group: PageGroup, entry: Entry, hashes: list[int]) -> None:
        end, table, stored = entry.start + len(entry.tokens), entry.pages[index], self.stored[index]
        if isinstance(group, StatePages):
            stored[table[0]] = [hashes[end - 1]] * self.page
            return
        for position in range(entry.start, end):
            stored[table[position // self.page]][position % self.page] = hashes[position]


@dataclasses.dataclass
class Client:
    """What the simulation knows of a request and of its sequences."""

    job: Job
    rank: tuple[float, int]
    known: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    hashes: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    choice: dict[int, int] = dataclasses.field(default_factory=dict)


def drawn_token(job: int, hash_: int, choice: int) -> int:
    return hash((job, hash_, choice)) % LETTERS


def expected_output(job: Job, choice: int) -> list[int]:
    """What the request's choice must put out, whatever happens around it."""
    value = key_hash(job)
    for token in job.prompt:
        value = chain(value, token)
    output = []
    for _ in range(job.most):
        output.append(drawn_token(job.id, value, choice))
        value = chain(value, output[-1])
    return output


def key_hash(job: Job) -> int:
    return hash((0, job.id) if job.key is None else (job.key,))  # of numbers only: those of text differ from run to run


class Simulation:
    """One seed: its sizes, its requests, and what goes wrong."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        self.faults = random.Random(seed)  # of its own, so that nothing else goes otherwise for it
        self.page = rng.choice((2, 3, 4))
        slots = rng.randint(1, 6)
        step_tokens = slots + rng.choice((0, 1, 5, 20))
        batching: Batching = rng.choice((Continuous(slots),) * 6 + (Static(slots), Dynamic(slots, 5.0)))
        self.order = rng.choice((FirstCome(), FirstCome(), ByPriority(20.0)))
        cost = Costs(1.0, rng.choice((0.0, 0.1, 100.0)))
        stretch = rng.choice((math.inf, math.inf, 1.2, 1.8, 4.0))
        share, scored = rng.choice((0.0, 0.0, 0.3, 1.0)), rng.choice((1, 3, 64))
        self.settings = Settings(step_tokens, batching, self.order, share, cost, stretch, scored)
        self.pace, self.token_s, self.stalled = Pace(cost), rng.choice((0.0, 0.1, 1.0)), 0
        self.groups = self._groups(slots)
        places = [rng.choice((0, group.pages)) for group in self.groups]
        self.cache = Cache(self.groups, self.page, places, prefixes=rng.random() < 0.85)
        self.scheduler = Scheduler(self.cache, self.settings)
        self.backend = FakeBackend(self.groups, self.page)
        self.clients: dict[int, Client] = {}
        self.of: dict[int, Client] = {}  # by sequence
        self.ids, self.now = 0, 0.0
        self.seen: dict[str, int] = {}
        self.computed = self.drawn = 0
        starts = [[rng.randrange(LETTERS) for _ in range(rng.randint(1, 14))] for _ in range(2)]
        self.jobs = [self._job(number, starts) for number in range(rng.randint(2, 9))]

    def _groups(self, slots: int) -> tuple[PageGroup, ...]:
        rng = self.random
        pages = rng.randint(4, 14)
        full = TokenPages("full", pages, Causal(), 10)
        window = TokenPages("window", rng.randint(4, 12), SlidingWindow(rng.randint(1, 9)), 10)
        segment = TokenPages("segment", pages, SegmentMemory(rng.randint(1, 5), rng.randint(1, 5)), 10)
        state = StatePages("state", slots + rng.randint(0, 4), 30)
        return rng.choice(((full,),) * 4 + ((full, window), (window,), (segment,), (full, state), (state,), (full, window, state)))

    def _job(self, number: int, starts: list[list[int]]) -> Job:
        rng = self.random
        start = rng.choice(starts)
        tail = [rng.randrange(LETTERS) for _ in range(rng.randint(0, 6))]
        prompt = (*start[: rng.randint(1, len(start))], *tail)
        key = rng.choice((1, 1, 1, 2, None))
        count = rng.choice((1, 1, 1, 2, 3))
        return Job(number, prompt, rng.randint(1, 12), count, rng.choice((0, 0, 1, -1)), key, key is None)

    # --- running

    def run(self) -> None:
        """All requests, from the first to the last; raises Violation."""
        arrivals, rng = list(self.jobs), self.random
        limit = 60 + 12 * sum((len(job.prompt) + job.most) * job.sequences for job in self.jobs)
        steps = 0
        while arrivals or self.clients:
            steps += 1
            check(steps < limit, "it does not come to an end")
            while arrivals and (not self.clients or rng.random() < 0.3):
                self._submit(arrivals.pop())
            if self.clients and rng.random() < 0.01:
                self._end(rng.choice(list(self.clients)), "aborts")
            self._step()
            self.now += 1.0
            self._check_pages()
        self._check_the_end()

    def _submit(self, job: Job) -> None:
        self.ids += 1
        try:
            self.scheduler.submit(job, self.ids, self.now)
        except NeverFitsError:
            self.note("never fits")
            return
        client = Client(job, (self.order.rank(self.now, job.priority), self.ids))
        value, hashes = key_hash(job), []
        for token in job.prompt:
            value = chain(value, token)
            hashes.append(value)
        client.known[self.ids], client.hashes[self.ids], client.choice[self.ids] = list(job.prompt), hashes, 0
        self.clients[job.id] = self.of[self.ids] = client

    def _end(self, job: int, why: str) -> None:
        self.scheduler.abort(job)
        del self.clients[job]
        self.note(why)

    def _step(self) -> None:
        self._run(*self._planned())

    def _planned(self) -> tuple[StepPlan, set[int]]:
        """A step that was computed, and the sequences of which nothing came."""
        held = [job for job in self.clients if self.random.random() < 0.02]
        plan = self.scheduler.plan(self.now, held, None if math.isinf(self.settings.stretch) else self.pace.costs)
        self.pace.note_step(plan.entries, self.random.random() + self.token_s * sum(len(entry.tokens) for entry in plan.entries))
        self._check_plan(plan, held)
        played, hurt = plan, set[int]()
        if plan.moves and self.faults.random() < 0.2:
            played, hurt = self._half_moved(plan)
        self._fail(hurt)  # before anything of theirs is computed or learned
        self.backend.run(played, {entry.sequence: self._hashes(entry) for entry in played.entries})
        return plan, hurt | {entry.sequence for entry in plan.entries if self.random.random() < 0.002}

    def _run(self, plan: StepPlan, failed: set[int]) -> None:
        draws: dict[int, list[tuple[int, int]]] = {}
        for entry in plan.entries:
            client = self.of[entry.sequence]
            self.computed += len(entry.tokens) * (entry.sequence in client.known and entry.sequence not in failed)
            if entry.draws and entry.sequence in client.known and entry.sequence not in failed:
                draws[entry.sequence] = self._draw(client, entry.sequence)
        self._take(plan, draws, failed)

    def _half_moved(self, plan: StepPlan) -> tuple[StepPlan, set[int]]:
        """What is left of a plan some of whose moves failed, and the sequences that fail for it."""
        done = tuple(move for move in plan.moves if self.faults.random() < 0.5)
        for move in plan.moves:
            if not isinstance(move, SwapOut):
                self.backend.stored[move.group][move.target] = [0] * self.page
        jobs = {self.of[sequence].job.id for sequence in self.scheduler.hurt(plan.moves)}
        self.note("pages not moved")
        left = tuple(entry for entry in plan.entries if self.of[entry.sequence].job.id not in jobs)
        hurt = {sequence for sequence, client in self.of.items() if client.job.id in jobs}
        for move in plan.moves:
            if isinstance(move, SwapOut) and move not in done:
                self.backend.places[move.group][move.place] = [0] * self.page
        return dataclasses.replace(plan, moves=done, entries=left), hurt

    def _hashes(self, entry: Entry) -> list[int]:
        client = self.of[entry.sequence]
        hashes = client.hashes[entry.sequence]
        if entry.sequence not in client.known:  # padding: its tokens count for nobody, but must not spoil another's
            for token in entry.tokens[len(hashes) - entry.start :]:
                hashes.append(chain(hashes[-1], token))
        check(hashes[entry.start] and list(entry.tokens) == self._tokens(client, entry), "tokens that are not the sequence's")
        return hashes

    def _tokens(self, client: Client, entry: Entry) -> list[int]:
        known = client.known.get(entry.sequence)
        return list(entry.tokens) if known is None else known[entry.start : entry.start + len(entry.tokens)]

    def _draw(self, client: Client, sequence: int) -> list[tuple[int, int]]:
        """The next token of a sequence, and of all that fork from it where it is the first of its request."""
        job, ids = client.job, [sequence]
        if len(client.known[sequence]) == len(job.prompt):
            for choice in range(1, job.sequences):
                self.ids += 1
                ids.append(self.ids)
                client.known[self.ids], client.choice[self.ids] = list(client.known[sequence]), choice
                client.hashes[self.ids] = list(client.hashes[sequence])
                self.of[self.ids] = client
        return [(each, drawn_token(job.id, client.hashes[sequence][-1], client.choice[each])) for each in ids]

    def _take(self, plan: StepPlan, draws: Draws, failed: set[int]) -> None:
        for sequence, token in self.scheduler.commit(plan, draws, failed):
            output = self._append(sequence, token)
            if len(output) == self.of[sequence].job.most or (token == 0 and len(output) > 6):
                self._finish(sequence)
        self._fail(failed)

    def _append(self, sequence: int, token: int) -> list[int]:
        """A token was drawn; the output so far."""
        client = self.of[sequence]
        self.drawn += 1
        client.known[sequence].append(token)
        client.hashes[sequence].append(chain(client.hashes[sequence][-1], token))
        return client.known[sequence][len(client.job.prompt) :]

    def _finish(self, sequence: int) -> None:
        client = self.of[sequence]
        output = client.known.pop(sequence)[len(client.job.prompt) :]
        expected = expected_output(client.job, client.choice[sequence])[: len(output)]
        check(output == expected, "an output that hangs on more than the request")
        self.scheduler.finish(sequence)
        if not client.known:
            del self.clients[client.job.id]
            self.note("ended")

    def _fail(self, failed: set[int]) -> None:
        for sequence in failed:
            if (client := self.of[sequence]).job.id in self.clients:
                self._end(client.job.id, "failures")
            else:
                self.scheduler.abort(client.job.id)  # padding

    def note(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    # --- invariants

    def _check_plan(self, plan: StepPlan, held: list[int]) -> None:
        batching, tokens = self.settings.batching, sum(len(entry.tokens) for entry in plan.entries)
        check(tokens <= self.settings.step_tokens, "more tokens than the budget")
        check(len(plan.entries) <= batching.slots, "more sequences than slots")
        scored = [entry for entry in plan.entries if (job := self.of[entry.sequence].job).scored and entry.start < len(job.prompt) - 1]
        check(sum(len(entry.tokens) for entry in scored) <= self.settings.scored_tokens, "more scored than may be")
        check(len({entry.sequence for entry in plan.entries}) == len(plan.entries), "a sequence twice in a step")
        check(all(entry.tokens for entry in plan.entries), "an entry without tokens")
        check(not any(entry.draws and self.of[entry.sequence].job.id in held for entry in plan.entries), "one that was held draws")
        if not self.clients:
            return
        if held:
            self.note("held")
        elif isinstance(batching, Continuous):
            first = min(self.clients.values(), key=lambda client: client.rank)
            check(plan.entries, "nothing is computed though there is work")
            advances = any(self.of[entry.sequence] is first for entry in plan.entries)
            self.stalled = 0 if advances else self.stalled + 1
            timed = 0 if math.isinf(self.settings.stretch) else ENOUGH * (batching.slots + 1)  # steps of those who run alone
            late = first.job.scored  # it came when others had what may be scored in a step
            check(self.stalled <= timed + late, "who comes first does not advance")
            self.note("timed alone" if self.stalled else "advances")
        elif isinstance(batching, Static):
            check(plan.entries, "nothing is computed though there is work")
        if any(isinstance(move, SwapIn) for move in plan.moves):
            self.note("swaps in")

    def _check_pages(self) -> None:
        cache = self.cache
        for index, (group, pool) in enumerate(zip(self.groups, cache.pools)):
            holders, in_tree = [0] * group.pages, [0] * group.pages
            for pages in self.scheduler.pages():
                held = pages.tables[index][pages.gone[index] :]
                check(len(set(held)) == len(held), f"{group.name}: a sequence holds a page twice")
                for page in held:
                    holders[page] += 1
            for node in cache.tree.nodes() if cache.tree else ():
                if node.pages[index] >= 0:
                    in_tree[node.pages[index]] += 1
            check(max(in_tree, default=0) <= 1, f"{group.name}: two nodes hold one page")
            check([a + b for a, b in zip(holders, in_tree)] == pool.holders, f"{group.name}: counts are not the holders")
            check(
                sorted(pool._free) == [page for page, count in enumerate(pool.holders) if not count], f"{group.name}: free + used ≠ total"
            )
            idle = sum(in_tree[page] and not holders[page] for page in range(group.pages))
            check(pool.idle == idle, f"{group.name}: {pool.idle} idle pages, but {idle} are")
            outside = sum(len(pages.places[index]) for pages in self.scheduler.pages() if pages.places is not None)
            check(cache.places[index].pages - cache.places[index].free == outside, f"{group.name}: places outside are lost")
            check(len(self.backend.places[index]) <= cache.places[index].pages, f"{group.name}: more outside than there are places")
        counters = self.scheduler.counters
        check(counters.computed_tokens == self.computed, "computed tokens do not add up")
        check(counters.computed_tokens + counters.padding_tokens <= self.backend.tokens, "more tokens counted than computed")
        check(counters.drawn_tokens == self.drawn, "drawn tokens do not add up")
        check(counters.hit_tokens <= counters.prompt_tokens, "more hits than prompts")

    def _check_the_end(self) -> None:
        self.scheduler.plan(self.now)
        self.cache.take_moves()
        check(not self.scheduler.pages() and not self.scheduler.waiting and not self.scheduler.running, "something is left")
        for index, pool in enumerate(self.cache.pools):
            check(pool.available == pool.pages, "pages are lost")
            while pool.idle:
                check(self.cache.tree is not None and self.cache.tree.evict(index), "an idle page cannot be had")
        check(self.cache.tree is None or not list(self.cache.tree.nodes()), "nodes that hold nothing")
        counters = dataclasses.asdict(self.scheduler.counters)
        counters["evicted"] = self.cache.tree.evicted if self.cache.tree else 0
        for name, value in counters.items():
            self.seen[name] = self.seen.get(name, 0) + value


class Ahead(Simulation):
    """A backend that tells its tokens one step late: the next step is planned before, and feeds them by itself. It knows them at once, and
    ``due`` are those that the scheduler does not."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.due: dict[int, int] = {}

    def _run(self, plan: StepPlan, failed: set[int]) -> None:
        self._learn()
        if self.random.random() < 0.3 or any(self._forks(entry) for entry in plan.entries):
            super()._run(plan, failed)
            return
        drawn: dict[int, int] = {}
        for entry in plan.entries:
            client = self.of[entry.sequence]
            if entry.sequence not in client.known or entry.sequence in failed:
                continue
            self.computed += len(entry.tokens)
            if entry.draws:
                ((_, drawn[entry.sequence]),) = self._draw(client, entry.sequence)
        for sequence, token in self.scheduler.commit(plan, {sequence: [(sequence, -2)] for sequence in drawn}, failed):
            check(token == -2, "a token that nobody has told")
            self.due[sequence] = drawn[sequence]
            if len(self._append(sequence, drawn[sequence])) == self.of[sequence].job.most:
                self._finish(sequence)  # that is known before its last token is
                self.note("ends ahead")
        self._fail(failed)

    def _learn(self) -> None:
        for sequence, token in self.due.items():
            self.scheduler.learn(sequence, token)
            known = self.of[sequence].known.get(sequence, [])
            if self.of[sequence].job.id in self.clients and token == 0 and len(known) - len(self.of[sequence].job.prompt) > 6:
                self._finish(sequence)
                self.note("ends late")
        self.due.clear()

    def _forks(self, entry: Entry) -> bool:
        client = self.of[entry.sequence]
        known = client.known.get(entry.sequence, ())
        return entry.draws and client.job.sequences > 1 and len(known) == len(client.job.prompt)

    def _tokens(self, client: Client, entry: Entry) -> list[int]:
        tokens = super()._tokens(client, entry)
        if entry.tokens[-1] < 0:
            check(entry.sequence in self.due, "a token that nobody draws")
            self.note("feeds what is due")
            tokens[-1] = entry.tokens[-1]
        return tokens
