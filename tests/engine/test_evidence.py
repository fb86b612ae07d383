"""The runner of `make evidence`: what it runs, in which order, what it keeps, and what it must never call met."""

import json

import pytest

from benchmarks.evidence import __main__ as runner
from benchmarks.evidence.figures import (
    BestPeer,
    Field,
    Inside,
    LeastR2,
    LeastStep,
    Memory,
    OverBound,
    Passes,
    PeersAtBatch,
    Ratio,
    Recovered,
)
from benchmarks.evidence.lines import LINES, PASSED, Line, least, most
from benchmarks.ledger import Ledger
from hasten import _native


@pytest.fixture
def evidence(tmp_path):
    return lambda model=runner.MODEL: runner.Evidence(Ledger(tmp_path / "ledger.jsonl"), model, {}, tmp_path / "output.json")


def printing(tmp_path, name, number):
    """A command that notes that it ran, and prints an object."""
    code = f"import json; open({str(tmp_path / 'ran')!r}, 'a').write({name!r}); print(json.dumps(dict(x={number})))"
    return f'python -c "{code}"'.replace("{", "{{").replace("}", "}}")


def ran(tmp_path):
    return (tmp_path / "ran").read_text() if (tmp_path / "ran").is_file() else ""


def test_ratios_are_interleaved_kept_and_not_run_again(evidence, tmp_path):
    line = Line("T", "a over b", (printing(tmp_path, "a", 3), printing(tmp_path, "b", 2)), Ratio("x"), least(1.4), rounds=3, unit="×")
    first = evidence()
    assert first.verdict(line) == "not measured yet"
    first.run(line)
    assert ran(tmp_path) == "abbaab"
    assert first.verdict(line) == "1.5×, met"
    again = evidence()
    again.run(line)
    assert ran(tmp_path) == "abbaab"
    assert again.verdict(line) == "1.5×, met"
    kept = [json.loads(text)["value"] for text in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert len(kept) == 6
    assert {*kept[0]} == {"rows", "seconds", "machine", "commit", "date"}
    assert kept[0]["machine"]["isa"] == _native.isa_level()


def test_a_killed_run_goes_on_at_the_next_command(evidence, tmp_path):
    line = Line("T", "a over b", (printing(tmp_path, "a", 3), printing(tmp_path, "b", 2)), Ratio("x"), most(1), rounds=2)
    evidence().run(line)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:3])[:-9])  # killed while it noted the third
    assert evidence().verdict(line) == "not measured yet"
    evidence().run(line)
    assert ran(tmp_path) == "abba" + "ba"
    assert evidence().verdict(line) == "**1.5, missed**"


def test_a_command_that_fails_is_no_figure_and_runs_once(evidence, tmp_path):
    command = f"python -c \"open({str(tmp_path / 'ran')!r}, 'a').write('f'); raise SystemExit('it broke')\""
    lines = [Line("T", "fails", (command,), Passes(), PASSED), Line("T", "fails too", (command,), Field("x"), least(0))]
    shown = evidence()
    for line in lines:
        with pytest.raises(runner.Failed, match="it broke"):
            shown.run(line)
        assert shown.verdict(line) == "failed: exit 1, it broke"
    assert ran(tmp_path) == "f"
    assert evidence().verdict(lines[0]) == "not measured yet"


def test_what_printed_nothing_is_no_figure(evidence):
    line = Line("T", "silent", ('python -c "print(1)"',), Field("x"), least(0))
    shown = evidence()
    shown.run(line)
    assert shown.verdict(line) == "failed: 0 objects were printed, not one"
    passing = Line("T", "silent", ('python -c "print(1)"',), Passes(), PASSED)
    assert shown.verdict(passing) == "passes, met"


def test_what_this_machine_cannot_show_is_never_met(evidence):
    tiles = [line for line in LINES if line.needs]
    assert tiles
    assert {line.needs for line in tiles} == {"amx"}
    for line in tiles:
        assert (evidence().verdict(line) == "not measured yet") == ("amx" in _native.available_isas())
    shown = evidence()
    shown._refusals = {"amx": "this machine lacks amx_tile"}
    assert shown.verdict(tiles[0]) == "not on this machine: amx: this machine lacks amx_tile"
    peers = next(line for line in LINES if isinstance(line.figure, BestPeer))
    assert evidence().verdict(peers) == "not measured: needs --peers"


