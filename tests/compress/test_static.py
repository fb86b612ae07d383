"""Static activation scales: found on text, played by both backends, written for other engines and read back."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from hasten import load, save
from hasten.backends.reference import play
from hasten.backends.reference.play import weights_of
from hasten.base.errors import CheckpointError, ConfigError
from hasten.checkpoint.quantized import read_quantized
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight, StaticWeight, static
from hasten.formats.safetensors import SafetensorsFile
from hasten.formats.weights import Weight, Weights
from hasten.program import Batch, Formats, linear_formats, lower, ops
from tests.cli import main
from tests.compress.models import KINDS, small, windows_for
from tests.families.oracles import make_checkpoint
from tests.pure.test_compressed_tensors import quantized

IDS = np.random.default_rng(0).integers(0, 8192, 48).tolist()


def through(model, listed, work, threads=2):
    return carry_out(model, recipe_of(listed), windows_for(model), Run(work, threads))


def steps_of(model):
    return {name: weight.input_scale for name, weight in model.weights.items() if isinstance(weight, StaticWeight)}


def program_of(model):
    program = lower(model.spec)
    return lower(model.spec, formats=linear_formats(program, Formats(), model.weights))


def with_steps(model, step):
    weights = {
        name: static(weight, step(name)) if isinstance(weight, QuantizedWeight) else weight for name, weight in model.weights.items()
    }
    return dataclasses.replace(model, weights=Weights(weights))


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_those_of_what_is_read(kind, tmp_path):
    model = small(kind)
    listed = [{"rtn": {"weights": "int8", "activations": "int8"}}, {"static": {"range": "largest"}}]
    made = through(model, listed, tmp_path)
    steps, names = steps_of(made), {name for name, weight in made.weights.items() if isinstance(weight, QuantizedWeight)}
    assert steps.keys() == names
    assert len({steps[f"blocks.0.mixer.{name}.weight"] for name in "qkv"}) == 1  # they read one value
    plain = {name: Weight(weight.shape, weight.dtype, weight.load) for name, weight in made.weights.items()}
    program = lower(model.spec).with_outputs(["blocks.1.mixer_norm"])  # played in one piece, where the walk plays blocks
    seen = play(program, weights_of(program, Weights(plain), "cpu"), Batch.of(windows_for(model).windows, rows="none"))[0]
    assert steps["blocks.1.mixer.q.weight"] == pytest.approx(float(seen["blocks.1.mixer_norm"].abs().max()) / 127, rel=1e-4)
    assert [step.transform for step in made.provenance] == ["rtn", "static"]


def test_a_range_of_least_error_is_no_larger_and_closer(tmp_path):
    model = small()
    rounding = {"rtn": {"weights": "int8", "activations": "int8"}}
    most, least = (through(model, [rounding, {"static": {"range": each}}], tmp_path / each) for each in ("largest", "error"))
    wide, narrow = steps_of(most), steps_of(least)
    assert all(narrow[name] <= wide[name] for name in wide)
    assert any(narrow[name] < wide[name] for name in wide)
    assert steps_of(through(model, [rounding, {"static": {}}], tmp_path / "one", threads=1)) == narrow


@pytest.mark.parametrize("kind", KINDS)
def test_both_backends_play_them(kind, tmp_path):
    model = small(kind)
    dynamic = through(model, [{"rtn": {"weights": "int8", "activations": "int8"}}], tmp_path / "dynamic")
    made = with_steps(dynamic, lambda name: 0.02 if "down" in name else 0.03)
    program = program_of(made)
    kinds = [type(op) for op in program.ops]
    assert kinds.count(ops.QuantizeFixed) == 8
    assert kinds.count(ops.QuantizeRows) == 0
    ids = np.random.default_rng(1).integers(0, model.spec.vocab, 40).tolist()
    a, b = made.logits(ids), made.logits(ids, "cpu")
    assert np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < 0.06  # bf16 in the native backend's attention, and other roundings since
    assert np.abs(a - dynamic.logits(ids)).max() > 1e-3
    # one scale, whatever else is in the sequence: a token's logits do not depend on how large later ones are
    assert np.array_equal(made.logits(ids, "cpu")[:20], made.logits(ids[:20], "cpu"))
    # coarse steps are heard: everything is clipped to ±127 · 1e-4
    clipped = with_steps(dynamic, lambda name: 1e-4).logits(ids, "cpu")
    assert np.abs(clipped - b).max() > 0.1


def test_products_of_one_value_with_two_scales_have_two_roundings(tmp_path):
    dynamic = through(small(), [{"rtn": {"weights": "int8", "activations": "int8"}}], tmp_path)
    made = with_steps(dynamic, lambda name: 0.05 if name.endswith("k.weight") else 0.03)
    program = program_of(made)
    found = {op.step for op in program.ops if isinstance(op, ops.QuantizeFixed) and op.x == "blocks.0.mixer_norm"}
    assert found == {float(np.float32(0.05)), float(np.float32(0.03))}
    read = {op.weight: op.scale for op in program.ops if isinstance(op, ops.Linear)}
    assert read["blocks.0.mixer.q.weight"] == read["blocks.0.mixer.v.weight"] != read["blocks.0.mixer.k.weight"]
    ids = list(range(30))
    a, b = made.logits(ids), made.logits(ids, "cpu")
    assert np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < 0.06


def test_activations_that_are_asked_for_win(tmp_path):
    made = with_steps(quantized([LinearFormat("int8")], "int8"), lambda name: 0.03)
    for asked, kind in (("int8", ops.QuantizeRows), ("bf16", ops.Cast)):
        formats = linear_formats(lower(made.spec), Formats(activations=asked), made.weights, plain="bf16")
        found = lower(made.spec, formats=formats).ops
        assert not any(isinstance(op, ops.QuantizeFixed) for op in found)
        assert any(isinstance(op, kind) for op in found)


@pytest.mark.parametrize("form", ["int8", "int4-g64"])
def test_they_are_written_and_read_back(form, tmp_path):
    model = with_steps(quantized([LinearFormat.parse(form)], "int8"), lambda name: 0.01 + len(name) / 999)
    save(model, tmp_path / "m")
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert said["input_activations"]["dynamic"] is False
    assert said["input_activations"]["strategy"] == "tensor"
    entries = SafetensorsFile.open(tmp_path / "m" / "model.safetensors").entries
    assert entries["model.layers.3.mlp.down_proj.input_scale"].shape == (1,)
    read = load(tmp_path / "m")
    assert steps_of(read) == steps_of(model)
    assert len(steps_of(read)) == 56
    assert np.array_equal(read.logits(IDS, "cpu"), model.logits(IDS, "cpu"))


@pytest.mark.parametrize(("family", "example"), [("mixtral", 0), ("phi3", 0)])
def test_experts_and_fused_products_keep_them(family, example, tmp_path):
    config = next(each for each in all_families() if each.name == family).examples[example]
    make_checkpoint(config, tmp_path / "plain")
    model = load(tmp_path / "plain")
    made = through(model, [{"rtn": {"weights": "int8", "activations": "int8"}}, {"static": {}}], tmp_path / "work")
    assert steps_of(made)
    save(made, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == config["model_type"]
    assert steps_of(load(tmp_path / "m")) == steps_of(made)


def test_what_is_not_one_scale_of_the_tensor_is_played_by_each_tokens_own(tmp_path):
    model = with_steps(quantized([LinearFormat("int8")], "int8"), lambda name: 0.03)
    save(model, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    inputs = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    for changes in ({"symmetric": False}, {"strategy": "token"}, {"dynamic": True}):
        group = {**inputs, **changes}
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = group
        path.write_text(json.dumps(config))
        read = load(tmp_path / "m")
        assert not steps_of(read)
        assert {weight.activations for weight in read.weights.values() if isinstance(weight, QuantizedWeight)} == {"int8"}


@pytest.mark.parametrize("number", [0.0, -1.0, np.inf, np.nan])
def test_scales_that_are_no_positive_number_are_refused(number, tmp_path):
    weight = quantized([LinearFormat("int8")], "int8").weights["blocks.0.mixer.q.weight"]
    with pytest.raises(ConfigError, match="positive"):
        static(weight, number)
    model = with_steps(quantized([LinearFormat("int8")], "int8"), lambda name: 0.03)
    save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    file = SafetensorsFile.open(tmp_path / "m" / "model.safetensors")
    tensors = {name: Weight(entry.shape, entry.dtype, functools.partial(file.read, name)) for name, entry in file.entries.items()}
    name = "model.layers.2.mlp.up_proj.input_scale"
    read_quantized(config, tensors)
    for shape, why in (((1,), "positive finite"), ((2,), "one number")):
        bad = Weight(shape, np.dtype(np.float32), lambda shape=shape: np.full(shape, number, np.float32))
        with pytest.raises(CheckpointError, match=why):
            read_quantized(config, {**tensors, name: bad})


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ([{"static": {}}, {"rtn": {"activations": "int8"}}], "finds no weights that are fed int8"),
        ([{"rtn": {}}, {"static": {}}], "finds no weights that are fed int8"),
        ([{"static": {}}], "finds no weights that are fed int8"),
        ([{"rtn": {"activations": "int8"}}, {"static": {"layers": ["blocks.9.*"]}}], "mean no weight"),
    ],
)
def test_what_cannot_work_is_refused_first(listed, reason):
    with pytest.raises(ConfigError, match=reason):
        check_recipe(small(), recipe_of(listed))


def test_a_model_that_is_quantized_already_gets_them_alone():
    check_recipe(quantized([LinearFormat("int8")], "int8"), recipe_of(["static"]))


def test_the_short_form_of_the_command(tmp_path, monkeypatch, capsys):
    quick = ["--samples", "4", "--sequence", "64", "--gate-tokens", "1000", "--max-loss", "20", "--no-speed", "--json"]
    asked = ["--method", "smoothquant", "--activations", "int8-static", "--cache", "fp8", "--skip", "blocks.[1-7].*"]
    done = main(monkeypatch, capsys, "quantize", "code-8m", tmp_path / "out", *asked, *quick)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert [next(iter(step)) for step in facts["recipe"]] == ["smoothquant", "rtn", "static", "cache"]
    read = load(tmp_path / "out")
    assert len(steps_of(read)) == 7
    assert read.cache.format == facts["cache"] == "fp8"
    assert [step.transform for step in read.provenance] == ["smoothquant", "rtn", "static", "cache", "measured"]
