"""Layers that share matrices, and matrices of low rank: what they mean, and that they are played, stored and healed as such."""

import dataclasses

import msgspec
import numpy as np
import pytest
import torch

from hasten.base.errors import ConfigError
from hasten.checkpoint import load, load_directory, save, unread_elsewhere
from hasten.compress.heal import Heal, heal
from hasten.compress.low_rank import Rank, factors
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.share import Share
from hasten.compress.walk import Run
from hasten.formats.weights import Weight, Weights
from hasten.model import Model
from hasten.program import lower
from hasten.spec import LowRank, Spec
from tests.compress.models import random_weights, small, windows_for

TOKENS = np.random.default_rng(4).integers(0, 300, 37).tolist()


def of_arrays(model, arrays):
    made = {name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}
    return dataclasses.replace(model, weights=Weights(made))


def four_blocks(same=True, seed=2):
    """Four blocks, of which 1 has the matrices of 0 and 3 those of 2, and norms of its own."""
    spec = msgspec.structs.replace(small().spec, blocks=small().spec.blocks * 2)
    arrays = {name: weight.load() for name, weight in random_weights(spec, seed).weights.items()}
    for name in arrays if same else ():
        if name.startswith(("blocks.1.", "blocks.3.")) and arrays[name].ndim > 1:
            arrays[name] = arrays[f"blocks.{int(name[7]) - 1}{name[8:]}"]
    return of_arrays(Model(name="four", spec=spec, weights=Weights({})), arrays)


def through(model, listed, work, text=None):
    return carry_out(model, recipe_of(listed), text, Run(work, 1))


def native(model):
    from hasten.backends.cpu import CpuBackend

    return CpuBackend().logits(model, TOKENS)


def test_layers_with_the_same_matrices_share_them_and_nothing_changes(tmp_path):
    model = four_blocks()
    made = through(model, [{"share": {"every": 2}}], tmp_path)
    assert [block.shares for block in made.spec.blocks] == [None, 0, None, 2]
    matrices = sum(weight.nbytes for name, weight in model.weights.items() if name.startswith("blocks.") and len(weight.shape) > 1)
    assert model.weights.nbytes - made.weights.nbytes == matrices // 2
    assert np.array_equal(made.logits(TOKENS), model.logits(TOKENS))
    assert np.array_equal(native(made), native(model))
    mean = through(model, [{"share": {"keep": "mean"}}], tmp_path)
    assert np.allclose(mean.logits(TOKENS), model.logits(TOKENS), atol=1e-4)


def test_norms_stay_their_own(tmp_path):
    made = through(four_blocks(), ["share"], tmp_path)
    assert not np.array_equal(made.weights.array("blocks.0.mixer_norm.weight"), made.weights.array("blocks.1.mixer_norm.weight"))
    other = through(four_blocks(same=False), ["share"], tmp_path)
    assert not np.allclose(other.logits(TOKENS), four_blocks(same=False).logits(TOKENS), atol=1e-2)  # it does cost


def test_groups_are_neighbours_that_can_share():
    blocks = four_blocks().spec.blocks
    assert list(Share(every=3).groups(blocks)) == [[0, 1, 2]]
    assert list(Share(every=2, skip=(0,)).groups(blocks)) == [[1, 2]]
    assert list(Share(every=4).groups(blocks)) == [[0, 1, 2, 3]]
    other = msgspec.structs.replace(blocks[1], low_rank=(LowRank(layer="mixer.q", rank=3),))
    assert list(Share().groups((blocks[0], other, *blocks[2:]))) == [[2, 3]]


@pytest.mark.parametrize("listed", [["share"], [{"rank": {"share": 0.4}}], [{"rank": {"skip": ["blocks.0.*"]}}, "share"]])
def test_what_is_written_is_read_and_played_alike(listed, tmp_path):
    model = four_blocks()
    made = through(model, listed, tmp_path / "work", windows_for(model))
    save(made, tmp_path / "out")
    read = load_directory(tmp_path / "out", "four")
    assert read.spec == made.spec
    assert "no family" in unread_elsewhere(made)
    assert np.array_equal(read.logits(TOKENS), made.logits(TOKENS))
    assert np.allclose(native(read), made.logits(TOKENS), atol=0.2, rtol=0.05)
    assert np.abs(native(read) - made.logits(TOKENS)).mean() < 0.03


def test_shared_layers_heal_as_one(tmp_path):
    original = load("code-8m")
    made = through(original, ["share"], tmp_path / "share")
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x + 1\n\n\n" * 60)
    asked = Heal(steps=4, tokens=256, sequence=64, precision="float32", warmup=0.2, text=str(text))
    healed = heal(made, asked, original, Run(tmp_path / "heal", 1))
    assert healed.weights.keys() == made.weights.keys()
    assert healed.provenance[-1].evidence["last_loss"] < 0.9 * healed.provenance[-1].evidence["first_loss"]
    assert not np.array_equal(healed.weights.array("blocks.0.mixer.q.weight"), made.weights.array("blocks.0.mixer.q.weight"))
    with pytest.raises(ConfigError, match="would treat twice"):
        through(made, [{"gptq": {}}], tmp_path / "gptq", windows_for(made))
    rounded = through(made, [{"rtn": {"weights": "int8"}}], tmp_path / "rtn")
    assert rounded.weights.nbytes < made.weights.nbytes


