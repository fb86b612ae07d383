"""`hasten bench throughput`: the bound by hand, and what it prints."""

import heapq
import json

import pytest

from hasten.base.errors import ConfigError
from hasten.measure.throughput import Bound, StepCost, Workload
from tests.cli import main


def test_the_bound_by_hand():
    # Two slots. Static: 8 + 4 + 6 steps of 2, 2 and 1 rows. Packed: 23 rows two by two.
    bound = Bound.of([8, 2, 3, 4, 6], 2)
    assert bound.steps == pytest.approx((8 + 4 + 6) / 12)
    assert bound.rows == pytest.approx((2 * 8 + 2 * 4 + 6) / 23)
    assert bound.measured is None
    assert Bound.of([9, 1], 2).steps == 1  # the longest is not shorter for being packed
    assert Bound.of([5, 5, 5, 5], 2) == Bound(1.0, 1.0)
    assert Bound.of([5], 4) == Bound(1.0, 1.0)
    # 3 s a step and 1 s a row, and five prompts of 10 tokens on both sides
    costs = Bound.of([8, 2, 3, 4, 6], 2, 10, StepCost(3.0, 1.0)).measured
    assert costs == pytest.approx((3 * 18 + 30 + 50) / (3 * 12 + 23 + 50))
    assert Bound.of([8, 2, 3, 4, 6], 2, 0, StepCost(1.0, 0.0)).measured == bound.steps
    assert Bound.of([8, 2, 3, 4, 6], 2, 0, StepCost(0.0, 1.0)).measured == bound.rows


def test_the_cost_of_a_step_is_found_among_odd_ones():
    steps = [(rows, 0.002 + 0.0005 * rows) for rows in [32] * 300 + list(range(1, 32)) * 3]
    steps += [(32, 0.5), (7, 0.5)]
    cost = StepCost.through(steps)
    assert (cost.fixed_s, cost.row_s) == (pytest.approx(0.002), pytest.approx(0.0005))
    assert StepCost.through([(32, 0.1)] * 50 + [(31, 0.1)]) is None


def test_lengths_are_log_uniform_and_seeded():
    lengths = Workload(requests=4000, output_min=16, output_max=512).lengths()
    assert (min(lengths), max(lengths)) == (16, 512)
    assert sum(length < 90 for length in lengths) == pytest.approx(2000, abs=150)
    assert lengths == Workload(requests=4000, output_min=16, output_max=512).lengths()
    assert lengths != Workload(requests=4000, output_min=16, output_max=512, seed=1).lengths()
    with pytest.raises(ConfigError, match="outputs of 9 to 3 tokens"):
        Workload(output_min=9, output_max=3)


def test_static_and_continuous_side_by_side(monkeypatch, capsys):
    arguments = ["bench", "throughput", "code-8m", "--requests", "9", "--slots", "3", "--output-min", "2", "--output-max", "24"]
    outcome = main(monkeypatch, capsys, *arguments, "--batching", "static,dynamic,continuous", "--backend", "cpu", "--json")
    assert outcome.code == 0
    rows = {row["batching"]: row for row in map(json.loads, outcome.out.splitlines())}
    assert rows.keys() == {"static", "dynamic", "continuous"}
    assert rows["static"]["padding_tokens"] > 0 == rows["continuous"]["padding_tokens"]
    assert rows["static"]["steps"] == rows["dynamic"]["steps"] > rows["continuous"]["steps"]
    ends = [0] * 3  # a slot takes the next as it comes free; prompts take the step that gives the first token
    for length in Workload(9, 32, 2, 24).lengths():
        heapq.heapreplace(ends, ends[0] + length)
    assert rows["continuous"]["steps"] == pytest.approx(max(ends), abs=4)
    measured = rows["static"]["steps"] / rows["continuous"]["steps"]
    assert 0.6 * rows["static"]["bound_steps"] < measured <= 1.05 * rows["static"]["bound_steps"]
    row = rows["continuous"]
    assert row["step_fixed_s"] + 3 * row["step_row_s"] == pytest.approx(row["seconds"] / row["steps"], rel=0.8)
    assert 1 <= row["bound_measured"] <= max(row["bound_steps"], row["bound_rows"])
    assert rows["static"]["bound_measured"] is None
    assert 0 < row["page_waste"] < row["page_waste_most"] < 1
    assert all(row["output_tokens"] == rows["static"]["output_tokens"] for row in rows.values())


def test_a_shared_prefix_is_computed_once(monkeypatch, capsys):
    arguments = ["bench", "throughput", "code-8m", "--requests", "8", "--slots", "8", "--prompt", "5", "--shared-prefix", "320"]
    outcome = main(
        monkeypatch, capsys, *arguments, "--output-min", "2", "--output-max", "2", "--prefix-cache", "off,on", "--backend", "cpu", "--json"
    )
    off, on = map(json.loads, outcome.out.splitlines())
    assert (off["hit_tokens"], on["hit_tokens"]) == (0, 6 * 320)  # the second begins in the same step as the first
    assert off["computed_tokens"] - on["computed_tokens"] == 6 * 320
    words = main(monkeypatch, capsys, *arguments, "--output-min", "2", "--output-max", "2", "--prefix-cache", "off,on").out
    assert "with over without the prefix cache" in words


@pytest.mark.parametrize("wrong", [["--batching", "eager"], ["--prefix-cache", "maybe"], ["--output-max", "4000"]])
def test_what_is_refused(wrong, monkeypatch, capsys):
    outcome = main(monkeypatch, capsys, "bench", "throughput", "code-8m", *wrong)
    assert outcome.code == 2
    assert any(word in outcome.err for word in ("static, dynamic, continuous", "on, off", "code-8m accepts up to 2048"))
