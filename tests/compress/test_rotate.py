"""Rotations folded into weights: orthogonal, of the same function in every family that can be rotated, and refused in the others."""

import dataclasses

import numpy as np
import pytest

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.orthogonal import paley, rotation
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.rotate import turns_of, untied
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weight, Weights
from hasten.model import Source
from hasten.program import lower
from tests.compress.models import KINDS, random_weights, small, windows_for

EXAMPLES = [(family, index) for family in all_families() for index in range(len(family.examples))]
ROTATABLE = {
    "deepseek_v3", "gpt_oss", "llama", "mamba", "mamba2", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next",
}  # fmt: skip


def rotated(model, **settings):
    """``model`` through the transform alone."""
    (step,) = recipe_of([{"rotate": settings}])
    step.transform.check(model, step.settings)
    return step.transform.apply(model, step.settings, None, Run("unused", 1))


def away(model, other):
    ids = np.random.default_rng(1).integers(0, model.spec.vocab, min(20, model.spec.context)).tolist()
    a, b = model.logits(ids), other.logits(ids)
    assert np.isfinite(a).all()
    assert a.std() > 1e-3
    return np.abs(a - b).max() / np.abs(a).max()


def matrix(turn):
    return turn.apply(np.eye(turn.size, dtype=np.float32)).astype(np.float64)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 68, 72, 76, 284])
def test_paleys_matrices_are_hadamards(order):
    made = paley(order)
    assert set(np.unique(made)) == {-1, 1}
    assert np.array_equal(made @ made.T, order * np.eye(order, dtype=np.int64))


def test_orders_that_paley_does_not_have():
    assert [order for order in (2, 6, 16, 40, 52, 92, 100) if paley(order) is not None] == []


@pytest.mark.parametrize("size", [1, 2, 64, 12, 20, 96, 136, 576, 52, 7, 27])
def test_rotations_are_orthogonal_and_spread(size):
    turn = rotation(size, 3)
    made = matrix(turn)
    assert np.abs(made @ made.T - np.eye(size)).max() < 1e-6
    if turn.kind == "Hadamard":
        assert np.allclose(np.abs(made), size**-0.5, atol=1e-6)
    else:
        assert size in {52, 7, 27}
    if size > 2:
        assert not np.allclose(made, matrix(rotation(size, 4)))
    x = np.random.default_rng(0).normal(size=(3, 2 * size, 5)).astype(np.float32)
    pair = np.kron(np.eye(2), made)
    assert np.allclose(turn.apply_to_outputs(x), pair.T @ x, atol=1e-5)
    assert np.allclose(turn.apply(np.swapaxes(x, 1, 2)), np.swapaxes(x, 1, 2) @ pair, atol=1e-5)


@pytest.mark.parametrize(("family", "index"), EXAMPLES, ids=lambda value: getattr(value, "name", value))
def test_a_familys_function_stays_or_it_is_refused(family, index):
    model = random_weights(family.spec(family.examples[index]))
    if family.name not in ROTATABLE:
        with pytest.raises(UnsupportedError, match="residual stream cannot be rotated: .*(norm|LayerNorm)"):
            rotated(model)
        return
    made = rotated(model)
    assert away(model, made) < 1e-4
    assert not made.spec.head.tied
    norms = turns_of(lower(made.spec)).norms
    assert len(norms) >= len(model.spec.blocks)
    for name, offset in norms.items():
        assert np.array_equal(made.weights.array(name), np.full(made.weights[name].shape, 1 - offset, np.float32))
    turned = [name for name in model.weights if not np.allclose(model.weights.array(name), made.weights.array(name))]
    assert set(turned) > set(norms)  # and what reads and writes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [True, False])
def test_values_are_rotated_between_two_products(kind, values):
    model = small(kind)
    made = rotated(model, values=values)
    assert away(model, made) < 1e-4
    turn = matrix(rotation(model.spec.width, 0))
    head = matrix(rotation(20, 1))
    v, o = "blocks.1.mixer.v.weight", "blocks.1.mixer.o.weight"
    norm = model.weights.array("blocks.1.mixer_norm.weight")
    expected = (model.weights.array(v) * norm) @ turn
    if values:
        expected = np.kron(np.eye(len(expected) // 20), head.T) @ expected
    assert np.allclose(made.weights.array(v), expected, atol=1e-5)
    expected = turn.T @ model.weights.array(o)
    if values:
        expected = expected @ np.kron(np.eye(6), head)
    assert np.allclose(made.weights.array(o), expected, atol=1e-5)


def test_a_feature_that_stands_out_does_not_any_more():
    model = small()
    weights = dict(model.weights)
    table = model.weights.array("embedding.weight").copy()
    table[:, 5] *= 40
    weights["embedding.weight"] = Weight(table.shape, table.dtype, lambda: table)
    made = rotated(dataclasses.replace(model, weights=Weights(weights)))
    found = np.abs(made.weights.array("embedding.weight"))
    assert np.abs(table).max() / np.abs(table).mean() > 3 * found.max() / found.mean()


def test_a_tied_head_gets_its_own_weights_in_the_familys_layout(tmp_path):
    family = next(family for family in all_families() if family.name == "qwen2")
    config = family.examples[1]
    model = dataclasses.replace(random_weights(family.spec(config)), source=Source("qwen2", config))
    assert model.spec.head.tied
    listed = [{"rotate": {}}, {"rtn": {"weights": "int8"}}]
    made = carry_out(model, recipe_of(listed), None, Run(tmp_path, 1))
    assert made.spec == untied(model.spec)
    assert family.spec(made.source.config) == made.spec
    assert made.weights["head.weight"].dtype == model.weights["embedding.weight"].dtype
    assert any(isinstance(weight, QuantizedWeight) for weight in made.weights.values())
    assert [step.transform for step in made.provenance] == ["rotate", "rtn"]
    assert made.provenance[0].evidence["head_untied"]


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ([{"rtn": {"weights": "int8"}}, {"rotate": {}}], "rotate stands after rtn"),
        ([{"awq": {}}, {"rotate": {}}, {"rtn": {}}], "rotate stands after awq, whose scales it would take back"),
        ([{"smoothquant": {}}, {"rotate": {}}, {"rtn": {}}], "rotate stands after smoothquant"),
        ([{"rotate": {}}], "makes anything smaller"),
        ([{"rotate": {"online": True}}, {"rtn": {}}], "settings are seed, values"),
    ],
)
def test_what_cannot_work_is_refused_first(listed, reason):
    with pytest.raises(ConfigError, match=reason):
        check_recipe(small(), recipe_of(listed))


def test_scales_may_move_behind_a_rotation(tmp_path):
    model = small()
    made = carry_out(model, recipe_of([{"rotate": {}}, {"awq": {}}, {"rtn": {"weights": "int8"}}]), windows_for(model), Run(tmp_path, 2))
    assert away(model, made) < 0.1
