"""Blocks cut: one that does nothing goes first and nothing changes, and what is left is an ordinary model with fewer."""

import msgspec
import numpy as np
import pytest
import torch
import transformers

from hasten.backends.reference import play
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load, save, unread_elsewhere
from hasten.compress.blocks import pieces
from hasten.compress.cut.behind import made_good
from hasten.compress.cut.layers import CutLayers, check_cut_layers, influences
from hasten.compress.data import text_of
from hasten.compress.gates import require_smaller
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.model import Model
from hasten.program import Batch
from hasten.spec import Exit, LowRank, RMSNorm, Sandwich
from tests.compress.models import changed, cut, random_weights, small, windows_for
from tests.families.oracles import make_checkpoint, read_checkpoint

IDS = np.random.default_rng(5).integers(0, 90, 20).tolist()
FAMILIES = [(family, index) for family in all_families() for index in range(len(family.examples))]


def deep(count, kind="grouped-query"):
    """A model of ``count`` blocks that differ."""
    spec = small(kind).spec
    return random_weights(spec_of(spec, count), seed=count)


def spec_of(spec, count):
    return msgspec.structs.replace(spec, blocks=tuple(spec.blocks[index % len(spec.blocks)] for index in range(count)))


def idle(model, *blocks):
    """``model`` with blocks that hand on what they are given."""
    names = [f"blocks.{index}.{path}.weight" for index in blocks for path in ("mixer.o", "feed_forward.down")]
    return changed(model, {name: np.zeros_like(model.weights.array(name)) for name in names})


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("gone", [[2], [0, 3], [1, 2]])
def test_blocks_that_do_nothing_go_and_nothing_changes(gone, compensate, tmp_path):
    model = idle(deep(5), *gone)
    made = cut(model, {"cut_layers": {"count": len(gone), "compensate": compensate}}, tmp_path)
    assert made.provenance[-1].evidence["layers"] == gone
    assert np.allclose(list(made.provenance[-1].evidence["influence"].values()), 0, atol=1e-6)
    assert np.allclose(made.logits(IDS), model.logits(IDS), atol=1e-4 if compensate else 0, rtol=0)
    left = [index for index in range(5) if index not in gone]
    for new, old in enumerate(left):
        assert np.array_equal(made.weights.array(f"blocks.{new}.mixer.q.weight"), model.weights.array(f"blocks.{old}.mixer.q.weight"))
    of_blocks = sum(weight.size for name, weight in model.weights.items() if name.startswith("blocks."))
    assert model.weights.parameters - made.weights.parameters == of_blocks * len(gone) / 5


def test_influence_is_what_transformers_states_say(tmp_path):
    config = {**next(family for family in all_families() if family.name == "llama").examples[0], "num_hidden_layers": 3}
    make_checkpoint(config, tmp_path / "m")
    model = load(str(tmp_path / "m"))
    text = windows_for(model)
    found = influences(model, CutLayers(), text, Run(tmp_path / "work", 2))
    judge = transformers.LlamaModel.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    kept = []
    judge.norm.register_forward_pre_hook(lambda module, given: kept.append(given[0]))  # the last state, which is handed out normed
    with torch.no_grad():
        states = [judge(torch.tensor([window]), output_hidden_states=True).hidden_states for window in text.windows]
    rows = [torch.cat([each[layer][0] if layer < 3 else last[0] for each, last in zip(states, kept)]) for layer in range(4)]
    expected = [1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(rows, rows[1:])]
    assert np.allclose(found, expected, atol=1e-5)
    made = cut(model, {"cut_layers": {"count": 1}}, tmp_path / "cut", text)
    assert made.provenance[-1].evidence["layers"] == [int(np.argmin(expected))]


def test_what_is_left_is_measured_again(tmp_path):
    model = deep(4)
    made = cut(model, {"cut_layers": {"share": 0.5}}, tmp_path)
    assert len(made.spec.blocks) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "fit"]
    first, second = made.provenance[-1].evidence["influence"].values()
    one = cut(model, {"cut_layers": {"count": 1}}, tmp_path / "one")
    found = influences(one, CutLayers(), windows_for(model), Run(tmp_path / "again", 1))
    assert [first] == list(one.provenance[-1].evidence["influence"].values())
    assert second == min(found)


