"""`hasten export`: what only hasten stores, as transformers loads it, with the same logits; transformers is the judge."""

import json

import numpy as np
import pytest

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import exported, load, save, unread_elsewhere
from hasten.cli.inspect import describe
from hasten.compress.data import text_of
from hasten.compress.recipe import carry_out, recipe_of
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.program import lower
from tests.cli import main
from tests.compress.test_elsewhere import IDS, judged, relative
from tests.families.oracles import make_checkpoint

FEW = {"skip": ["blocks.[2-7].*"]}


def made_by(recipe, tmp_path, model=None):
    random = np.random.default_rng(1)
    model = model or load("code-8m")
    text = text_of("random ids", random.integers(0, model.spec.vocab, (4, 24)).tolist())
    return carry_out(model, recipe_of(recipe), text, Run(tmp_path / "work", 2))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ([{"magnitude": {**FEW, "sparsity": "50%"}}], "bf16-sparse"),
        ([{"magnitude": {**FEW, "sparsity": "2:4"}}, {"rtn": {**FEW, "weights": "int4-g64"}}], "int4-g64-sparse"),
        ([{"rtn": {**FEW, "weights": "int3-g64"}}], "int3"),
        ([{"codebook": {**FEW, "weights": "lut4-g64", "fit": "weights", "feedback": False}}], "lut4"),
        ([{"rtn": {**FEW, "weights": "int8", "head": "int8"}}], "int8"),
        ([{"rtn": {**FEW, "weights": "int4-g64-zp"}}], "int4"),
        (["share"], None),
        ([{"rank": {**FEW, "share": 0.3}}], None),
        (["share", {"rtn": {"weights": "int8"}}], None),
    ],
    ids=["sparse", "sparse int4", "int3", "codebook", "head", "zero points", "shared", "low rank", "shared int8"],
)  # fmt: skip
def test_what_only_hasten_stores_loads_in_transformers(recipe, said, tmp_path, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    made = made_by(recipe, tmp_path)
    assert unread_elsewhere(made)
    save(made, tmp_path / "made")
    done = main(monkeypatch, capsys, "export", tmp_path / "made", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["family"] == "llama"
    assert facts["weights"] > 0
    assert said is None or any(said in each for each in facts["stored"])
    read = load(str(tmp_path / "out"))
    assert not unread_elsewhere(read)
    assert read.source.family == "llama"
    assert [entry.transform for entry in read.provenance] == [*(entry.transform for entry in made.provenance), "export"]
    assert facts["bytes"] == pytest.approx(read.weights.nbytes, rel=1e-3)
    expected = judged(tmp_path / "out")
    assert relative(read.logits(IDS), expected) <= 1e-5
    assert relative(made.logits(IDS), expected) <= 1e-5
    assert relative(load("code-8m").logits(IDS), expected) > 1e-3  # the recipe did something


def test_pruned_weights_take_no_more_than_they_did_before(tmp_path):
    made = made_by([{"magnitude": {"sparsity": "50%"}}], tmp_path)
    assert exported(made).weights.nbytes == load("code-8m").weights.nbytes


def test_what_loads_elsewhere_stays_as_it_is(tmp_path, monkeypatch, capsys):
    made = made_by([{"rtn": {**FEW, "weights": "int4-g64"}}], tmp_path)
    assert not unread_elsewhere(made)
    assert all(weight is made.weights[name] for name, weight in exported(made).weights.items())
    save(made, tmp_path / "made")
    done = main(monkeypatch, capsys, "export", tmp_path / "made", tmp_path / "out")
    assert "every weight as it was stored" in done.out
    done = main(monkeypatch, capsys, "export", tmp_path / "made", tmp_path / "made" / "config.json" / "out")
    assert done.code == 2
    assert "cannot be written: " in done.err
    assert "choose another directory" in done.err


def test_weights_that_a_family_stores_together(tmp_path):
    pytest.importorskip("compressed_tensors")
    config = next(family for family in all_families() if family.name == "phi3").examples[0]
    make_checkpoint(config, tmp_path / "plain")
    model = load(str(tmp_path / "plain"))
    made = made_by([{"rtn": {"weights": "int3-channel", "layers": ["*.q.weight"]}}], tmp_path, model)
    assert unread_elsewhere(made)
    save(exported(made), tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, model.spec.vocab, 12).tolist()
    assert relative(made.logits(ids), judged(tmp_path / "out", ids)) <= 1e-5


def test_what_no_family_describes_is_refused_and_nothing_written(tmp_path, monkeypatch, capsys):
    made = made_by([{"linear_attention": {}}], tmp_path)
    with pytest.raises(UnsupportedError, match="cannot be exported: family llama does not describe"):
        exported(made)
    save(made, tmp_path / "made")
    done = main(monkeypatch, capsys, "export", tmp_path / "made", tmp_path / "out")
    assert done.code == 2
    assert "does not describe what the model has become" in done.err
    assert not (tmp_path / "out").exists()


def test_hastens_own_layout_remembers_the_family(tmp_path):
    made = made_by([{"magnitude": FEW}], tmp_path)
    save(made, tmp_path / "made")
    read = load(str(tmp_path / "made"))
    assert read.source == made.source
    facts = [describe(each, lower(each.spec)) for each in (read, exported(read))]
    assert [(each["family"], each["layout"]) for each in facts] == [("llama", "hasten"), ("llama", "llama")]
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    for original, source in ((None, None), ({"model_type": "no-such"}, None), ({"model_type": "llama"}, None), ({}, None)):
        (tmp_path / "made" / "config.json").write_text(json.dumps({**config, "original_config": original}))
        assert load(str(tmp_path / "made")).source == source
    (tmp_path / "made" / "config.json").write_text(json.dumps({**config, "original_config": [1]}))
    with pytest.raises(ConfigError, match="original_config is.*an object is needed"):
        load(str(tmp_path / "made"))
