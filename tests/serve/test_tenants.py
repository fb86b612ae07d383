"""What one tenant can learn of what another asked: nothing from either cache, and nothing from how soon its answers begin."""

import math
import os
import random

import pytest

from tests.soak import tenants
from tests.soak.tenants import OTHER, OWNER, told_apart

PAIRS = 30
CHANCE = 0.5 + 3.3 * 0.5 / math.sqrt(PAIRS)
"""What a coin passes once in two thousand times, over so many pairs (and over as many single decisions)."""


@pytest.fixture(scope="module")
def served():
    kept = os.environ["HASTEN_CACHE"]
    running = tenants.Served()
    yield running
    running.end()
    os.environ["HASTEN_CACHE"] = kept  # which the soak sets


@pytest.mark.timed
@pytest.mark.row("prefix cache", "other tenants' prompts by their timing")
@pytest.mark.row("prefix cache", "no hit across tenants")
def test_the_time_to_the_first_token_tells_nothing_of_another_tenant(served):
    apart = told_apart(tenants.run_pairs(served, 0, PAIRS, 0, OTHER))
    assert served.hits() == [0, 0]
    own = told_apart(tenants.run_pairs(served, 1, 12, 0, OWNER))  # of one's own it tells all: the caches are there
    assert own["quicker"] > 0.9
    assert own["threshold"] > 0.7
    assert all(count > 0 for count in served.hits())
    assert max(apart.values()) <= CHANCE, apart


def test_what_is_told_apart():
    chance = random.Random(0)
    coin = [(chance.gauss(10, 1), chance.gauss(10, 1)) for _ in range(2000)]
    assert all(abs(share - 0.5) < 0.04 for share in told_apart(coin).values())
    assert told_apart([(one, other + 10) for one, other in coin])["threshold"] > 0.99
    some = told_apart([(one, other + 0.5) for one, other in coin])
    assert all(0.57 < share < 0.68 for share in some.values())
    assert told_apart([(1.0, 1.0)] * 10) == {"quicker": 0.5, "threshold": 0.5}