def values(model, ids, gone=()):
    """By name all that ``model`` computes of ``ids`` when the blocks ``gone`` hand on what they are given."""
    weights, found, stream = {name: torch.tensor(model.weights.array(name)) for name in model.weights}, {}, None
    for index, piece in enumerate(pieces(model.spec, len(ids))):
        given = {} if stream is None else {piece.inputs[0]: stream}
        names = [name for op in piece.ops for name in op.outputs]
        made = play(piece.with_outputs(names), weights, Batch.of([ids], rows="none"), given=given)[0]
        found |= given | made
        if index - 1 not in gone:
            stream = made[piece.outputs[0]]
        found[f"after {index - 1}"] = stream
    return {name: each.double().numpy() for name, each in found.items()}


@pytest.mark.parametrize("kind", ["grouped-query", "multi-query"])
def test_what_comes_behind_makes_it_good_as_numpy_would(kind, tmp_path):
    model, ids = deep(4, kind), np.random.default_rng(3).integers(0, 301, 60).tolist()
    text = text_of("ids", [ids])
    made, left = made_good(model, [1], 0.02, text, Run(tmp_path, 2))
    fitted = [f"blocks.{index}.{path}.weight" for index in (2, 3) for path in ("mixer.o", "feed_forward.down")]
    assert [name for name in model.weights if not np.array_equal(model.weights.array(name), made.weights.array(name))] == fitted
    assert list(left) == fitted
    whole, mine = values(model, ids), values(made, ids, gone=[1])
    for index, path, x, stream, out in [
        (2, "mixer.o", "mixer.attended", "after 1", "mixer_out"),
        (2, "feed_forward.down", "feed_forward.activated", "blocks.2.mixer_out", "out"),
        (3, "mixer.o", "mixer.attended", "after 2", "mixer_out"),
        (3, "feed_forward.down", "feed_forward.activated", "blocks.3.mixer_out", "out"),
    ]:
        name, before = f"blocks.{index}.{path}.weight", f"blocks.{index}."
        inputs, target = mine[before + x], whole[before + out] - mine[stream]
        old = model.weights.array(name).astype(np.float64)
        pull = np.sqrt(0.02 * (inputs**2).sum(0).mean()) * np.eye(inputs.shape[1])
        expected = np.linalg.lstsq(np.vstack([inputs, pull]), np.vstack([target, pull @ old.T]), rcond=None)[0].T
        found = made.weights.array(name)
        assert np.allclose(found, expected, atol=1e-3 * np.abs(expected).max())
        share = ((target - inputs @ found.T) ** 2).sum() / ((target - inputs @ old.T) ** 2).sum()
        assert left[name] == pytest.approx(share, rel=1e-3)
        assert share < 1


def test_a_norm_or_experts_before_the_stream_are_left_alone(tmp_path):
    for kind, name in (("MoE", "small"), ("grouped-query", "sandwich")):
        model = deep(3, kind)
        if name == "sandwich":
            norm = RMSNorm(eps=1e-6)
            wiring = Sandwich(mixer=norm, mixer_post=norm, feed_forward=norm, feed_forward_post=norm)
            blocks = tuple(msgspec.structs.replace(block, wiring=wiring) for block in model.spec.blocks)
            model = random_weights(msgspec.structs.replace(model.spec, blocks=blocks))
        made, left = made_good(model, [0], 0.01, windows_for(model), Run(tmp_path / name, 1))
        assert list(left) == ([] if name == "sandwich" else ["blocks.1.mixer.o.weight", "blocks.2.mixer.o.weight"])
        assert {key for key in model.weights if not np.array_equal(model.weights.array(key), made.weights.array(key))} == {*left}


@pytest.mark.parametrize(("family", "index"), FAMILIES, ids=lambda value: getattr(value, "name", value))
def test_every_familys_model_stays_an_ordinary_one(family, index, tmp_path):
    model = random_weights(spec_of(family.spec(family.examples[index]), 3))
    made = cut(model, {"cut_layers": {"count": 2}}, tmp_path / "work")
    (gone_a, gone_b) = made.provenance[-1].evidence["layers"]
    (left,) = {0, 1, 2} - {gone_a, gone_b}
    assert made.spec.blocks == (model.spec.blocks[left],)
    save(made, tmp_path / "m")
    read = load(str(tmp_path / "m"))
    assert read.spec == made.spec
    assert np.allclose(read.logits(IDS[:8]), made.logits(IDS[:8]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "index"), [("llama", 0), ("llama", 1), ("qwen2", 1), ("gemma2", 0), ("gemma3", 0), ("gpt2", 0), ("qwen3_moe", 0)]
)
def test_transformers_loads_it_with_the_same_logits(name, index, tmp_path):
    config = next(family for family in all_families() if family.name == name).examples[index]
    make_checkpoint(config, tmp_path / "plain")
    model = load(str(tmp_path / "plain"))
    made = cut(model, {"cut_layers": {"count": 1}}, tmp_path / "work")
    assert not unread_elsewhere(made)
    save(made, tmp_path / "m")
    expected, found = read_checkpoint(tmp_path / "m")(IDS), made.logits(IDS)
    assert np.abs(expected - found).max() < 1e-4 * np.abs(expected).max()
    assert np.array_equal(load(str(tmp_path / "m")).logits(IDS), found)


