"""Feed-forward units cut: answers against numpy's, what is never used costs nothing, and what is left is an ordinary model."""

import dataclasses

import numpy as np
import pytest
import torch

from hasten.base.errors import ConfigError
from hasten.checkpoint import load, save, unread_elsewhere
from hasten.compress.cut.neurons import CutNeurons, check_cut_neurons, cut_neurons
from hasten.compress.cut.slices import kept_of
from hasten.compress.cut.spare import inputs_of, needed, spared
from hasten.compress.gptq import damped
from hasten.compress.recipe import recipe_of
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weights
from hasten.spec import MixtureOfExperts
from tests.compress.models import KINDS, changed, cut, random_weights, small, windows_for
from tests.families.oracles import make_checkpoint, read_checkpoint

FAMILIES = [(family, index) for family in all_families() for index in range(len(family.examples))]
WITHOUT = {"mamba", "mamba2"}
IDS = np.random.default_rng(5).integers(0, 90, 20).tolist()


def errors_left(weight, x, units, size):
    """What numpy's least squares leaves of weight · x without ``units``, [out, in] and [rows, in]."""
    kept = [i for i in range(x.shape[1]) if i // size not in units]
    target = x @ weight.T
    found = np.linalg.lstsq(x[:, kept], target, rcond=None)[0]
    return ((x[:, kept] @ found - target) ** 2).sum(), found.T


@pytest.mark.parametrize("size", [1, 3])
def test_the_unit_that_goes_is_the_one_least_squares_spares_best(size):
    random = np.random.default_rng(size)
    for _ in range(5):
        x = random.normal(size=(50, 12)) @ random.normal(size=(12, 12))
        weight = random.normal(size=(7, 12)) * random.uniform(0.2, 3, 12)
        units = 12 // size
        costs = [errors_left(weight, x, {unit}, size)[0] for unit in range(units)]
        moments, given = torch.tensor(x.T @ x), torch.tensor(weight)
        stays = needed(given, damped(moments, 1e-12), 1, size=size)
        assert set(range(units)) - set(stays.tolist()) == {int(np.argmin(costs))}
        made = spared(given, moments, 2, damp=1e-12, compensate=True, size=size)
        gone = set(range(units)) - set(made.units.tolist())
        left, weights = errors_left(weight, x, gone, size)
        assert np.allclose(made.weight.numpy(), weights, atol=1e-6)
        assert made.error == pytest.approx(left / ((x @ weight.T) ** 2).sum(), rel=1e-4, abs=1e-9)
        plain = spared(given, moments, 2, damp=1e-12, compensate=False, size=size)
        assert np.array_equal(plain.weight.numpy(), weight[:, inputs_of(plain.units, size)])
        assert plain.error >= made.error


def test_of_unrelated_inputs_the_least_go_whatever_is_taken_at_a_time():
    random = np.random.default_rng(0)
    weight, energy = torch.tensor(random.normal(size=(5, 600))), torch.tensor(random.uniform(0.1, 4, 600))
    stays = needed(weight, torch.diag(energy), 400)
    costs = weight.square().sum(0) * energy
    assert torch.equal(stays, costs.argsort(descending=True)[:200].sort().values)


def test_what_was_never_seen_stays_as_it_was_and_goes_by_its_size():
    random = np.random.default_rng(2)
    weight = torch.tensor(random.normal(size=(5, 12)) * np.arange(1, 13))
    nothing = spared(weight, torch.zeros(12, 12, dtype=torch.float64), 4, damp=0.01, compensate=True)
    assert nothing.units.tolist() == weight.square().sum(0).argsort()[4:].sort().values.tolist()
    assert torch.allclose(nothing.weight, weight[:, nothing.units])
    x = torch.tensor(random.normal(size=(40, 12)))
    x[:, [2, 9]] = 0
    some = spared(weight, x.T @ x, 1, damp=0.01, compensate=True)
    (gone,) = {*range(12)} - {*some.units.tolist()}
    assert gone in {2, 9}
    other = ({2, 9} - {gone}).pop()
    assert torch.allclose(some.weight[:, some.units.tolist().index(other)], weight[:, other])
    assert some.error == pytest.approx(0, abs=1e-12)


def test_each_team_loses_as_many():
    random = np.random.default_rng(1)
    weight = torch.tensor(random.normal(size=(5, 24)))
    weight[:, 12:] *= 100
    stays = needed(weight, torch.eye(24, dtype=torch.float64), 2, size=2, teams=[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    assert [int((stays < 6).sum()), int((stays >= 6).sum())] == [4, 4]
    with pytest.raises(ConfigError, match="none would be left"):
        needed(weight, torch.eye(24, dtype=torch.float64), 6, size=2, teams=[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("size", "share", "kept"), [(768, 0.25, 576), (5632, 0.25, 4224), (148, 0.25, 112), (52, 0.25, 39), (7, 0.5, 4), (100, 0.02, 98)]
)
def test_sizes_are_round_where_that_is_near(size, share, kept):
    assert kept_of(size, share, "units") == kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dead", ["down", "up", "gate"])
@pytest.mark.parametrize("compensate", [True, False])
def test_units_that_do_nothing_go_first_and_nothing_changes(kind, dead, compensate, tmp_path):
    random = np.random.default_rng(3)
    model, idle = small(kind), {}
    for name in [name for name in model.weights if name.endswith(f"{dead}.weight") and "feed_forward" in name]:
        array = model.weights.array(name).copy()
        hidden = array.shape[-1] if dead == "down" else array.shape[-2]
        for matrix in array.reshape(-1, *array.shape[-2:]):
            gone = random.permutation(hidden)[: hidden - kept_of(hidden, 0.25, "units")]
            matrix[(slice(None), gone) if dead == "down" else gone] = 0
        idle[name] = array
    model = changed(model, idle)
    made = cut(model, {"cut_neurons": {"compensate": compensate, "damp": 1e-4}}, tmp_path)
    assert made.weights.parameters < model.weights.parameters
    ids = np.random.default_rng(0).integers(0, 301, 40).tolist()
    a, b = model.logits(ids), made.logits(ids)
    if kind == "MoE" and compensate:
        assert np.sqrt(np.mean((a - b) ** 2)) < 1e-3  # experts that saw few tokens
    else:
        assert np.abs(a - b).max() < 2e-4 * np.abs(a).max()


def test_what_is_lost_is_less_where_the_others_make_it_good(tmp_path):
    model, text = small(), windows_for(small(), lengths=(48,) * 24)
    ids = np.random.default_rng(0).integers(0, 301, 40).tolist()
    expected = model.logits(ids)
    away = []
    for compensate in (True, False):
        made = cut(model, {"cut_neurons": {"compensate": compensate}}, tmp_path / str(compensate), text)
        away.append(np.sqrt(np.mean((made.logits(ids) - expected) ** 2)))
        assert made.provenance[-1].transform == "cut_neurons"
        assert made.provenance[-1].evidence["units"] == [296, 224]
        assert 0 < made.provenance[-1].evidence["mean_error"] < 1
    assert away[0] < away[1]


def test_what_stays_and_what_does_not(tmp_path):
    model = small()
    made = cut(model, {"cut_neurons": {"share": 0.5, "skip": ["blocks.0.*"]}}, tmp_path)
    assert [block.feed_forward.hidden for block in made.spec.blocks] == [148, 74]
    fallen = sum(model.weights[name].size - made.weights[name].size for name in model.weights)
    assert fallen == 3 * 74 * 136
    for name in model.weights:
        if "blocks.1.feed_forward" not in name or "norm" in name:
            assert np.array_equal(model.weights.array(name), made.weights.array(name))
    rows = [set(map(tuple, each.weights.array("blocks.1.feed_forward.up.weight").tolist())) for each in (model, made)]
    assert rows[1] < rows[0]
    save(made, tmp_path / "m")
    read = load(str(tmp_path / "m"))
    assert read.spec == made.spec
    assert read.provenance[-1].evidence == made.provenance[-1].evidence
    assert np.array_equal(read.logits(IDS), made.logits(IDS))
    assert np.allclose(read.logits(IDS, "cpu"), made.logits(IDS), atol=0.2)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_kills_change_nothing(threads, tmp_path):
    model, text = small("MoE"), windows_for(small("MoE"))
    settings = CutNeurons()
    whole = cut_neurons(model, settings, text, Run(tmp_path / "a", 1))

    def stop(doing, done, of):
        if doing == "block 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_neurons(model, settings, text, Run(tmp_path / "b", threads, stop))
    assert (tmp_path / "b" / "block-0000.safetensors").is_file()
    again = cut_neurons(model, settings, text, Run(tmp_path / "b", threads))
    assert whole.spec == again.spec
    for name in whole.weights:
        assert np.array_equal(whole.weights.array(name), again.weights.array(name))


@pytest.mark.parametrize(("family", "index"), FAMILIES, ids=lambda value: getattr(value, "name", value))
def test_every_familys_model_stays_an_ordinary_one(family, index, tmp_path):
    model = random_weights(family.spec(family.examples[index]))
    if family.name in WITHOUT:
        with pytest.raises(ConfigError, match="no feed-forward"):
            check_cut_neurons(model, CutNeurons())
        return
    made = cut(model, {"cut_neurons": {}}, tmp_path)
    for before, after in zip(model.spec.blocks, made.spec.blocks, strict=True):
        for old, new in zip(hidden(before.feed_forward), hidden(after.feed_forward), strict=True):
            assert new == kept_of(old, 0.25, "units")
    assert np.isfinite(made.logits(IDS[:8])).all()


def hidden(part):
    if isinstance(part, MixtureOfExperts):
        return [part.expert.hidden, *([part.shared.hidden] if part.shared else [])]
    return [part.hidden]


@pytest.mark.parametrize(
    ("name", "index"),
    [("llama", 0), ("llama", 1), ("qwen2", 0), ("qwen3", 0), ("gpt2", 0), ("gpt_neox", 0), ("mixtral", 0), ("qwen3_moe", 1), ("phi3", 0)],
)
def test_transformers_loads_it_with_the_same_logits(name, index, tmp_path):
    config = next(family for family in all_families() if family.name == name).examples[index]
    if "num_experts_per_tok" in config:  # transformers' product of experts wants rows of 16 bytes
        config = {**config, "intermediate_size": 64, **({"moe_intermediate_size": 48} if "moe_intermediate_size" in config else {})}
    make_checkpoint(config, tmp_path / "plain")
    model = load(str(tmp_path / "plain"))
    made = cut(model, {"cut_neurons": {}}, tmp_path / "work")
    assert not unread_elsewhere(made)
    save(made, tmp_path / "m")
    expected, found = read_checkpoint(tmp_path / "m")(IDS), made.logits(IDS)
    assert np.abs(expected - found).max() < 1e-4 * np.abs(expected).max()
    assert np.array_equal(load(str(tmp_path / "m")).logits(IDS), found)


def test_blocks_that_differ_are_told_of(tmp_path):
    config = next(family for family in all_families() if family.name == "llama").examples[0]
    make_checkpoint(config, tmp_path / "plain")
    made = cut(load(str(tmp_path / "plain")), {"cut_neurons": {"skip": ["blocks.1.*"]}}, tmp_path / "work")
    assert "llama does not describe what the model has become" in unread_elsewhere(made)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"share": 0.0}, "share is 0.0; accepted"),
        ({"share": 1.0}, "share is 1.0; accepted"),
        ({"share": 0.001}, "none of them"),
        ({"share": 0.9999}, "all of them"),
        ({"damp": 0.0}, "damp is 0.0"),
        ({"skip": ["blocks.*"]}, "no feed-forward that is not skipped"),
    ],
)
def test_what_cannot_work_is_refused_first(settings, reason):
    (step,) = recipe_of([{"cut_neurons": settings}])
    with pytest.raises(ConfigError, match=reason):
        step.transform.check(small(), step.settings)


def test_what_is_rounded_is_not_cut():
    model = small()
    name = "blocks.1.feed_forward.down.weight"
    rounded = QuantizedWeight.from_array(model.weights.array(name), LinearFormat.parse("int8"))
    model = dataclasses.replace(model, weights=Weights({**model.weights, name: rounded}))
    with pytest.raises(ConfigError, match=f"{name} is quantized already"):
        check_cut_neurons(model, CutNeurons())
