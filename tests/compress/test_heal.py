"""Healing: what is taken away stays away, what is left learns, and a killed run goes on to the same bits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hasten.base.errors import ConfigError, UserError
from hasten.checkpoint import load
from hasten.compress.data import text_of, usual_length
from hasten.compress.heal import Heal, heal
from hasten.compress.prune import magnitude, parse_pattern
from hasten.compress.recipe import Stage, Step, Training, carry_out, check_recipe, find_transform, recipe_of
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weights

QUICK = {"steps": 5, "tokens": 192, "sequence": 48, "precision": "float32", "warmup": 0.2}
SPARSE = LinearFormat.parse("bf16-sparse")


@pytest.fixture(scope="module")
def original():
    return load("code-8m")


@pytest.fixture(scope="module")
def pruned(original):
    """Six weights of the first block, with 60 % of each gone."""
    import torch

    made = dict(original.weights)
    for name, weight in original.weights.items():
        if name.startswith("blocks.0.") and len(weight.shape) == 2:
            dense = torch.from_numpy(weight.load().astype(np.float32))
            made[name] = QuantizedWeight.from_array((dense * magnitude(dense, parse_pattern("60%"))).numpy(), SPARSE)
    return dataclasses.replace(original, weights=Weights(made))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    random = np.random.default_rng(5)
    path.write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n\n" for n in random.integers(0, 10**6, 400)))
    return str(path)


def test_zeros_stay_and_the_rest_learns(original, pruned, text, tmp_path):
    made = heal(pruned, Heal(**QUICK, text=text), original, Run(tmp_path, 1))
    changed = 0
    for name, before in pruned.weights.items():
        after = made.weights[name]
        assert (type(after), after.shape, after.dtype) == (type(before), before.shape, before.dtype), name
        a, b = before.load().astype(np.float32), after.load().astype(np.float32)
        changed += not np.array_equal(a, b)
        if isinstance(before, QuantizedWeight):
            assert after.form == SPARSE
            assert not b[a == 0].any()
            assert (a == 0).mean() == pytest.approx(0.6, abs=0.01)
    assert changed > 40
    (said,) = [entry for entry in made.provenance if entry.transform == "heal"]
    assert said.evidence["steps"] == 5
    assert said.evidence["last_loss"] < 0.8 * said.evidence["first_loss"]


def test_what_lost_nothing_has_nothing_to_learn_from_itself(original, text, tmp_path):
    quick = {**QUICK, "steps": 1}
    made = heal(original, Heal(**quick, text=text), original, Run(tmp_path / "a", 1))
    assert made.provenance[-1].evidence["first_loss"] < 1e-4  # the teacher is fed bf16
    labels = heal(original, Heal(**quick, text=text, labels=1.0), original, Run(tmp_path / "b", 1))
    assert labels.provenance[-1].evidence["first_loss"] > 0.1  # of the text itself
    half = heal(original, Heal(**quick, text=text, labels=0.5), original, Run(tmp_path / "c", 1))
    assert half.provenance[-1].evidence["first_loss"] == pytest.approx(labels.provenance[-1].evidence["first_loss"] / 2, rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(original, pruned, text, tmp_path):
    asked = Heal(**QUICK, text=text)
    whole = heal(pruned, asked, original, Run(tmp_path / "whole", 1))

    def stop(what, done, of):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(pruned, asked, original, Run(tmp_path / "cut", 1, stop))
    steps = []
    again = heal(pruned, asked, original, Run(tmp_path / "cut", 1, lambda what, done, of: steps.append(done)))
    assert steps[-1] == 5
    for name, weight in whole.weights.items():
        assert np.array_equal(weight.load(), again.weights[name].load()), name


def test_what_is_rounded_cannot_learn(original, text, tmp_path):
    weights = dict(original.weights)
    name = next(name for name, weight in weights.items() if name.startswith("blocks.0.") and len(weight.shape) == 2)
    weights[name] = QuantizedWeight.from_array(weights[name].load(), LinearFormat.parse("int4-g64"))
    rounded = dataclasses.replace(original, weights=Weights(weights))
    with pytest.raises(ConfigError, match="stored quantized"):
        heal(rounded, Heal(**QUICK, text=text), original, Run(tmp_path, 1))


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (["rtn", "heal"], "heal stands after rtn, which rounds"),
        (["heal"], "makes anything smaller"),
        ([{"heal": {"steps": 3, "minutes": 2}}, "rtn"], "both say how long"),
        ([{"heal": {"steps": 0}}, "rtn"], "teach nothing"),
        ([{"heal": {"minutes": -1}}, "rtn"], "teach nothing"),
        ([{"heal": {"labels": 1.5}}, "rtn"], "labels 1.5"),
        ([{"heal": {"sequence": 100000}}, "rtn"], "accepts 1 to"),
        ([{"heal": {"rate": 0}}, "rtn"], "rate is 0"),
        ([{"heal": {"text": "/nowhere"}}, "rtn"], "no file or folder /nowhere"),
        (["share", "heal", "gptq"], "gptq looks at activations block by block, and share"),
        (["qat"], "stands behind a transform that rounds"),
        ([{"wanda": {}}, {"block_qat": {}}], "block_qat stands after wanda, whose zeros"),
        ([{"wanda": {}}, {"rtn": {"weights": "int3"}}], "sparse"),
        ([{"cache": {"format": "int8"}}, {"cut_layers": {}}], "cut_layers stands after cache"),
    ],
)
def test_what_cannot_work_is_refused(original, listed, said):
    with pytest.raises(UserError, match=said):
        check_recipe(original, recipe_of(listed))


def test_a_recipe_gives_it_what_it_began_with(original, text, tmp_path):
    given = []

    def apply(model, settings, first, run):
        given.append((model, first))
        return model

    step = Step(Training("seen", Heal, apply, lambda model, settings: None), Heal(**QUICK))
    assert step.transform.stage is Stage.TRAINS
    assert not step.needs_text
    rtn = recipe_of([{"rtn": {"weights": "int8", "skip": ["blocks.[1-7].*"]}}])
    carry_out(original, (step, step, *rtn), None, Run(tmp_path, 1))
    assert [first for _, first in given] == [original, original]
    assert find_transform("heal").apply is heal


def test_each_step_is_checked_against_what_the_one_before_made(original, tmp_path):
    with pytest.raises(UserError, match="product of two"):
        carry_out(original, recipe_of([{"rank": {"skip": ["blocks.[1-7].*"]}}, {"cut_neurons": {}}]), some_text(original), Run(tmp_path, 1))


def some_text(model):
    random = np.random.default_rng(3)
    return text_of("random ids", random.integers(0, model.spec.vocab, (2, 40)).tolist())


def test_windows_of_text_show_what_became_of_attention(original):
    from hasten.compress.convert.window import Window, window

    made = window(original, Window(size=700), None, Run(Path(), 1))
    assert usual_length(original.spec, original.spec) == 512
    assert usual_length(made.spec, original.spec) == Heal().length(made, original) == 1400
    assert usual_length(made.spec, made.spec) == 512
    assert Heal(sequence=64).length(made, original) == 64
