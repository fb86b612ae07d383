"""The load and fault checks of `make soak` in the small: what they bound hangs on nothing else that the machine does."""

import math

import pytest

from tests.serve.server import serving
from tests.soak import disconnects, drain, neighbours, overload, slowloris

pytestmark = pytest.mark.timed

LATE = 0.05
"""Of the moments at which the event loop is looked at; a busy machine may keep it waiting too."""


def test_ten_times_too_much():
    # In two seconds too few come at capacity for a queue to form: how long one may be is bounded by the time of an answer alone.
    bounds = overload.Bounds(refused_s=0.25, share=0.9, first=math.inf, goodput=0.7, late=LATE)
    with serving(*overload.ARGUMENTS) as server:
        found = overload.run(server, 2.0, 2.0, 1, 0, bounds)
    print(overload.told(found))
    assert found["refused"] > 50


def test_clients_that_go_away_anywhere():
    with serving(*disconnects.ARGUMENTS) as server:
        found = disconnects.run(server, 32, 0, LATE)
        assert server.stop() == 0
    print(disconnects.told(found))
    assert found["points"] >= 32


def test_an_end_under_many_streams():
    with serving(*drain.ARGUMENTS) as server:
        found = drain.run(server, 60)
    print(drain.told(found))
    assert found["streams"] == 64


def test_a_thousand_idle_sockets():
    with serving(*slowloris.ARGUMENTS) as server:
        found = slowloris.run(server, 1000, 0.8, 2, 2.0, LATE, closed=False)
    print(slowloris.told(found))
    assert found["files"] > 1000


def test_hostile_neighbours():
    with serving(*neighbours.ARGUMENTS) as server:
        found = neighbours.run(server, 1, 0, LATE)
    print(neighbours.told(found))
    assert found["canaries"] == len(neighbours.CANARIES)
