"""Scales that move between a linear layer and what feeds it leave the function as it was, in every family."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from hasten.compress.fold import fold, tie_of
from hasten.compress.scales import awq_scales, balanced, smooth_scales, tied
from hasten.compress.sites import Layers, NormBefore, RowsBefore, scale_groups
from hasten.families import all_families
from hasten.formats.linear import LinearFormat
from hasten.formats.weights import Weight, Weights
from hasten.program import lower
from tests.compress.matrices import inputs_of, weight_of
from tests.compress.models import KINDS, random_weights, small

EXAMPLES = [(family, index) for family in all_families() for index in range(len(family.examples))]


def folded(model, norm_dtype=torch.float32, seed=0):
    """``model`` with random scales moved wherever they can be, and how many were."""
    random = np.random.default_rng(seed)
    tensors = {name: torch.from_numpy(np.array(weight.load(), np.float32)) for name, weight in model.weights.items()}
    groups = scale_groups(lower(model.spec), Layers())
    for group in groups:
        size = tensors[group.readers[0]].shape[-1]
        scales = tied(torch.from_numpy(np.exp(random.normal(size=size)).astype(np.float32)), tie_of(group))
        changed, _ = fold(tensors, group, scales, norm_dtype)
        assert {group.before.weight, *group.readers} <= changed.keys()
        tensors.update(changed)
    weights = {name: Weight(tensor.shape, np.dtype(np.float32), tensor.numpy) for name, tensor in tensors.items()}
    return dataclasses.replace(model, weights=Weights(weights)), groups


def away(model, other, length=20):
    ids = np.random.default_rng(1).integers(0, model.spec.vocab, min(length, model.spec.context)).tolist()
    a, b = model.logits(ids), other.logits(ids)
    assert np.isfinite(a).all()
    return np.abs(a - b).max() / np.abs(a).max()


@pytest.mark.parametrize(("family", "index"), EXAMPLES, ids=lambda value: getattr(value, "name", value))
def test_every_familys_function_stays(family, index):
    model = random_weights(family.spec(family.examples[index]))
    other, groups = folded(model)
    assert away(model, other) < 2e-5
    if groups:
        name = groups[0].readers[0]
        assert not np.allclose(model.weights.array(name), other.weights.array(name))  # something moved


def test_most_families_have_somewhere_to_move_scales():
    having = {family.name for family, index in EXAMPLES if scale_groups(lower(family.spec(family.examples[index])), Layers())}
    assert len(having) >= len({family.name for family, _ in EXAMPLES}) - 2


def test_a_llama_moves_four_a_block():
    groups = scale_groups(lower(small().spec), Layers(("blocks.0.*",)))
    assert [(group.x.removeprefix("blocks.0."), len(group.readers), type(group.before)) for group in groups] == [
        ("mixer_norm", 3, NormBefore), ("mixer.attended", 1, RowsBefore), ("feed_forward_norm", 2, NormBefore),
        ("feed_forward.activated", 1, RowsBefore),
    ]  # fmt: skip
    assert tie_of(groups[1]) is not None  # heads share values
    assert tie_of(groups[3]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_in_bf16_costs_nothing(kind):
    model = small(kind)
    other, groups = folded(model, torch.bfloat16)
    assert away(model, other) < 2e-5
    norms = [group.before.weight for group in groups if isinstance(group.before, NormBefore)]
    assert norms
    for name in norms:
        array = other.weights.array(name)
        assert np.array_equal(array, array.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_tied_inputs_share_a_scale():
    tie = torch.tensor([0, 1, 0, 1, 2])
    made = tied(torch.tensor([1.0, 4.0, 4.0, 4.0, 3.0]), tie)
    assert torch.allclose(made, torch.tensor([2.0, 4.0, 2.0, 4.0, 3.0]))
    around = balanced(torch.tensor([0.5, 8.0, 2.0]), None)
    assert torch.allclose(around.max() * around.min(), torch.tensor(1.0))


@pytest.mark.parametrize("seed", range(3))
def test_awq_never_does_worse_than_no_scales(seed):
    form, x = LinearFormat.parse("int3-g32"), inputs_of(seed, 300, 96).float()
    readers = [(weight_of(seed + index, 24, 96).float(), x.T @ x) for index in range(2)]
    scales, before, after = awq_scales(readers, form, magnitudes=x.abs().mean(0))
    assert after < before
    assert (scales > 0).all()

    def loss(scales):
        return sum(
            (((torch.from_numpy(form.quantize((weight * scales).numpy()).dense()) / scales - weight) @ x.T) ** 2).sum()
            for weight, _ in readers
        )

    assert float(loss(torch.ones(96))) == pytest.approx(before, rel=1e-3)
    assert float(loss(scales)) == pytest.approx(after, rel=1e-3)
    one, other = (awq_scales(readers, form, magnitudes=x.abs().mean(0), threads=threads)[0] for threads in (1, 2))
    assert torch.equal(one, other)


def test_smoothquant_halves_the_way():
    weight, largest = weight_of(0, 10, 30).float(), torch.rand(30) * 10
    largest[3] = 0
    scales = smooth_scales([weight], largest)
    others = torch.arange(30) != 3
    assert torch.allclose((largest / scales)[others], (weight * scales).abs().amax(0)[others])  # at 0.5 both are equally large
    assert scales[3] == 1
