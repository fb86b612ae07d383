"""A cache format that goes with a model: calibrated, written as compressed-tensors has it, played wherever nothing else is asked for."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from hasten import load, save
from hasten.backends.reference import play
from hasten.backends.reference.play import weights_of
from hasten.base.errors import ConfigError
from hasten.checkpoint.quantized.cache import read_cache
from hasten.compress.evidence import Gate
from hasten.compress.make import gate_windows
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.walk import Run
from hasten.engine import LLM
from hasten.families import all_families
from hasten.formats.cache import MeantCache
from hasten.formats.safetensors import SafetensorsFile
from hasten.measure import Evaluation, score_windows
from hasten.model import load_backend
from hasten.program import Batch, Formats, lower
from tests.cli import main
from tests.compress.models import KINDS, random_weights, small, windows_for
from tests.families.oracles import make_checkpoint

LIMITS = {"fp8": 448.0, "int8": 127.0}


def with_cache(model, form, work, threads=2):
    return carry_out(model, recipe_of([{"cache": {"format": form}}]), windows_for(model), Run(work, threads))


def scales_of(model):
    return {name: scale.load().tolist() for name, scale in model.cache.scales.items()}


def family_model(name, example, directory):
    config = next(each for each in all_families() if each.name == name).examples[example]
    make_checkpoint(config, directory)
    return load(directory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", LIMITS)
def test_scales_cover_the_largest_key_and_value(kind, form, tmp_path):
    model = small(kind)
    made = with_cache(model, form, tmp_path)
    taps = ["blocks.1.mixer.k_rotated", "blocks.1.mixer.v"]
    program = lower(model.spec).with_outputs(taps)  # whole, where the transform goes block by block
    with torch.inference_mode():
        seen = play(program, weights_of(program, model.weights, "cpu"), Batch.of(windows_for(model).windows, rows="none"))[0]
    found = scales_of(made)
    assert found.keys() == {f"blocks.{block}.mixer.{part}_scale" for block in (0, 1) for part in "kv"}
    for tap, part in zip(taps, "kv", strict=True):
        (scale,) = found[f"blocks.1.mixer.{part}_scale"]
        assert scale == pytest.approx(float(seen[tap].abs().max()) / LIMITS[form], rel=1e-4)
    assert made.weights.keys() == model.weights.keys()
    assert all(made.weights[name] is model.weights[name] for name in model.weights)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_is_played_unless_another_is_asked_for(backend):
    model = small()
    meant = {form: replaced(model, form) for form in ("fp8", "int8")}
    ids = np.random.default_rng(1).integers(0, model.spec.vocab, 40)

    def logits(model, cache=None):
        session = load_backend(backend).session(model, 64, Formats(cache=cache), 1 << 22)
        return session.score(Batch.of([ids]))

    plain = logits(model)
    for form, made in meant.items():
        assert np.array_equal(logits(made), logits(model, form))
        assert not np.array_equal(logits(made), plain)
        assert np.array_equal(logits(made, "bf16"), logits(model, "bf16"))
    llm = LLM(meant["int8"], backend=backend)
    assert {group.format for group in llm.loads()[0].program.states} == {"int8"}


def replaced(model, form):
    return dataclasses.replace(model, cache=MeantCache(form))


@pytest.mark.parametrize(
    ("family", "example", "place"),
    [
        ("llama", 0, "model.layers.1.self_attn"),
        ("phi3", 0, "model.layers.1.self_attn"),
        ("gpt2", 0, "transformer.h.1.attn"),
        ("deepseek_v3", 0, "model.layers.1.self_attn"),
        ("qwen3_moe", 0, "model.layers.1.self_attn"),
    ],
)
@pytest.mark.parametrize("form", LIMITS)
def test_scales_stand_where_other_engines_look(family, example, place, form, tmp_path):
    made = with_cache(family_model(family, example, tmp_path / "plain"), form, tmp_path / "work")
    save(made, tmp_path / "m")
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert said["config_groups"] == {}
    assert said["kv_cache_scheme"] == {
        "num_bits": 8, "type": {"fp8": "float", "int8": "int"}[form], "symmetric": True, "strategy": "tensor", "group_size": None,
        "dynamic": False,
    }  # fmt: skip
    entries = SafetensorsFile.open(tmp_path / "m" / "model.safetensors").entries
    assert {name for name in entries if name.startswith(place) and name.endswith("_scale")} == {f"{place}.{part}_scale" for part in "kv"}
    read = load(tmp_path / "m")
    assert read.cache.format == form
    assert scales_of(read) == scales_of(made)
    save(read, tmp_path / "again")
    assert scales_of(load(tmp_path / "again")) == scales_of(made)


def test_beside_rounded_weights_and_in_hastens_own_layout(tmp_path):
    model = small()
    listed = [{"rtn": {"weights": "int3-g32"}}, {"cache": {"format": "int8"}}]
    made = carry_out(model, recipe_of(listed), windows_for(model), Run(tmp_path / "work", 2))
    save(made, tmp_path / "m")
    assert "blocks.1.mixer.k_scale" in SafetensorsFile.open(tmp_path / "m" / "model.safetensors").entries
    read = load(tmp_path / "m")
    assert read.cache.format == "int8"
    assert scales_of(read) == scales_of(made)
    ids = list(range(20))
    assert np.array_equal(read.logits(ids, "cpu"), made.logits(ids, "cpu"))


def test_compressed_tensors_reads_the_scheme(tmp_path):
    package = pytest.importorskip("compressed_tensors.quantization")
    made = with_cache(family_model("llama", 0, tmp_path / "plain"), "fp8", tmp_path / "work")
    save(made, tmp_path / "m")
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    scheme = package.QuantizationConfig(**said).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy, scheme.dynamic, scheme.symmetric) == (8, "float", "tensor", False, True)


@pytest.mark.parametrize("scheme", [None, {}, {"num_bits": 4, "type": "int"}, {"num_bits": [8], "type": {}}, "fp8", 7])
def test_what_says_no_format_that_there_is_leaves_it_open(scheme):
    assert read_cache({"kv_cache_scheme": scheme}, {}, ()) is None
    assert read_cache(scheme, {}, ()) is None


def test_the_command_gates_on_the_loss_with_that_cache(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- cache: {format: fp8}\n")
    quick = ["--samples", "4", "--sequence", "64", "--gate-tokens", "1000", "--no-speed", "--json"]
    done = main(monkeypatch, capsys, "apply", recipe, "code-8m", tmp_path / "out", *quick)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["cache"] == "fp8"
    assert "smaller" not in facts
    assert facts["loss"] != facts["base_loss"]
    read = load(tmp_path / "out")
    windows, window = gate_windows(read, Gate(tokens=1000), 512)
    for formats, loss in ((Formats(), "loss"), (Formats(cache="bf16"), "base_loss")):
        found = Evaluation.of([*score_windows(read, windows, window=window, backend="cpu", formats=formats)])
        assert found.loss == pytest.approx(facts[loss], abs=1e-6)
    evaluated = main(monkeypatch, capsys, "eval", tmp_path / "out", "--limit", "100", "--json")
    assert json.loads(evaluated.out)["cache"] == "fp8"
    inspected = main(monkeypatch, capsys, "inspect", tmp_path / "out", "--json")
    assert json.loads(inspected.out)["cache"] == "fp8"


def test_what_has_no_cache_is_refused_first():
    config = next(each for each in all_families() if each.name == "mamba")
    model = random_weights(config.spec(config.examples[0]))
    with pytest.raises(ConfigError, match="keeps no keys and values"):
        check_recipe(model, recipe_of(["cache"]))
    with pytest.raises(ConfigError, match="Invalid enum value"):
        recipe_of([{"cache": {"format": "bf16"}}])
