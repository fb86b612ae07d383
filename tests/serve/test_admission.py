"""How much the server takes on."""

import pytest

from hasten.serve.admission import Admission


def test_what_runs_and_what_waits_is_bounded():
    admission = Admission(12, 8)
    assert [admission.take(1) for _ in range(14)] == [True] * 12 + [False] * 2
    admission.give_back(3, 1.0)
    assert [admission.take(2), admission.take(2), admission.take(1)] == [True, False, True]
    admission.draining = True
    admission.leave(12)
    assert not admission.take(1)


@pytest.mark.parametrize(
    ("taken", "outputs", "goes"), [(0, 256, True), (7, 256, True), (8, 256, False), (7, 5, True), (8, 4, True), (9, 4, False)]
)
def test_one_request_of_many_outputs_is_taken_while_nobody_waits(taken, outputs, goes):
    admission = Admission(12, 8)
    assert admission.take(taken) or not taken
    assert admission.take(outputs) is goes
    assert admission.taken == taken + outputs * goes
    if outputs == 256 and goes:
        assert not admission.take(1)
