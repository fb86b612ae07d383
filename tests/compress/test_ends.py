"""The embedding and the head: rounded where that is asked for, played as they are stored, and told of where they are left."""

import dataclasses
import json

import numpy as np
import pytest

from hasten.base.errors import UserError
from hasten.checkpoint import load, save
from hasten.compress.gates import check_written
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.safetensors import SafetensorsFile
from hasten.formats.weights import Weight, Weights
from tests.cli import main
from tests.compress.models import KINDS, small

IDS = np.random.default_rng(0).integers(0, 100, 24).tolist()
FEW = {"weights": "int8", "skip": ["blocks.[1-7].*"]}


def through(model, settings, work):
    return carry_out(model, recipe_of([{"rtn": settings}]), None, Run(work, 2))


def relative(a, b):
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


@pytest.fixture(scope="module")
def tied():
    return load("code-8m")


@pytest.mark.parametrize("form", ["int8", "int4-g64", "int3-g32-zp", "fp8"])
def test_a_head_that_is_the_embedding_is_rounded_with_it(form, tied, tmp_path):
    made = through(tied, {**FEW, "head": form}, tmp_path / "work")
    weight = made.weights["embedding.weight"]
    assert isinstance(weight, QuantizedWeight)
    assert str(weight.form) == form
    its, dense = weight.quantized(), tied.weights.array("embedding.weight").astype(np.float32)
    assert its.q.shape == dense.shape
    if form == "int8":
        expected = LinearFormat("int8").quantize(dense)
        assert np.array_equal(its.q, expected.q)
        assert np.array_equal(its.scales, expected.scales)
    else:
        assert np.square(weight.load() - dense).sum() <= np.square(weight.form.quantize(dense).dense() - dense).sum()
    save(made, tmp_path / "saved")
    read = load(str(tmp_path / "saved"))
    check_written(made, read)  # codes, scales, and the native engine's logits
    assert relative(read.logits(IDS, "cpu"), read.logits(IDS)) < 1e-2  # both play what is stored
    (file,) = (SafetensorsFile.open(path) for path in (tmp_path / "saved").glob("*.safetensors"))
    stored = sum(file.read(name).nbytes for name in file.entries if "embed" in name)
    assert stored == weight.nbytes + 16 * (form != "fp8")  # the shape beside packed numbers
    assert "embedding" not in " ".join(made.provenance[-1].evidence["left"])


@pytest.mark.parametrize(
    ("weights", "activations", "head", "fed"),
    [("int8", "int8", "fp8", "bf16"), ("fp8", "fp8", "int8", "bf16"), ("fp8", "fp8", "fp8", "fp8"), ("int8", "int8", "int4", "int8")],
)
def test_a_head_is_fed_what_the_others_are_or_bf16(weights, activations, head, fed, tied, tmp_path):
    made = through(tied, {**FEW, "weights": weights, "activations": activations, "head": head}, tmp_path)
    found = {name: weight.activations for name, weight in made.weights.items() if isinstance(weight, QuantizedWeight)}
    assert found.pop("embedding.weight") == fed
    assert set(found.values()) == {activations}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_told_with_its_bytes(kind, tmp_path):
    model = small(kind)
    plain = through(model, {"weights": "int8"}, tmp_path / "a").provenance[-1].evidence["left"]
    left = {name for name in model.weights if not name.startswith("blocks.") or "norm" in name or "router" in name}
    assert sum(each["weights"] for each in plain.values()) == len(left)
    assert sum(each["bytes"] for each in plain.values()) == sum(model.weights[name].nbytes for name in left)
    assert any(why.startswith("router") for why in plain) == (kind == "MoE")
    assert any(why.startswith("embedding") for why in plain)
    skipping = through(model, {"weights": "int8", "skip": ["*.mixer.q", "*.mixer.o"]}, tmp_path / "b").provenance[-1].evidence["left"]
    assert skipping["linear layer that was skipped"]["weights"] == 4


def test_ends_that_are_two_weights_are_rounded_by_themselves(tmp_path):
    model = next(each for each in map(small, KINDS) if not each.spec.head.tied)
    made = through(model, {"weights": "int8", "head": "int8", "embedding": "int4-g32"}, tmp_path)
    assert str(made.weights["head.weight"].form) == "int8"
    assert str(made.weights["embedding.weight"].form) == "int4-g32"
    meant = {name: Weight(weight.shape, weight.dtype, weight.load) for name, weight in made.weights.items()}
    assert np.array_equal(made.logits(IDS), dataclasses.replace(model, weights=Weights(meant)).logits(IDS))
    save(made, tmp_path / "saved")
    check_written(made, load(str(tmp_path / "saved")))


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([{"rtn": {"head": "int5"}}], "int5"),
        ([{"rtn": {"head": "bf16"}}], "not rounded to"),
        ([{"rtn": {"embedding": "int8"}}], "said by 'head: int8'"),
        (
            [{"rtn": {"skip": ["blocks.0.*"], "head": "int8"}}, {"gptq": {"layers": ["blocks.0.*"], "head": "int4"}}],
            "embedding.weight would",
        ),
    ],
)
def test_what_cannot_work_is_refused(listed, said, tied):
    with pytest.raises(UserError, match=said):
        check_recipe(tied, recipe_of(listed))


def test_the_command_rounds_the_head(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    quick = ["--skip", "blocks.[1-7].*", "--gate-tokens", "500", "--json"]
    done = main(monkeypatch, capsys, "quantize", "code-8m", out, "--method", "rtn", "--weights", "int8", "--head", "int8", *quick)
    assert done.code == 0, done.err
    assert str(load(str(out)).weights["embedding.weight"].form) == "int8"
    assert json.loads(done.out)["loss"] == pytest.approx(json.loads(done.out)["base_loss"], rel=5e-3)
