"""`hasten bench throughput`: the bound by hand, and what it prints."""

import json

import pytest

from hasten.base.errors import ConfigError
from hasten.measure.throughput import Bound, Workload
from tests.cli import main


def test_the_bound_by_hand():
    # Two slots. Static: 8 + 4 + 6 steps. Continuous: one slot takes 8, then 6; the other 2, 3 and 4.
    bound = Bound.of([8, 2, 3, 4, 6], 2)
    assert bound.steps == pytest.approx((8 + 4 + 6) / 14)
    assert bound.rows == pytest.approx((2 * 8 + 2 * 4 + 6) / 23)
    assert Bound.of([5, 5, 5, 5], 2) == Bound(1.0, 1.0)
    assert Bound.of([5], 4) == Bound(1.0, 1.0)


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
    # Where steps cost alike, what was measured in steps is the bound, but for those of the prompts.
    measured = rows["static"]["steps"] / rows["continuous"]["steps"]
    assert measured == pytest.approx(rows["static"]["bound_steps"], rel=0.15)
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
