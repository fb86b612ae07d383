"""Whole transforms on small models: what they leave alone, what they change, and that killing them changes nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hasten.base.errors import ConfigError, UnsupportedError, UserError
from hasten.compress.recipe import BUILT_IN, Transform, carry_out, check_recipe, find_transform, read_recipe, recipe_of
from hasten.compress.rounding import Gptq, Rtn
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from tests.compress.models import KINDS, small, windows_for

ROOT = Path(__file__).parents[2]


def through(model, listed, work, threads=2, text=None):
    return carry_out(model, recipe_of(listed), text or windows_for(model), Run(work, threads))


def rounded(model):
    return {name: weight for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight)}


def distance(model, other):
    ids = np.random.default_rng(5).integers(0, model.spec.vocab, 60).tolist()
    return np.abs(model.logits(ids) - other.logits(ids)).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["int4-g32", "int8", "int3-g64-zp", "fp8"])
def test_rtn_rounds_as_the_format_says_and_leaves_the_rest(kind, weights, tmp_path):
    model, form = small(kind), LinearFormat.parse(weights)
    made = through(model, [{"rtn": {"weights": weights}}], tmp_path)
    names = rounded(made)
    assert len(names) == 14
    assert not any("router" in name or "norm" in name for name in names)
    for name, weight in names.items():
        array = model.weights.array(name)
        expected = form.quantize(array.reshape(-1, array.shape[-1]))
        stored = weight.quantized()
        assert weight.form == form
        assert np.array_equal(stored.q.reshape(expected.q.shape), expected.q)
        assert np.array_equal(stored.scales.reshape(expected.scales.shape), expected.scales)
        assert np.array_equal(weight.load(), expected.dense().reshape(array.shape))
    for name in model.weights.keys() - names.keys():
        assert made.weights[name] is model.weights[name]
    (step,) = made.provenance
    assert step.transform == "rtn"
    assert step.settings["weights"] == weights
    assert 0 < step.evidence["mean_error"] < step.evidence["worst_error"] < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_look_at_text_are_closer_than_rounding(kind, tmp_path):
    model = small(kind)
    text = windows_for(model, lengths=(48,) * 40)
    recipes = {
        "rtn": [{"rtn": {"weights": "int3-g32"}}],
        "clip": [{"rtn": {"weights": "int3-g32", "clip": "outputs"}}],
        "gptq": [{"gptq": {"weights": "int3-g32"}}],
        "descend": [{"gptq": {"weights": "int3-g32", "descend": 3}}],
        "plain": [{"gptq": {"weights": "int3-g32", "aim": "plain"}}],
        "awq": [{"awq": {"weights": "int3-g32"}}, {"rtn": {"weights": "int3-g32", "clip": "outputs"}}],
    }
    away = {name: distance(model, through(model, listed, tmp_path / name, text=text)) for name, listed in recipes.items()}
    assert all(away[name] < away["rtn"] for name in recipes if name != "rtn"), away
    assert away["descend"] < 0.95 * away["rtn"], away


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_leaves_the_function(name, kind, tmp_path):
    model = small(kind)
    text = windows_for(model)
    step = recipe_of([name])[0]
    made = step.transform.apply(model, step.settings, text, Run(tmp_path, 2))
    ids = list(range(1, 60))
    before, after = model.logits(ids), made.logits(ids)
    assert np.abs(before - after).max() / np.abs(before).max() < 1e-5
    changed = [name for name in model.weights if not np.array_equal(model.weights.array(name), made.weights.array(name))]
    assert len(changed) >= 12
    assert made.provenance[-1].evidence["values"] == 8


@pytest.mark.parametrize(
    "listed",
    [
        [{"awq": {"weights": "int4-g32"}}, {"gptq": {"weights": "int4-g32", "clip": "outputs", "descend": 2}}],
        [{"rtn": {"weights": "int4-g32", "skip": ["blocks.1.*"]}}, {"gptq": {"weights": "int8", "layers": ["blocks.1.*"]}}],
    ],
)
def test_threads_change_no_bit(listed, tmp_path):
    model = small("MoE")
    one, other = (through(model, listed, tmp_path / str(threads), threads) for threads in (1, 3))
    same(one, other)


def same(one, other):
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert np.array_equal(weight.load(), other.weights.array(name)), name


def test_what_was_scaled_and_not_rounded_keeps_its_dtype(tmp_path):
    import ml_dtypes

    model = small(dtype=ml_dtypes.bfloat16)
    made = through(model, ["awq", {"rtn": {"skip": ["*.mixer.v"]}}], tmp_path)
    assert made.weights["blocks.0.mixer.v.weight"].dtype == ml_dtypes.bfloat16
    assert made.weights.array("blocks.0.mixer.v.weight").dtype == ml_dtypes.bfloat16
    assert not np.array_equal(made.weights.array("blocks.0.mixer.v.weight"), model.weights.array("blocks.0.mixer.v.weight"))


# Plays and quantizes a model in a process that can be killed; prints nothing, leaves its result in work.
WORKER = """
import sys
from pathlib import Path
from tests.compress import models
from tests.compress.test_transforms import RECIPE, through
model = models.small("grouped-query")
text = models.windows_for(model, lengths=(48,) * 60)
print("begun", flush=True)
through(model, RECIPE, Path(sys.argv[1]), text=text)
print("done", flush=True)
"""
RECIPE = [{"awq": {"weights": "int4-g32"}}, {"gptq": {"weights": "int4-g32", "descend": 1, "aim": "plain"}}]


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    model = small("grouped-query")
    text = windows_for(model, lengths=(48,) * 60)
    began = time.monotonic()
    whole = through(model, RECIPE, tmp_path / "whole", text=text)
    seconds = time.monotonic() - began
    draw, killed = random.Random(3), 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "cut")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout.readline() == b"begun\n"
        time.sleep(draw.uniform(0.1, 0.8) * seconds)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert killed
    same(whole, through(model, RECIPE, tmp_path / "cut", text=text))


# --- recipes


def test_a_recipe_is_read(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("- awq\n- gptq:\n    weights: int4-g64\n    skip: ['blocks.0.*']\n")
    first, second = read_recipe(file)
    assert first.transform.name == "awq"
    assert second.settings == Gptq(weights="int4-g64", skip=("blocks.0.*",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a list of transforms"),
        ("gptq: {}", "a list of transforms"),
        ("- [gptq]", "item 1"),
        ("- {gptq: {}, rtn: {}}", "item 1"),
        ("- nothing", "there are " + ", ".join(sorted(BUILT_IN))),
        ("- gptq: {wieghts: int4}", "settings are activations, layers, skip, head, embedding, weights"),
        ("- gptq: {damp: much}", "item 1, gptq"),
        ("- rtn: {clip: hard}", "item 1, rtn"),
        ("- gptq: {weights: [", "no YAML"),
        ("- &a gptq\n- *a", "aliases"),
        ("- !!python/object/apply:os.system ['true']", "no YAML"),
        ("- " + "[" * 5000, "no YAML|item"),
    ],
)
def test_bad_recipes_are_refused(text, said, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (["awq"], "makes anything smaller"),
        (["rtn", "awq"], "put it before"),
        (["rtn", "gptq"], "would be rounded by rtn and by gptq"),
        ([{"gptq": {"weights": "int4-g32", "static_groups": False}}], "static groups"),
        ([{"gptq": {"weights": "bf16"}}], "not rounded to"),
        ([{"gptq": {"weights": "int4-sparse"}}], "not rounded to"),
        ([{"gptq": {"weights": "int5"}}], "int5"),
        ([{"rtn": {"weights": "fp8", "activations": "int8"}}], "do not go with"),
        ([{"gptq": {"weights": "fp8", "descend": 2}}], "for integers"),
        ([{"gptq": {"damp": 0}}], "damp"),
        ([{"rtn": {"layers": ["blocks.7.*"]}}], "mean no weight"),
        ([{"rtn": {"skip": ["*"]}}], "every layer is skipped"),
        ([{"smoothquant": {"strength": 2}}, "rtn"], "strength"),
        ([{"awq": {"steps": 0}}, "rtn"], "steps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_begins(listed, said, tmp_path):
    with pytest.raises(UserError, match=said):
        through(small(), listed, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_what_is_rounded_is_not_rounded_again(tmp_path):
    made = through(small(), ["rtn"], tmp_path)
    for listed in (["gptq"], ["awq", "rtn"]):
        with pytest.raises(ConfigError, match="quantized already"):
            check_recipe(made, recipe_of(listed))


def test_a_transform_that_needs_text_says_so(tmp_path):
    with pytest.raises(ConfigError, match="text to calibrate on"):
        carry_out(small(), recipe_of(["gptq"]), None, Run(tmp_path, 1))
    carry_out(small(), recipe_of(["rtn"]), None, Run(tmp_path, 1))


class Halve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    by: float = 0.5


HALVE = Transform("halve", Halve, lambda model, settings, text, run: model, lambda model, settings: None, lambda settings: False)


def test_a_third_party_adds_one(monkeypatch):
    entry = metadata.EntryPoint("halve", "tests.compress.test_transforms:HALVE", "hasten.transforms")
    broken = metadata.EntryPoint("broken", "tests.compress.test_transforms:ROOT", "hasten.transforms")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry, broken] if group == "hasten.transforms" else [])
    (step,) = recipe_of([{"halve": {"by": 0.25}}])
    assert step.settings.by == 0.25
    with pytest.raises(UnsupportedError, match="no Transform"):
        find_transform("broken")
    with pytest.raises(UnsupportedError, match=", ".join(sorted({*BUILT_IN, "broken", "halve"}))):
        find_transform("nothing")


def test_settings_have_what_the_names_say():
    assert Rtn().form == LinearFormat.parse("int4-g64")
    assert not find_transform("rtn").needs_text(Rtn())
    assert find_transform("rtn").needs_text(Rtn(clip="outputs"))
