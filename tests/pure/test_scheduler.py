"""The scheduler's promises one by one, on plans that can be read."""

import dataclasses

import pytest

from hasten.base.errors import ConfigError
from hasten.cache import Cache, StatePages, TokenPages
from hasten.engine.batching import ByPriority, Continuous, Dynamic, Static
from hasten.engine.plan import Costs, Job, NeverFitsError, Settings
from hasten.engine.scheduler import Scheduler
from hasten.program import CopyPage, SwapIn, SwapOut
from hasten.spec import SlidingWindow


def make(pages=64, *, settings=Settings(8, Continuous(4)), places=0, window=None, states=0):  # noqa: B008
    visible = {} if window is None else {"visible": SlidingWindow(window)}
    groups = [TokenPages("kv", pages, page_bytes=1, **visible)]
    groups += [StatePages("state", states, page_bytes=1)] if states else []
    return Scheduler(Cache(groups, 4, [places] * len(groups)), settings)


def step(scheduler, now=0.0, token=7):
    """One step in which every drawing sequence goes on with ``token``; returns what was planned as {sequence: tokens}."""
    plan = scheduler.plan(now)
    scheduler.commit(plan, {entry.sequence: [(entry.sequence, token)] for entry in plan.entries if entry.draws})
    return {entry.sequence: len(entry.tokens) for entry in plan.entries}


def job(id, length, most=100, **fields):
    return Job(id, tuple(range(id * 1000, id * 1000 + length)), most, **fields)


def test_a_long_prompt_takes_what_the_others_leave():
    scheduler = make(settings=Settings(8, Continuous(4)))
    for id in (0, 1, 2):
        scheduler.submit(job(id, 2), id, 0.0)
    assert step(scheduler) == {0: 2, 1: 2, 2: 2}
    scheduler.submit(job(3, 20), 3, 0.0)
    assert [step(scheduler) for _ in range(5)] == [{0: 1, 1: 1, 2: 1, 3: 5}] * 4 + [{0: 1, 1: 1, 2: 1, 3: 1}]


def test_so_many_tokens_of_scored_prompts_as_are_allowed():
    scheduler = make(settings=Settings(20, Continuous(4), scored_tokens=6))
    scheduler.submit(job(0, 14, scored=True), 0, 0.0)
    scheduler.submit(job(1, 9, scored=True), 1, 0.0)
    scheduler.submit(job(2, 30), 2, 0.0)
    assert [step(scheduler) for _ in range(3)] == [{0: 6, 2: 14}, {0: 6, 2: 14}, {0: 2, 1: 4, 2: 2}]
    assert [step(scheduler) for _ in range(2)] == [{0: 1, 1: 5, 2: 1}, {0: 1, 1: 1, 2: 1}]


def test_a_static_batch_is_as_large_as_its_slots_though_its_prompts_take_several_steps():
    scheduler = make(settings=Settings(8, Static(4)))
    for id in range(5):
        scheduler.submit(job(id, 6, 3), id, 0.0)
    assert step(scheduler) == {0: 6, 1: 2}
    assert step(scheduler) == {0: 1, 1: 4, 2: 3}
    assert step(scheduler) == {0: 1, 1: 1, 2: 3, 3: 3}
    assert step(scheduler) == {0: 1, 1: 1, 2: 1, 3: 3}
    assert (scheduler.running, scheduler.waiting) == (4, 1)


def test_who_decodes_does_not_give_way_while_a_step_is_timed():
    scheduler = make(settings=Settings(8, Continuous(4), ByPriority(1.0), stretch=1.8))
    scheduler.submit(job(0, 2), 0, 0.0)
    assert step(scheduler) == {0: 2}
    scheduler.submit(job(1, 6, priority=9), 1, 0.0)
    assert step(scheduler) == {0: 1}  # what a step without prompts takes is not known yet
    plan = scheduler.plan(0.0, costs=Costs(token_s=1.0, rows=1, step_s=5.0, tried=9))
    assert {entry.sequence: len(entry.tokens) for entry in plan.entries} == {0: 1, 1: 4}
    assert scheduler.counters.recomputed == 0


