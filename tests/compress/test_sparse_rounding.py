"""Rounding what was pruned: zeros stay where they are, errors are spread over what is left, and what cannot leave zeros out is refused."""

import numpy as np
import pytest
import torch

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load
from hasten.compress.descend import descend, output_loss
from hasten.compress.gates import save_checked
from hasten.compress.gptq import aimed, damped, gptq
from hasten.compress.grid import Grid
from hasten.compress.prune import parse_pattern, wanda
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.rtn import round_to_nearest
from hasten.compress.walk import Run
from hasten.engine.backends import choose_backend
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from tests.compress.matrices import inputs_of, loss_of, slow_gptq, weight_of
from tests.compress.models import KINDS, small, windows_for

NAMES = ["int8-sparse", "int4-g32-sparse", "int4-channel-sparse"]


def pruned_of(seed, out, size, sparsity):
    weight, x = weight_of(seed, out, size), inputs_of(seed, 400, size)
    keep = wanda(weight, x.T @ x, parse_pattern(sparsity))
    return weight * keep, keep, x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_gptq_is_the_papers_equations_with_zero_as_the_only_choice_of_some(name, order, sparsity):
    form, size = LinearFormat.parse(name), 150
    weight, keep, x = pruned_of(1, 12, size, sparsity)
    moments = x.T @ x
    made, grid = gptq(weight, moments, form, order=order, keep=keep), Grid.fit(weight, form)
    columns = np.arange(size) if order == "given" else np.argsort(-moments.diagonal().numpy(), kind="stable")
    expected = slow_gptq(weight.numpy(), damped(moments, 0.01).numpy(), form, grid.scales.numpy(), None, columns, keep.numpy())
    assert np.array_equal(made.q, expected)
    assert not made.q[~keep.numpy()].any()
    assert not np.array_equal(made.q, gptq(weight, moments, form, order=order).q)  # which fills zeros


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", ["none", "outputs"])
@pytest.mark.parametrize(("order", "static"), [("given", True), ("given", False), ("activation", True)])
@pytest.mark.parametrize("sparsity", ["50%", "80%", "2:4"])
def test_joint_rounding_loses_less_than_rounding_to_nearest(name, clip, order, static, sparsity):
    form, joint, nearest = LinearFormat.parse(name), 0.0, 0.0
    for seed in range(3):
        weight, keep, x = pruned_of(seed, 24, 160, sparsity)
        weight, moments = weight.float(), x.T @ x
        made = gptq(weight, moments, form, order=order, static_groups=static, clip=clip, keep=keep)
        assert not made.q[~keep.numpy()].any()
        joint += loss_of(weight, made, x)
        nearest += loss_of(weight, round_to_nearest(weight, form), x)
    assert joint < nearest


@pytest.mark.parametrize("name", NAMES)
def test_descent_goes_down_and_leaves_zeros(name):
    form = LinearFormat.parse(name)
    weight, keep, x = pruned_of(2, 16, 150, "50%")
    weight, moments = weight.float(), x.T @ x
    begun = gptq(weight, moments, form, keep=keep)
    made = descend(weight, begun, moments, form, keep=keep)
    before, after = (output_loss(weight, torch.from_numpy(each.dense()), damped(moments, 0.01)) for each in (begun, made))
    assert after < before
    assert not made.q[~keep.numpy()].any()


def test_a_weight_that_is_aimed_elsewhere_keeps_its_zeros():
    """Aiming fills them; what was there is made good by the rest, and scales are those of what is kept."""
    form = LinearFormat.parse("int4-g32-sparse")
    weight, keep, u = pruned_of(4, 12, 96, "50%")
    x = u + 0.2 * torch.from_numpy(np.random.default_rng(9).normal(size=u.shape))
    aim = aimed(weight, x.T @ x, u.T @ x, 0.01)
    assert (aim[~keep] != 0).all()
    made = gptq(aim, x.T @ x, form, keep=keep)
    assert not made.q[~keep.numpy()].any()
    assert np.array_equal(made.scales, Grid.fit(torch.where(keep, aim, 0.0), form).scales.float().numpy())


def through(model, listed, work, text):
    return carry_out(model, recipe_of(listed), text, Run(work, 2))


