"""`hasten prune` on the bundled model: what is written is sparse and smaller, plays natively as it was measured, and says what it is."""

import json

import numpy as np
import pytest

from hasten import LLM, SamplingParams
from hasten.checkpoint import load
from hasten.formats.quantized import QuantizedWeight
from hasten.measure import cut_windows, held_out
from hasten.measure.compare import compare, even_windows
from tests.cli import main

QUICK = ["--samples", "8", "--sequence", "64", "--gate-tokens", "500", "--no-speed"]
SKIP = ["--skip", "blocks.[1-7].*"]


@pytest.fixture
def hasten(monkeypatch, capsys):
    return lambda *arguments: main(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "form", "share"),
    [
        (["--method", "wanda", "--sparsity", "70%"], "bf16-sparse", (1 + 16 * 0.3) / 16),
        (["--sparsity", "2:4", "--weights", "int4-g64"], "int4-g64-sparse", (1 + 2 + 0.5) / 16),
        (["--method", "magnitude", "--weights", "int8", "--activations", "int8"], "int8-sparse", (1 + 4) / 16),
    ],
)
def test_what_is_written_is_sparse_and_smaller(options, form, share, tmp_path, hasten):
    out = tmp_path / "out"
    done = hasten("prune", "code-8m", out, *options, *SKIP, *QUICK, "--json", "--max-loss", "60")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["smaller_share"] == pytest.approx(share, abs=0.02)
    assert 0 < facts["kl"] < 1
    assert "hasten's own layout" in facts["unread_elsewhere"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no work, no trial
    read = load(out)
    stored = {name: weight for name, weight in read.weights.items() if isinstance(weight, QuantizedWeight)}
    assert len(stored) == 7
    assert {str(weight.form) for weight in stored.values()} == {form}
    assert sum(weight.nbytes for weight in stored.values()) == pytest.approx(facts["smaller_bytes"], rel=1e-3)
    for weight in stored.values():
        q = weight.quantized().q
        if "2:4" in options:
            assert (np.count_nonzero(q.reshape(-1, 4), axis=1) <= 2).all()
        assert np.count_nonzero(q) <= (0.31 if "70%" in options else 0.51) * q.size
    assert [step.transform for step in read.provenance][-1] == "measured"
    assert read.provenance[0].evidence["zeros"] == pytest.approx(0.7 if "70%" in options else 0.5, abs=0.01)
    # the same figure from the model as it is on disk
    (found,) = compare(load("code-8m"), [read], even_windows(cut_windows(read, held_out(), 512), 500), 512)
    assert found.loss == facts["loss"]


def test_what_was_pruned_is_generated_with_and_inspected(tmp_path, hasten):
    done = hasten("prune", "code-8m", tmp_path / "out", *SKIP, *QUICK)
    assert done.code == 0, done.err
    assert "code-8m → " in done.out
    assert "by sparsegpt" in done.out
    assert "transformers does not load what was written" in done.out
    llm = LLM(str(tmp_path / "out"))
    assert llm.notice == "" or "reference" not in llm.notice
    (made,) = llm.generate("def main(", SamplingParams(max_tokens=8))
    assert len(made.token_ids) == 8
    shown = hasten("inspect", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert "bf16-sparse" in shown.out
    assert "sparsegpt" in shown.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "magic"], "accepted: magnitude, wanda, sparsegpt"),
        (["--sparsity", "half"], "as 50%"),
        (["--weights", "int3"], "accepted: bf16, int8, int4"),
        (["--weights", "int4-zp"], "without -zp"),
        (["--weights", "bf16"], "not rounded to"),
        (["--activations", "int8"], "give --weights"),
        (["--skip", "blocks.99.*"], "mean no weight"),
    ],
)
def test_mistakes_are_told_before_anything_begins(options, said, tmp_path, hasten):
    done = hasten("prune", "code-8m", tmp_path / "out", *options)
    assert done.code == 2
    assert said in done.err
    assert not list(tmp_path.iterdir())


def test_so_few_zeros_that_nothing_is_smaller_are_refused(tmp_path, hasten):
    done = hasten("prune", "code-8m", tmp_path / "out", "--method", "magnitude", "--sparsity", "2%", *QUICK)
    assert done.code == 2
    assert "no smaller" in done.err
    assert not (tmp_path / "out").exists()