@pytest.mark.row("deadlock", "what never fits is refused")
def test_what_never_fits_is_refused_at_once_and_blocks_nobody():
    scheduler = make(pages=8)
    with pytest.raises(NeverFitsError, match=r"30 tokens and 10 more, 1 times, need 10 pages of kv, and the cache has 8"):
        scheduler.submit(job(0, 30, 10), 0, 0.0)
    with pytest.raises(NeverFitsError, match="5 sequences are more than the 4"):
        scheduler.submit(job(1, 2, 2, sequences=5), 1, 0.0)
    scheduler.submit(job(2, 23, 10), 2, 0.0)  # 32 tokens are computed: the last is drawn only
    assert step(scheduler) == {2: 8}
    scheduler.abort(2)
    scheduler.abort(2)
    assert not step(scheduler)


def test_a_step_must_hold_a_token_of_each():
    with pytest.raises(ConfigError, match="a step of 3 tokens cannot serve 4 sequences"):
        Settings(3, Continuous(4))
    with pytest.raises(ConfigError, match="output_share is 2"):
        Settings(output_share=2)


@pytest.mark.row("prefix cache", "no hit across tenants")
def test_a_prefix_is_computed_once_and_only_for_its_tenant():
    scheduler = make(settings=Settings(64, Continuous(4)))
    prompt = tuple(range(20))
    for id, key in enumerate(["a", "a", "b", None]):
        scheduler.submit(Job(id, (*prompt, 90 + id), 5, key=key), id, 0.0)
        assert step(scheduler)[id] == (1 if id == 1 else 21)
    assert scheduler.counters.hit_tokens == 20
    assert scheduler.counters.prompt_tokens == 84


def test_a_prefix_leaves_a_token_to_compute():
    scheduler = make(settings=Settings(64, Continuous(4)))
    for id in (0, 1):
        scheduler.submit(Job(id, tuple(range(8)), 5, key="a"), id, 0.0)
    assert step(scheduler) == {0: 8, 1: 8}  # neither knows of the other yet
    scheduler.submit(Job(2, tuple(range(8)), 5, key="a"), 2, 0.0)
    assert step(scheduler) == {0: 1, 1: 1, 2: 4}


def test_sequences_of_one_prompt_share_its_pages_until_they_write():
    scheduler = make(settings=Settings(64, Continuous(4)))
    scheduler.submit(job(0, 6, 9, sequences=3), 0, 0.0)
    scheduler.commit(scheduler.plan(0.0), {0: [(0, 1), (1, 2), (2, 3)]})
    assert scheduler.cache.pools[0].free == 62
    plan = scheduler.plan(0.0)
    assert [entry.tokens for entry in plan.entries] == [[1], [2], [3]]
    assert sum(isinstance(move, CopyPage) for move in plan.moves) == 2  # the last has the page to itself
    assert scheduler.cache.pools[0].free == 60
    scheduler.commit(plan, {0: [(0, 1)], 1: [], 2: [(2, 3), (3, 4)]})  # one beam ends, another forks
    assert scheduler.cache.pools[0].free == 61
    assert [entry.sequence for entry in scheduler.plan(0.0).entries] == [0, 2, 3]


@pytest.mark.parametrize(("byte_s", "swaps"), [(0.0, True), (1e3, False)])
def test_preemption_takes_the_cheaper_way(byte_s, swaps):
    settings = Settings(8, Continuous(4), output_share=0.0, costs=Costs(1.0, byte_s))
    scheduler = make(pages=6, settings=settings, places=6)
    for id in (0, 1):
        scheduler.submit(job(id, 4, 12), id, float(id))
    moves, made = [], {0: 4, 1: 4}
    for _ in range(40):
        plan = scheduler.plan(2.0)
        moves += plan.moves
        for entry in plan.entries:
            made[entry.sequence] += entry.draws
        scheduler.commit(plan, {entry.sequence: [(entry.sequence, 7)] for entry in plan.entries if entry.draws})
        for sequence in (0, 1):
            if made[sequence] == 16:
                scheduler.finish(sequence)
    assert made == {0: 16, 1: 16}
    counters = scheduler.counters
    assert (counters.swapped > 0, counters.recomputed > 0) == (swaps, not swaps)
    assert any(isinstance(move, SwapOut) for move in moves) == any(isinstance(move, SwapIn) for move in moves) == swaps
    assert counters.hit_tokens == 0  # what is computed again was not hit


