"""The soak's cells with few prompts each, and that the soak can fail, resumes, and does not take a run in which nothing fired."""

import dataclasses
import subprocess
import sys

import pytest

from benchmarks.ledger import ROOT, Ledger, source_digest
from hasten.backends.cpu import CpuBackend
from hasten.engine.batching import Continuous
from hasten.engine.plan import Settings
from hasten.program import Formats
from tests.soak import determinism
from tests.soak.determinism import CELLS, Cell, Difference, Player, prompts_of, require_fired, require_same, run_cell
from tests.soak.mechanisms import FEWEST, KINDS, WAYS, Same
from tests.soak.models import CONTEXT, model_of

FEW = 12


@pytest.mark.row("nondeterminism", "the same tokens however played")
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_same_tokens_however_they_are_played(cell):
    assert run_cell(cell, FEW, seed=3)["tokens"] > 30 * FEW


@pytest.mark.row("nondeterminism", "the same tokens however played")
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_hang_on_nothing_but_the_request(kind):
    same = Same(kind, FEWEST)
    for way in WAYS:
        assert same.run(way)["tokens"] > 10 * FEWEST
    same.expected[3] = (*same.expected[3][:-1], -1)
    with pytest.raises(Difference, match=f"batches: prompt 3, token {len(same.expected[3]) - 1} is"):
        same.run("batches")
    same = Same(kind, 1)
    with pytest.raises(Difference, match="never happened: swaps"):
        same.run("swaps")


@pytest.mark.parametrize(
    ("way", "settings"),
    [("priorities", Settings(64, Continuous(4))), ("chunks by time", Settings(256, Continuous(16)))],
)
def test_a_way_without_its_mechanism_does_not_count(monkeypatch, way, settings):
    """First-come in place of priorities, and chunks that the budget alone bounds."""
    monkeypatch.setitem(WAYS, way, dataclasses.replace(WAYS[way], settings=settings))
    with pytest.raises(Difference, match=f"never happened: {way}"):
        Same("window bf16", FEWEST).run(way)


def player_of(kind="window", cache="bf16", threads=1):
    return Player(CpuBackend(threads=threads).session(model_of(kind), CONTEXT, Formats("int8", None, cache)))


def test_other_numbers_are_noticed():
    """Keys and values in int8 move logits a little: the least that must be told apart."""
    prompts = prompts_of(FEW, 0)
    expected = player_of().alone(prompts)
    assert require_same("again", expected, player_of().alone(prompts)) == sum(each.params.max_tokens for each in prompts)
    with pytest.raises(Difference, match="other cache: prompt 0, .* alone on one thread"):
        require_same("other cache", expected, player_of(cache="int8").alone(prompts))
    changed = [dataclasses.replace(each, digests=[*each.digests[:-1], b"other"]) for each in expected]
    with pytest.raises(Difference, match="prompt 0, logits"):  # the same tokens from other logits
        require_same("changed", expected, changed)
    another = [dataclasses.replace(each, params=dataclasses.replace(each.params, seed=1)) for each in prompts]
    drawn = player_of().alone(another)
    assert [each.tokens for each in drawn[::2]] == [each.tokens for each in expected[::2]]  # greedy
    assert sum(a.tokens != b.tokens for a, b in zip(drawn[1::2], expected[1::2], strict=True)) > FEW // 4


def test_a_run_in_which_nothing_was_shared_does_not_count():
    player = player_of()
    player.alone(prompts_of(FEW, 0))
    with pytest.raises(Difference, match="never happened on 1 threads: batches, cuts"):
        require_fired(Cell("W8A8", "window", "bf16"), player, FEW)
    with pytest.raises(Difference, match="plays something else: cache"):
        determinism.require_cell(Cell("W8A8", "window", "int8"), player.session)
    with pytest.raises(Difference, match="plays something else: .*window"):
        determinism.require_cell(Cell("W8A8", "grouped-query", "bf16"), player.session)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "soak" / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.note("a", 1, value={"x": 1})
    ledger.note("a", 2, value={"x": 2})
    ledger.note("a", 1, value={"x": 3})
    path.write_text(path.read_text() + '{"key": ["b"], "val')  # killed while it wrote
    again = Ledger(path)
    assert (again.get("a", 1), again.get("a", 2), again.get("b"), again.get("a")) == ({"x": 3}, {"x": 2}, None, None)
    again.note("b", value={"x": 4})
    assert Ledger(path).get("b") == {"x": 4}


def test_the_digest_follows_what_runs(tmp_path):
    file = tmp_path / "more.py"
    file.write_text("1")
    before = source_digest(file)
    assert source_digest(tmp_path) == before != source_digest()
    file.write_text("2")
    assert source_digest(file) != before


def test_the_command_resumes_and_names_what_it_is_not_given(tmp_path):
    def soak(*arguments):
        command = [sys.executable, "-m", "tests.soak", "--ledger", str(tmp_path / "ledger.jsonl"), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert "no part 'walk'" in soak("walk").stderr
    assert "too few" in soak("--prompts", "12").stderr
    first = soak("determinism", "--prompts", "12")
    assert first.returncode == 0, first.stderr
    assert "tokens, 0 differ" in first.stdout
    assert "done before" not in first.stdout
    assert soak("determinism", "--prompts", "12").stdout.count("done before") == len(CELLS)