def test_weights_of_that_rank_are_found(tmp_path):
    """Nothing is lost where nothing is beyond the rank, and the Spec says the rank."""
    model, settings = small(), Rank(share=0.5)
    random, arrays = np.random.default_rng(0), {name: weight.load() for name, weight in model.weights.items()}
    for name, array in arrays.items():
        if name.startswith("blocks.") and array.ndim == 2:
            rank = settings.rank(array.shape)
            left, right = random.normal(size=(len(array), rank)), random.normal(size=(rank, array.shape[1]))
            arrays[name] = (left @ right / np.sqrt(rank * array.shape[1])).astype(np.float32)
    exact = of_arrays(model, arrays)
    made = through(exact, [{"rank": {"share": 0.5}}], tmp_path, windows_for(exact))
    assert np.allclose(made.logits(TOKENS), exact.logits(TOKENS), atol=2e-3)
    params = lower(made.spec).params
    for block in range(2):
        for low in made.spec.blocks[block].low_rank:
            shape = exact.weights[f"blocks.{block}.{low.layer}.weight"].shape
            assert params[f"blocks.{block}.{low.layer}.a.weight"] == (low.rank, shape[1])
            assert params[f"blocks.{block}.{low.layer}.b.weight"] == (shape[0], low.rank)
            assert low.rank == settings.rank(shape)
        assert len(made.spec.blocks[block].low_rank) == 7

    def of_matrices(model):
        return sum(w.nbytes for n, w in model.weights.items() if n.startswith("blocks.") and len(w.shape) > 1)

    assert 0.48 < of_matrices(made) / of_matrices(exact) <= 0.5


@pytest.mark.parametrize(("out", "size", "rank"), [(7, 13, 3), (20, 9, 5), (16, 16, 15)])
def test_factors_lose_the_least_of_what_is_given(out, size, rank):
    random = np.random.default_rng(out)
    weight = torch.tensor(random.normal(size=(out, size)))
    x = torch.tensor(random.normal(size=(size, 50)) * np.logspace(-2, 1, size)[:, None])
    moments = x @ x.T
    a, b, lost = factors(weight, moments, rank, 1e-9)
    assert (a.shape, b.shape) == ((rank, size), (out, rank))

    def error(other):
        return float((((weight - other) @ x) ** 2).sum() / ((weight @ x) ** 2).sum())

    assert error(b @ a) == pytest.approx(lost, rel=1e-3, abs=1e-9)
    left, values, right = torch.linalg.svd(weight)
    assert error(b @ a) < error(left[:, :rank] * values[:rank] @ right[:rank])  # blind to what is read
    for _ in range(20):  # nothing nearby is better
        nudged = (b + 1e-3 * torch.tensor(random.normal(size=b.shape))) @ (a + 1e-3 * torch.tensor(random.normal(size=a.shape)))
        assert error(nudged) >= lost * (1 - 1e-3)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([{"share": {"every": 1}}], "every is 1; accepted are 2 to 2"),
        ([{"share": {"every": 9}}], "every is 9"),
        ([{"share": {"skip": [5]}}], "skip names layer 5"),
        ([{"share": {"skip": [0]}}], "none can share"),
        ([{"rank": {"share": 0}}], "share is 0"),
        ([{"rank": {"share": 0.999}}], "nothing left"),
        ([{"rank": {"layers": ["blocks.9.*"]}}], "no weight of this model"),
        ([{"rtn": {}}, {"share": {}}], "stands after rtn"),
        ([{"awq": {}}, {"rank": {}}], "stands after awq"),
    ],
)
def test_what_cannot_work_is_refused(listed, said):
    with pytest.raises(ConfigError, match=said):
        check_recipe(small(), recipe_of(listed))


def test_experts_have_no_rank():
    with pytest.raises(ConfigError, match="experts"):
        check_recipe(small("MoE"), recipe_of(["rank"]))


def test_a_spec_says_who_shares_and_refuses_what_cannot():
    spec = four_blocks().spec
    block = spec.blocks[0]

    def of(*blocks):
        return msgspec.structs.replace(spec, blocks=blocks).checked()

    def sharing(other):
        return msgspec.structs.replace(block, shares=other)

    assert of(block, sharing(0)).blocks[1].shares == 0
    assert Spec.from_json(of(block, sharing(0)).to_json()) == of(block, sharing(0))
    assert b"shares" not in of(block, block).to_json()  # so that what does not share is read by what knows nothing of it
    for blocks in [(sharing(0), block), (block, sharing(1)), (block, sharing(0), sharing(1)), (block, sharing(7))]:
        with pytest.raises(ConfigError, match="shares the weights of block"):
            of(*blocks)
    low = msgspec.structs.replace(block, low_rank=(LowRank(layer="mixer.q", rank=3),))
    with pytest.raises(ConfigError, match="which has other parts"):
        of(low, sharing(0))
    with pytest.raises(ConfigError, match="names a layer twice"):
        of(msgspec.structs.replace(block, low_rank=low.low_rank * 2))
    for layer in ("mixer.zz", "mixer.q_rotated", "feed_forward"):
        with pytest.raises(ConfigError, match="no linear layer"):
            lower(of(msgspec.structs.replace(block, low_rank=(LowRank(layer=layer, rank=3),))))