def test_priority_is_worth_waiting():
    scheduler = make(settings=Settings(8, Continuous(1), order=ByPriority(10.0)))
    scheduler.submit(job(0, 2), 0, 0.0)
    assert step(scheduler, 0.0) == {0: 2}
    scheduler.submit(job(1, 2, priority=-1), 1, 1.0)  # as if it had come at 11
    scheduler.submit(job(2, 2), 2, 12.0)
    scheduler.submit(job(3, 2, priority=2), 3, 13.0)  # as if it had come at -7
    assert step(scheduler, 13.0) == {3: 2}
    scheduler.abort(3)
    assert step(scheduler, 14.0) == {0: 3}  # it goes on: prompt and what it had put out
    scheduler.abort(0)
    assert step(scheduler, 14.0) == {1: 2}


def test_static_batches_are_rectangles():
    scheduler = make(settings=Settings(8, Static(2)))
    for id in (0, 1, 2):
        scheduler.submit(job(id, 2), id, 0.0)
    assert step(scheduler) == {0: 2, 1: 2}
    scheduler.finish(0)
    assert step(scheduler) == {0: 1, 1: 1}  # a row for nobody
    assert step(scheduler) == {0: 1, 1: 1}
    scheduler.finish(1)
    assert step(scheduler) == {2: 2}
    assert scheduler.counters.padding_tokens == 2


def test_a_dynamic_batch_waits_for_company_but_not_for_ever():
    scheduler = make(settings=Settings(8, Dynamic(3, window_s=2.0)))
    for id in (0, 1):
        scheduler.submit(job(id, 2), id, 0.0)
    assert [step(scheduler, now) for now in (0.0, 1.9, 2.0)] == [{}, {}, {0: 2, 1: 2}]
    for id in (2, 3, 4, 5):
        scheduler.submit(job(id, 2), id, 2.0)
    for id in (0, 1):
        scheduler.finish(id)
    assert step(scheduler, 2.1) == {2: 2, 3: 2, 4: 2}


def test_recurrent_prefixes_are_found_where_a_snapshot_is():
    scheduler = make(settings=Settings(64, Continuous(4)), states=8)
    prompt = tuple(range(11))
    scheduler.submit(Job(0, prompt, 5, key="a"), 0, 0.0)
    assert [step(scheduler) for _ in range(2)] == [{0: 8}, {0: 3}]  # the prompt's last whole page ends a chunk
    scheduler.submit(Job(1, (*prompt[:9], 55), 5, key="a"), 1, 0.0)
    assert step(scheduler) == {0: 1, 1: 2}
    scheduler.submit(Job(2, (*prompt[:6], 55), 5, key="a"), 2, 0.0)  # there is a page of it, but no snapshot behind that
    assert step(scheduler)[2] == 4


def test_a_window_needs_its_last_pages_only():
    scheduler = make(pages=6, window=5, settings=Settings(4, Continuous(1)))
    scheduler.submit(Job(0, tuple(range(40)), 5, key="a"), 0, 0.0)  # ten pages, of which four are there at a time
    while step(scheduler) != {0: 1}:
        pass
    scheduler.abort(0)
    scheduler.submit(Job(1, (*range(39), 99), 5, key="a"), 1, 0.0)
    assert step(scheduler) == {1: 4}
    assert scheduler.counters.hit_tokens == 36


def test_plans_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().plan(0.0).entries = ()


def test_who_gives_way_leaves_what_it_took_to_others():
    """One scores its prompt, and with that all that may be scored in a step; another who would score joins; a third has it give way."""
    cache = Cache((TokenPages("window", 8, SlidingWindow(4), 10),), 4)
    scheduler = Scheduler(cache, Settings(4, Continuous(4), ByPriority(20.0), output_share=1.0, scored_tokens=1))
    scheduler.submit(Job(3, tuple(range(10)), 10, priority=-1, scored=True), 30, 0.0)
    plan = scheduler.plan(1.0)
    assert [entry.sequence for entry in plan.entries] == [30]
    scheduler.commit(plan, {})
    scheduler.submit(Job(2, tuple(range(5)), 4, sequences=3, key=2), 20, 2.0)
    scheduler.submit(Job(0, tuple(range(11)), 5, priority=1, scored=True), 10, 2.0)
    plan = scheduler.plan(3.0)
    assert scheduler.counters.swapped + scheduler.counters.recomputed == 1
    assert [(entry.sequence, len(entry.tokens)) for entry in plan.entries] == [(10, 1)]
