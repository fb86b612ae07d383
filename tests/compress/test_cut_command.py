"""`hasten cut` and `hasten share` on the bundled model: smaller by what was asked, healed where asked, and read again."""

import json

import numpy as np
import pytest

from hasten.checkpoint import load
from hasten.cli import cut as command
from hasten.cli.quantize import healing
from tests.cli import main

QUICK = ["--samples", "4", "--sequence", "64", "--gate-tokens", "500", "--no-speed", "--max-loss", "400", "--json"]


@pytest.fixture
def hasten(monkeypatch, capsys):
    return lambda *arguments: main(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    ("asked", "share", "made"),
    [
        (["cut", "--neurons", "25%", "--layers", "2"], 0.63, ["cut_layers", "cut_neurons"]),
        (["share", "--every", "2"], 0.51, ["share"]),
        (["share", "--rank", "0.3"], 0.71, ["rank"]),
    ],
)
def test_what_is_written_is_smaller_by_what_was_asked(asked, share, made, tmp_path, hasten):
    name, *options = asked
    done = hasten(name, "code-8m", tmp_path / "out", *options, *QUICK)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["smaller"] == "blocks"
    assert share - 0.03 < facts["smaller_share"] < share
    read = load(tmp_path / "out")
    assert [entry.transform for entry in read.provenance] == [*made, "measured"]
    assert np.isfinite(read.logits([5, 6, 7])).all()
    assert hasten("inspect", tmp_path / "out").code == 0


def test_it_heals_where_asked(tmp_path, monkeypatch, hasten):
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x + 1\n\n\n" * 60)
    quick = {"steps": 2, "tokens": 128, "sequence": 64, "text": str(text), "precision": "float32"}
    asked = []
    monkeypatch.setattr(command, "healing", lambda minutes: asked.append(minutes) or [{"heal": quick}])
    done = hasten("share", "code-8m", tmp_path / "out", "--every", "2", "--heal", "7.5", *QUICK)
    assert done.code == 0, done.err
    assert asked == [7.5]
    assert [entry.transform for entry in load(tmp_path / "out").provenance] == ["share", "heal", "measured"]


def test_minutes_become_a_step_of_the_recipe():
    assert healing(None) == []
    assert healing(2.5) == [{"heal": {"minutes": 2.5}}]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["cut"], "nothing is to be cut; give --layers"),
        (["share"], "nothing is to be shared; give --every"),
        (["cut", "--neurons", "0"], "--neurons is '0'; accepted: a share"),
        (["cut", "--kv-heads", "125%"], "--kv-heads is '125%'; accepted"),
        (["cut", "--layers", "nan"], "--layers is 'nan'; accepted"),
        (["cut", "--layers", "8"], "8"),
        (["share", "--every", "1"], "every is 1"),
    ],
)
def test_what_means_nothing_is_refused(asked, said, tmp_path, hasten):
    name, *options = asked
    done = hasten(name, "code-8m", tmp_path / "out", *options, *QUICK)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
