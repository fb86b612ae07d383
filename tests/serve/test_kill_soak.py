"""One round of the soak that kills engines under many streams, and that it can fail."""

import os

import pytest

from tests.soak import kill
from tests.soak.determinism import Difference

pytestmark = pytest.mark.timed


def test_a_round_and_one_that_asks_too_much(monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", os.environ["HASTEN_CACHE"])  # what the soak sets is taken back
    served = kill.Served()
    try:
        found = kill.run_round(served, 0, 0)
        assert found["streamed"] >= kill.SLOTS
        assert 0 < found["last_told_s"] <= kill.TOLD_S
        assert found["refusals"] > 0
        monkeypatch.setattr(kill, "TOLD_S", 0.001)
        with pytest.raises(Difference, match="waited|status"):
            kill.run_round(served, 1, 0)
    finally:
        served.end()