def test_cuts_stand_before_rounding_in_one_recipe(tmp_path):
    model = deep(4)
    listed = [{"cut_layers": {"count": 1}}, {"cut_heads": {"share": 1 / 3}}, {"cut_neurons": {}}, {"rtn": {"weights": "int8"}}]
    made = carry_out(model, recipe_of(listed), windows_for(model), Run(tmp_path / "work", 2))
    assert [entry.transform for entry in made.provenance] == ["cut_layers", "cut_heads", "cut_neurons", "rtn"]
    assert [(block.mixer.heads, block.feed_forward.hidden) for block in made.spec.blocks] == [(4, 112)] * 3
    assert require_smaller(model, made).what == "blocks"
    save(made, tmp_path / "m")
    read = load(str(tmp_path / "m"))
    assert read.spec == made.spec
    assert np.allclose(read.logits(IDS), made.logits(IDS), atol=1e-5)
    with pytest.raises(ConfigError, match="cut_layers stands after rtn"):
        check_recipe(model, recipe_of([*listed[3:], listed[0]]))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"count": 0}, "count of 0 of 2 blocks takes 0; at least 1 goes and 1 stays"),
        ({"count": 2}, "count of 2 of 2"),
        ({"count": -1}, "count of -1"),
        ({"share": 0.1}, "share of 0.1 of 2 blocks takes 0"),
        ({"share": 0.9}, "share of 0.9 of 2 blocks takes 2"),
        ({"share": 1.5}, "share is 1.5"),
        ({"share": 0.5, "count": 1}, "give one of them"),
    ],
)
def test_what_cannot_work_is_refused_first(settings, reason):
    (step,) = recipe_of([{"cut_layers": settings}])
    with pytest.raises(ConfigError, match=reason):
        step.transform.check(small(), step.settings)


def test_a_model_with_exits_is_refused():
    spec = small().spec
    spec = msgspec.structs.replace(spec, exits=(Exit(after=0, norm=spec.norm, head=spec.head),))
    with pytest.raises(UnsupportedError, match="early exits"):
        check_cut_layers(Model(name="early", spec=spec, weights=random_weights(spec).weights), CutLayers(count=1))


@pytest.mark.parametrize("name", ["cut_neurons", "cut_heads", "cut_width", "cut_layers"])
def test_shared_matrices_are_not_cut_and_products_where_that_is_well(name, tmp_path):
    spec, settings = deep(4).spec, {} if name == "cut_layers" else {"share": 1 / 3}
    shared = (*spec.blocks[:3], msgspec.structs.replace(spec.blocks[3], shares=1))
    (step,) = recipe_of([{name: settings}])
    with pytest.raises(UnsupportedError, match="blocks.3 shares its matrices"):
        step.transform.check(random_weights(msgspec.structs.replace(spec, blocks=shared)), step.settings)
    layers = ("mixer.o", "mixer.q", "feed_forward.up", "feed_forward.down")
    low = msgspec.structs.replace(spec.blocks[1], low_rank=tuple(LowRank(layer=layer, rank=9) for layer in layers))
    model = random_weights(msgspec.structs.replace(spec, blocks=(spec.blocks[0], low, low, low)))
    if name in ("cut_neurons", "cut_heads"):
        with pytest.raises(UnsupportedError, match="blocks.1.mixer.o is a product of two matrices"):
            step.transform.check(model, step.settings)
        return
    made = cut(model, {name: settings}, tmp_path)
    assert made.weights.parameters < model.weights.parameters
    lost = np.sqrt(np.mean((made.logits(IDS) - model.logits(IDS)) ** 2)) / model.logits(IDS).std()
    assert 0 < lost < 1.2
