"""Quantization-aware training: what comes out is stored as what went in, and is nearer to the original."""

import dataclasses
import json

import numpy as np
import pytest

from hasten.base.errors import ConfigError
from hasten.checkpoint import load
from hasten.compress.qat import Qat, qat
from hasten.compress.recipe import carry_out, recipe_of
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.model import Provenance
from tests.cli import main

QUICK = {"steps": 4, "tokens": 256, "sequence": 64, "precision": "float32", "warmup": 0.2, "rate": 0.002}
ROUNDED = {"weights": "int3-g64", "skip": ["blocks.[1-7].*"]}


@pytest.fixture(scope="module")
def original():
    return load("code-8m")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    random = np.random.default_rng(5)
    path.write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n\n" for n in random.integers(0, 10**6, 200)))
    return str(path)


@pytest.mark.parametrize("codes", ["learned", "kept"])
def test_it_learns_and_stays_in_its_format(original, text, codes, tmp_path):
    (rtn,) = recipe_of([{"rtn": ROUNDED}])
    rounded = carry_out(original, [rtn], None, Run(tmp_path / "rtn", 1))
    made = qat(rounded, Qat(**QUICK, text=text, codes=codes), original, Run(tmp_path / "qat", 1))
    names = [name for name, weight in made.weights.items() if isinstance(weight, QuantizedWeight)]
    assert len(names) == 7
    flipped = 0
    for name in names:
        before, after = rounded.weights[name], made.weights[name]
        assert (after.form, after.activations, after.nbytes) == (LinearFormat.parse("int3-g64"), "bf16", before.nbytes)
        assert not np.array_equal(before.quantized().scales, after.quantized().scales)
        flipped += int((before.quantized().q != after.quantized().q).sum())
        assert np.abs(after.quantized().q).max() <= 3
    assert (flipped > 0) == (codes == "learned")
    evidence = made.provenance[-1].evidence
    assert evidence["last_loss"] < 0.95 * evidence["first_loss"]
    assert (evidence["codes_changed"] > 0) == (codes == "learned")
    norms = "blocks.3.mixer_norm.weight"
    assert made.weights[norms].dtype == original.weights[norms].dtype


def test_it_begins_with_the_original_where_weights_were_only_rounded(original, text, tmp_path):
    """Measuring in between, as saving a model does, changes nothing; learning does, for then codes are no longer the original's."""
    (rtn,) = recipe_of([{"rtn": ROUNDED}])
    rounded = carry_out(original, [rtn], None, Run(tmp_path / "rtn", 1))
    found = {}
    for entry in (None, "measured", "heal"):
        came = rounded if entry is None else dataclasses.replace(rounded, provenance=(*rounded.provenance, Provenance(entry, {}, {})))
        made = qat(came, Qat(**QUICK, text=text), original, Run(tmp_path / f"after {entry}", 1))
        found[entry] = np.concatenate([made.weights[name].load().ravel() for name in made.weights if name.startswith("blocks.0.")])
    assert np.array_equal(found[None], found["measured"])
    assert not np.array_equal(found[None], found["heal"])


def test_it_needs_what_is_rounded(original, text, tmp_path):
    with pytest.raises(ConfigError, match="put it behind a transform that rounds"):
        qat(original, Qat(**QUICK, text=text), original, Run(tmp_path, 1))


def test_as_a_recipe_it_is_written_and_read_back(text, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps([{"rtn": ROUNDED}, {"qat": {**QUICK, "text": text}}]))
    done = main(
        monkeypatch,
        capsys,
        "apply",
        recipe,
        "code-8m",
        tmp_path / "out",
        "--no-speed",
        "--gate-tokens",
        "500",
        "--max-loss",
        "50",
        "--json",
    )
    assert done.code == 0, done.err
    read = load(tmp_path / "out")
    assert [entry.transform for entry in read.provenance] == ["rtn", "qat", "measured"]
    assert sum(isinstance(weight, QuantizedWeight) for weight in read.weights.values()) == 7