def test_another_model_meets_nothing(evidence, tmp_path):
    line = Line("T", "x of {model}", (printing(tmp_path, "a", 3) + " {model}",), Field("x"), least(1))
    shown = evidence("random:smollm2-135m")
    shown.run(line)
    assert shown.verdict(line) == "3 (a trial with random:smollm2-135m)"
    assert evidence().verdict(line) == "not measured yet"


def test_the_table_is_markdown(evidence, tmp_path):
    line = Line("T", "a | b", (printing(tmp_path, "a", 3),), Field("x"), most(1), unit=" s")
    header, dashes, row = runner.table(evidence(), [line]).splitlines()
    assert header == "| check | asked | measured | command |"
    assert dashes.count("---") == 4
    assert row.startswith("| a \\| b | ≤ 1 s | not measured yet | `python -c ")


def test_every_line_has_commands_that_can_be_told_apart(evidence):
    assert len({(line.table, line.check) for line in LINES}) == len(LINES)
    for line in LINES:
        assert all(runner.argv(command) for command in evidence().commands(line))
        assert not any("{" in command for command in evidence().commands(line))
        assert len(line.commands) == (2 if isinstance(line.figure, Ratio | OverBound | Recovered) else 1)


def test_figures():
    points = [{"x": x, "y": 2 * x + 1, "resident_bytes": 90 + x, "planned_bytes": 100} for x in (1, 2, 5)]
    assert LeastR2("x", "y").of([[points]]) == pytest.approx(1)
    assert Memory().of([[points]]) == pytest.approx(0.09)
    assert Field("x").of([[points[:1]], [points[1:2]], [points[2:]]]) == 2
    runs = [[[{"x": 6.0, "of": 2.0}], [{"x": 2.0, "of": 9.0}]], [[{"x": 9.0, "of": 3.0}], [{"x": 6.0, "of": 9.0}]]]
    assert OverBound("x", "of").of(runs) == pytest.approx((1.5 + 0.5) / 2)
    assert Inside("bytes", "all").of([[[{"bytes": {"all": 0.5}}]]]) == 0.5
    assert Recovered().of([[[{"loss": 2.25, "base_loss": 2.0}], [{"loss": 3.0, "base_loss": 2.0}]]]) == 0.75
    speeds = [{"weights": name, "batch": batch, "x": x} for batch in (1, 8) for name, x in (("a", 1.0), ("b", 4.0 / batch), ("c", 5.0))]
    assert LeastStep("x", 1, ("a", "b", "c")).of([[speeds]]) == 1.25
    assert LeastStep("x", 8, ("a", "b", "c")).of([[speeds]]) == 0.5
    with pytest.raises(LookupError):
        LeastStep("x", 1, ("a", "d")).of([[speeds]])
    row = {"bits": "int8", "tokens_per_s": {"batch 32": 10.0}, "hasten_over_it": {"batch 32": 3.0}}
    rows = [
        {**row, "runner": "hasten int8", "hasten_over_it": None, "tokens_per_s": {"batch 32": 30.0}},
        {**row, "runner": "slow int8"},
        {**row, "runner": "fast int8", "hasten_over_it": {"batch 32": 2.5}, "tokens_per_s": {"batch 32": 12.0}},
        {**row, "runner": "other bf16", "bits": "bf16", "hasten_over_it": {"batch 32": 1.0}, "tokens_per_s": {"batch 32": 20.0}},
    ]  # fmt: skip
    printed = [[[{"rows": rows}]]]
    assert BestPeer("int8", "batch 32").of(printed) == 2.5
    assert PeersAtBatch("int8", "batch 32").of(printed) == 1.5
    with pytest.raises(LookupError, match="no peer ran in int4"):
        BestPeer("int4", "batch 32").of(printed)


def test_json_objects_are_found_one_after_another():
    assert runner.rows_of('{"a": 1}\n{"a": 2}\n') == [{"a": 1}, {"a": 2}]
    assert runner.rows_of('{\n "a": [1]\n}\n') == [{"a": [1]}]
    assert runner.rows_of("3 passed in 2 s\n") == runner.rows_of("") == []
