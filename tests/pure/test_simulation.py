"""Ten thousand simulated runs of scheduler and cache, and planted faults that they must find."""

import collections
import itertools

import pytest

from hasten.cache import Cache, PagePool, PrefixTree
from hasten.engine.scheduler import Scheduler
from tests.pure.simulation import Ahead, Simulation, Violation

SEEDS, PARTS = 10_000, 16
AHEAD = 3_000
FIRED = (
    "ended", "aborts", "failures", "never fits", "hit_tokens", "padding_tokens", "recomputed", "swapped", "swaps in", "forks",
    "shared_steps", "evicted", "held", "timed alone", "pages not moved",
)  # fmt: skip


@pytest.mark.row("leaked pages", "every page counted after every step")
@pytest.mark.row("deadlock", "progress while there is work")
@pytest.mark.parametrize("part", range(PARTS))
def test_every_invariant_holds_after_every_step(part):
    seen = collections.Counter()
    for seed in range(part, SEEDS, PARTS):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {simulation.settings}, {simulation.groups}") from error
        seen.update(simulation.seen)
    assert all(seen[what] > 0 for what in FIRED), seen


def run_ahead(part):
    seen = collections.Counter()
    for seed in range(part, AHEAD, 4):
        simulation = Ahead(seed)
        try:
            simulation.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {simulation.settings}, {simulation.groups}") from error
        seen.update(simulation.seen)
    return seen


@pytest.mark.row("leaked pages", "every page counted after every step")
@pytest.mark.parametrize("part", range(4))
def test_every_invariant_holds_where_steps_are_planned_ahead(part):
    seen = run_ahead(part)
    assert all(seen[what] > 0 for what in (*FIRED, "feeds what is due", "ends ahead", "ends late")), seen


def test_a_token_that_is_never_learned_is_found(monkeypatch):
    monkeypatch.setattr(Scheduler, "learn", lambda *_: None)
    with pytest.raises(AssertionError):
        run_ahead(0)


def leak(monkeypatch):
    """Every hundredth page that is given back is lost."""
    give_back, calls = PagePool.give_back, itertools.count(1)
    monkeypatch.setattr(PagePool, "give_back", lambda pool, page: give_back(pool, page) if next(calls) % 100 else None)


def starvation(monkeypatch):
    """Who came last is let in first."""
    let_in = Scheduler._let_in

    def backwards(scheduler, spare):
        scheduler._waiting.reverse()
        let_in(scheduler, spare)
        scheduler._waiting.sort(key=lambda waiting: waiting.rank)

    monkeypatch.setattr(Scheduler, "_let_in", backwards)


def copy_forgotten(monkeypatch):
    take = Cache.take_moves
    monkeypatch.setattr(Cache, "take_moves", lambda cache: take(cache)[1:])


def tenants_mixed(monkeypatch):
    """Prefixes are found under any key."""
    root, find = PrefixTree.root, PrefixTree.find
    monkeypatch.setattr(PrefixTree, "root", lambda tree, key: root(tree, "all"))
    monkeypatch.setattr(PrefixTree, "find", lambda tree, key, tokens: find(tree, "all", tokens))


def window_too_short(monkeypatch):
    """A page goes back one token too early."""
    advance = Cache.advance

    def hasty(cache, sequence, tokens, length, snapshot=False):
        advance(cache, sequence, tokens, length, snapshot)
        for index, group in cache._windowed:
            if sequence.gone[index] < group.oldest(length + 1) // cache.page:
                cache.pools[index].give_back(sequence.tables[index][sequence.gone[index]])
                sequence.gone[index] += 1

    monkeypatch.setattr(Cache, "advance", hasty)


def lost_token(monkeypatch):
    """A forked sequence misses what it was forked for."""
    fork = Cache.fork

    def short(cache, sequence):
        other = fork(cache, sequence)
        if other.length > 1:
            other.length -= 1
        return other

    monkeypatch.setattr(Cache, "fork", short)


def unmoved_unnoticed(monkeypatch):
    """Who was to have the pages that were not moved goes on."""
    monkeypatch.setattr(Cache, "hurt", lambda cache, sequence, lost: False)


def unmoved_found(monkeypatch):
    """Snapshots that were not taken are found as prefixes."""
    monkeypatch.setattr(PrefixTree, "forget", lambda tree, pages: None)


@pytest.mark.row("leaked pages", "every page counted after every step")
@pytest.mark.parametrize(
    "plant", [leak, starvation, copy_forgotten, tenants_mixed, window_too_short, lost_token, unmoved_unnoticed, unmoved_found]
)
def test_a_planted_fault_is_found(monkeypatch, plant):
    plant(monkeypatch)
    found = []
    for seed in range(300):
        try:
            Simulation(seed).run()
        except Violation as violation:
            found.append(str(violation))
        except Exception as error:  # a fault may also make nonsense
            found.append(repr(error))
    assert found


def test_the_runs_without_a_fault_find_none():
    for seed in range(300):
        Simulation(seed).run()