@pytest.mark.parametrize(("kind", "weights"), [("grouped-query", "int4-g32"), ("multi-query", "int8"), ("MoE", "int4-g32")])
def test_what_was_pruned_is_stored_sparse(kind, weights, tmp_path):
    model = small(kind)
    text = windows_for(model, lengths=(48,) * 12)
    first = [{"wanda": {"sparsity": "2:4", "skip": ["*.mixer.v"]}}]
    gptq_settings = {"weights": weights, "clip": "outputs", "descend": 1, "aim": "plain"}
    half = through(model, [*first, {"rtn": {"weights": "int8", "layers": ["*.mixer.v"]}}], tmp_path / "half", text)
    nearest, joint = (
        through(model, [*first, step], tmp_path / name, text)
        for name, step in (("rtn", {"rtn": {"weights": weights}}), ("gptq", {"gptq": gptq_settings}))
    )
    form, sparse = LinearFormat.parse(weights), LinearFormat.parse(f"{weights}-sparse")
    zeros = kept = 0
    for name, weight in half.weights.items():
        if not isinstance(weight, QuantizedWeight):
            continue
        array = model.weights.array(name) if name.endswith("mixer.v.weight") else weight.load()
        for made in (nearest, joint):
            stored = made.weights[name]
            assert stored.form == (form if name.endswith("mixer.v.weight") else sparse)
            if stored.form.sparse:
                assert not stored.quantized().q[array == 0].any()
                zeros, kept = zeros + np.count_nonzero(array == 0), kept + np.count_nonzero(stored.quantized().q)
                assert stored.nbytes < 0.9 * QuantizedWeight.from_array(array, form).nbytes
        expected = sparse.quantize(array.reshape(-1, array.shape[-1]))
        np.testing.assert_array_equal(nearest.weights[name].quantized().q.reshape(expected.q.shape), expected.q)
        np.testing.assert_array_equal(nearest.weights[name].load(), expected.dense().reshape(array.shape))
    assert zeros > 0.9 * kept > 0
    assert joint.provenance[-1].evidence["error_of"] == "outputs"


def test_joint_rounding_of_a_model_gives_outputs_no_worse(tmp_path):
    model = small()
    text = windows_for(model, lengths=(48,) * 24)
    first = {"sparsegpt": {"sparsity": "50%"}}
    half = through(model, [first, {"rtn": {"weights": "int8"}}], tmp_path / "8", text)  # all that int8 rounds is little beside int4
    away = {}
    for name, step in (("rtn", {"rtn": {"weights": "int4-g32"}}), ("gptq", {"gptq": {"weights": "int4-g32"}})):
        made = through(model, [first, step], tmp_path / name, text)
        away[name] = np.mean([np.abs(made.logits(window) - half.logits(window)).mean() for window in text.windows[:10]])
    assert away["gptq"] < away["rtn"], away


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", [[], [{"rtn": {"weights": "int4-g32"}}], [{"rtn": {"weights": "int8", "activations": "int8"}}]])
def test_what_is_written_is_read_and_played_as_it_was(kind, rounding, tmp_path):
    model = small(kind)
    made = through(model, [{"magnitude": {"sparsity": "2:4"}}, *rounding], tmp_path / "work", windows_for(model))
    assert choose_backend(made)[0] == "cpu"
    save_checked(made, tmp_path / "m")  # the same codes, and the same logits natively
    read, ids = load(tmp_path / "m"), windows_for(model).windows[0]
    for name, weight in made.weights.items():
        np.testing.assert_array_equal(read.weights.array(name), weight.load())
    native, reference = (read.logits(ids, backend) for backend in ("cpu", "reference"))
    assert np.sqrt(np.mean((native - reference) ** 2) / np.mean(reference**2)) < 0.2


@pytest.mark.parametrize("weights", ["int4-g32-zp", "fp8", "int3", "int2"])
def test_formats_without_a_sparse_form_are_refused(weights, tmp_path):
    model = small()
    (step,) = recipe_of(["magnitude"])
    half = step.transform.apply(model, step.settings, None, Run(tmp_path / "half", 2))
    for name in ("rtn", "gptq"):
        with pytest.raises(UnsupportedError, match="accepted: bf16, int8, int4, without -zp") as caught:
            check_recipe(half, recipe_of([{name: {"weights": weights}}]))
        assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedError, match="accepted: bf16, int8, int4"):
        through(model, ["magnitude", {"rtn": {"weights": weights}}], tmp_path / "whole", windows_for(model))
    check_recipe(half, recipe_of([{"gptq": {"weights": "int4-g32"}}]))


def test_bits_are_not_chosen_by_layer_for_what_was_pruned(tmp_path):
    model = small()
    with pytest.raises(ConfigError, match="mixed stands after magnitude, whose zeros it would fill"):
        through(model, ["magnitude", {"mixed": {"bits": 6, "choices": ["int4-g32", "int8"]}}], tmp_path, windows_for(model))
