"""What the engine learns of its steps' times, and what the scheduler makes of it."""

import math
import random

import pytest

from hasten.base.errors import ConfigError
from hasten.engine.batching import ByPriority, Continuous
from hasten.engine.pace import ENOUGH, STALE, Pace
from hasten.engine.plan import Costs, Entry, Settings
from tests.pure.test_scheduler import job, make, step


def entries(rows, tokens=0):
    return [Entry(i, 9, [1], (), True) for i in range(rows)] + ([Entry(99, 0, [1] * tokens, (), False)] if tokens else [])


class Machine:
    """A scheduler whose steps take a millisecond for each of ``parts`` · rows and tokens, and ``fixed`` besides."""

    def __init__(self, fixed, token, noise=0.0, stretch=1.8, slots=16, tile=1):
        self.scheduler = make(100_000, settings=Settings(512, Continuous(slots), stretch=stretch))
        self.pace, self.fixed, self.token, self.noise, self.tile = Pace(Costs()), fixed, token, noise, tile
        self.random = random.Random(0)

    def step(self):
        """Seconds, and tokens by sequence."""
        plan = self.scheduler.plan(0.0, costs=self.pace.costs)
        rows = sum(len(entry.tokens) for entry in plan.entries)
        seconds = (self.fixed + self.token * -(-rows // self.tile) * self.tile) * (1 + self.noise * self.random.random())
        self.pace.note_step(plan.entries, seconds)
        self.scheduler.commit(plan, {entry.sequence: [(entry.sequence, 7)] for entry in plan.entries if entry.draws})
        return seconds, {entry.sequence: len(entry.tokens) for entry in plan.entries}


@pytest.mark.parametrize(("fixed", "token", "tile"), [(1.0, 1.0, 1), (100.0, 1.0, 1), (0.0, 1.0, 1), (50.0, 1.0, 16), (30.0, 0.01, 1)])
def test_a_step_with_a_long_prompt_takes_as_long_as_was_asked(fixed, token, tile):
    machine = Machine(fixed, token, noise=0.05, tile=tile)
    for id in range(15):
        machine.scheduler.submit(job(id, 3, 5000), id, 0.0)
    for _ in range(60):
        alone, planned = machine.step()
    assert planned == dict.fromkeys(range(15), 1)
    machine.scheduler.submit(job(15, 4000, 5), 15, 0.0)
    times, chunks = [], []
    while sum(chunks) < 4000:
        seconds, planned = machine.step()
        assert planned.keys() >= set(range(15))
        times.append(seconds)
        chunks.append(planned.get(15, 0))
    assert max(times) <= 2 * alone
    full = (fixed + token * (15 + 512)) / (fixed + token * 15)
    if full > 4:  # where all of the budget is much longer, what may be used is
        assert sorted(times)[len(times) // 2] > (1.4 if tile == 1 else 1.2) * alone
    elif full < 1.8:
        assert max(chunks) == 512 - 15


def test_prompts_alone_and_without_a_stretch_take_the_budget():
    machine = Machine(1.0, 1.0)
    machine.scheduler.submit(job(0, 2000, 5), 0, 0.0)
    assert [machine.step()[1] for _ in range(3)] == [{0: 512}] * 3
    machine = Machine(1.0, 1.0, stretch=math.inf)
    machine.scheduler.submit(job(0, 2, 500), 0, 0.0)
    machine.step()
    machine.scheduler.submit(job(1, 2000, 5), 1, 0.0)
    assert machine.step()[1] == {0: 1, 1: 511}


def test_many_who_wait_weigh_more_than_one_who_runs():
    machine = Machine(0.0, 1.0)
    machine.scheduler.submit(job(0, 2, 500), 0, 0.0)
    for _ in range(10):
        machine.step()
    for id in range(1, 16):
        machine.scheduler.submit(job(id, 100, 5), id, 0.0)
    chunks = [sum(machine.step()[1].values()) - 1 for _ in range(8)]
    assert max(chunks) == int(0.8 * 15)


def test_streams_are_timed_alone_when_there_are_more_and_after_a_while():
    pace = Pace(Costs())
    for _ in range(ENOUGH):
        assert pace.costs.tokens_beside(4, 1, 1.8) == 0
        pace.note_step(entries(4), 1.0)
    assert pace.costs.tokens_beside(4, 1, 1.8) > 0
    assert pace.costs.tokens_beside(3, 1, 1.8) == 0  # other rows
    for _ in range(STALE):
        pace.note_step(entries(4, 2), 1.5)
        assert pace.costs.token_s == pytest.approx(0.25)
        assert pace.costs.tokens_beside(4, 1, 1.8) == 3
    pace.note_step(entries(4, 2), 1.5)
    assert pace.costs.tokens_beside(4, 1, 1.8) == 0


def test_one_who_has_no_page_does_not_stop_the_others():
    """Who has a token to go has no page for it, and who has pages would wait until a step without was timed."""
    scheduler = make(pages=3, settings=Settings(8, Continuous(2), ByPriority(1.0), output_share=0.0, stretch=1.8))
    scheduler.submit(job(0, 3, 5), 0, 0.0)
    assert step(scheduler) == {0: 3}
    scheduler.submit(job(1, 8, 1, priority=9), 1, 0.0)
    plan = scheduler.plan(0.0, costs=Costs(token_s=1.0, rows=1, step_s=7.0, tried=100))
    assert {entry.sequence: len(entry.tokens) for entry in plan.entries} == {0: 1, 1: 5}
    scheduler.commit(plan, {0: [(0, 7)]})
    assert step(scheduler) == {1: 3}


@pytest.mark.parametrize("times", [10.0, 0.1])
def test_a_machine_that_became_slower_or_faster_is_noticed(times):
    machine = Machine(1.0, 1.0)
    for id in range(10):
        machine.scheduler.submit(job(id, 3, 5000), id, 0.0)
    for _ in range(30):
        machine.step()
    machine.scheduler.submit(job(10, 4000, 5), 10, 0.0)
    quick = [machine.step()[1].get(10, 0) for _ in range(20)]
    machine.fixed, machine.token = times, times
    then = [machine.step()[1].get(10, 0) for _ in range(60)]
    assert then.count(0) in range(1, 2 * ENOUGH + 1)
    assert min(chunk for chunk in then if chunk) >= 4  # nobody starves
    assert max(then) <= 2 * quick[-1]
    assert then[-1] == quick[-1] == 8


def test_rates_of_preemption_are_measured_unless_given():
    pace = Pace(Costs())
    pace.note_step(entries(0, 512), 2.56)
    pace.note_moves(1 << 20, 0.001)
    assert (pace.costs.token_s, pace.costs.byte_s) == (pytest.approx(0.005), pytest.approx(0.001 / (1 << 20)))
    pace.note_step(entries(0, 8), 1.0)  # too few to tell
    assert pace.costs.token_s == pytest.approx(0.005)
    given = Pace(Costs(1.0, 0.0), measured=False)
    given.note_step(entries(0, 512), 2.56)
    given.note_moves(1 << 20, 0.001)
    assert given.costs == Costs(1.0, 0.0)


def test_what_a_stretch_may_be():
    with pytest.raises(ConfigError, match="stretch is 1; accepted is more than 1"):
        Settings(stretch=1)
