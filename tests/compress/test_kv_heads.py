"""Fewer key/value heads: exact where heads say the same in other words, better than their mean elsewhere, and loaded like any model."""

import dataclasses

import msgspec
import numpy as np
import pytest

from hasten.backends.cpu import CpuBackend
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load_directory, save
from hasten.checkpoint.save import unread_elsewhere
from hasten.compress.convert.heads import KvHeads
from hasten.compress.recipe import BUILT_IN, recipe_of
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.formats.weights import Weight, Weights
from hasten.model import Source
from hasten.program import Batch, lower
from hasten.spec import Rotary
from tests.compress.models import native_error, random_weights, small, windows_for

LLAMA = next(family for family in all_families() if family.name == "llama")
NORMED = next(family for family in all_families() if family.name == "qwen3")


def convert(model, tmp_path, text=None, **settings):
    (step,) = recipe_of([{"kv_heads": settings}])
    step.transform.check(model, step.settings)
    return step.transform.apply(model, step.settings, text or windows_for(model), Run(tmp_path / "work", 2))


def with_weights(model, changed):
    weights = {**model.weights, **{name: Weight(a.shape, a.dtype, lambda a=a: a) for name, a in changed.items()}}
    return dataclasses.replace(model, weights=Weights(weights))


def with_mixers(model, **changes):
    """``model`` with other fields in every mixer, and random weights of that shape."""
    blocks = tuple(msgspec.structs.replace(block, mixer=msgspec.structs.replace(block.mixer, **changes)) for block in model.spec.blocks)
    return random_weights(msgspec.structs.replace(model.spec, blocks=blocks).checked(), seed=4)


def away(model, other, seed=1):
    ids = np.random.default_rng(seed).integers(0, model.spec.vocab, 20).tolist()
    a, b = model.logits(ids), other.logits(ids)
    assert np.isfinite(b).all()
    return np.abs(a - b).max() / np.abs(a).max()


def in_other_words(model, seed=3):
    """``model`` with heads of keys and values that are each the first one's, a pair turned and scaled by a number of its own, what is not
    rotated and values through a matrix of their own."""
    random, changed = np.random.default_rng(seed), {}
    for index, block in enumerate(model.spec.blocks):
        mixer = block.mixer
        half = mixer.position.dims // 2 if isinstance(mixer.position, Rotary) else 0
        pairs = np.arange(2 * half).reshape(-1, 2) if half and mixer.position.interleaved else np.arange(2 * half).reshape(2, -1).T
        for name, size in (("k", mixer.head_dim), ("v", mixer.value_dim)):
            maps = []
            for _ in range(mixer.kv_heads):
                matrix = random.normal(size=(size, size)) / size**0.5 + np.eye(size)
                if name == "k":
                    matrix[: 2 * half, :] = matrix[:, : 2 * half] = 0
                    for a, b in pairs:
                        c, s = random.normal(size=2)
                        matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
                maps.append(matrix)
            for part in ("weight", "bias") if mixer.bias else ("weight",):
                full = f"blocks.{index}.mixer.{name}.{part}"
                rows = model.weights.array(full).astype(np.float64)
                changed[full] = np.concatenate([matrix @ rows[:size] for matrix in maps]).astype(np.float32)
    return with_weights(model, changed)


def test_equal_heads_become_one_of_the_same_function(tmp_path):
    model, changed = small(), {}
    for index in range(2):
        for name in ("k", "v"):
            rows = model.weights.array(f"blocks.{index}.mixer.{name}.weight")
            changed[f"blocks.{index}.mixer.{name}.weight"] = np.concatenate([rows[:20], rows[:20]])
    model = with_weights(model, changed)
    for settings in ({}, {"fit": False}, {"pool": "mean"}, {"pool": "mean", "fit": False}):
        made = convert(model, tmp_path, count=1, **settings)
        assert [block.mixer.kv_heads for block in made.spec.blocks] == [1, 1]
        assert made.weights["blocks.0.mixer.k.weight"].shape == (20, 136)
        assert away(model, made) < 1e-4


KINDS = {
    "partly rotated": {},
    "interleaved": {"position": Rotary(base=100.0, dims=8, interleaved=True)},
    "all rotated, biases": {"position": Rotary(base=50.0, dims=20), "bias": True, "out_bias": True},
    "no positions": {"position": None},
    "values of another size, sinks, a cap": {"value_dim": 7, "sinks": True, "softcap": 4.0},
    "three heads": {"kv_heads": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_say_the_same_in_other_words_become_one_of_the_same_function(kind, tmp_path):
    model = in_other_words(with_mixers(small(), **KINDS[kind]))
    made = convert(model, tmp_path, count=1, fit=False)
    assert away(model, made) < 1e-4
    assert away(model, convert(model, tmp_path, count=1, pool="mean", fit=False)) > 1e-2  # so the words mattered


def test_groups_become_one_head_each(tmp_path):
    model = with_mixers(small(), kv_heads=6)
    rolled = {n: np.roll(model.weights.array(n), 20, 0) for n in model.weights if n.endswith(("mixer.k.weight", "mixer.v.weight"))}
    first, second = in_other_words(model), in_other_words(with_weights(model, rolled), 8)
    both = with_weights(model, {n: np.concatenate([first.weights.array(n)[:60], second.weights.array(n)[60:]]) for n in rolled})
    two = convert(both, tmp_path, count=2, fit=False)
    assert two.weights["blocks.1.mixer.v.weight"].shape == (40, 136)
    assert away(both, two) < 1e-4
    assert away(both, convert(both, tmp_path, count=1, fit=False)) > 1e-3  # two kinds, each in three words


def first_error(model, made):
    """The share of the mean square of the first layer's output that is lost, over tokens that nothing was fitted to."""
    from hasten.backends.reference import play
    from hasten.backends.reference.play import weights_of

    batch, outs = Batch.of([np.random.default_rng(seed).integers(0, model.spec.vocab, 40).tolist() for seed in range(90, 94)]), []
    for each in (model, made):
        program = lower(each.spec, context=40).with_outputs(["blocks.0.mixer.o"])
        outs.append(play(program, weights_of(program, each.weights), batch)[0]["blocks.0.mixer.o"])
    return float((outs[0] - outs[1]).square().sum() / outs[0].square().sum())


def test_aligned_and_fitted_is_nearer_than_the_mean(tmp_path):
    model = small()
    text = windows_for(model, lengths=(40,) * 80)
    ways = {
        (pool, fit): first_error(model, convert(model, tmp_path, text, count=1, pool=pool, fit=fit))
        for pool in ("mean", "aligned")
        for fit in (False, True)
    }
    assert ways["aligned", True] < ways["aligned", False] < ways["mean", False]
    assert ways["aligned", True] < ways["mean", True] < ways["mean", False]


def test_a_fit_says_what_it_gained(tmp_path):
    said = convert(small(), tmp_path, count=1).provenance[-1]
    assert said.transform == "kv_heads"
    assert said.evidence["layers"] == [0, 1]
    assert all(after < before for before, after in said.evidence["output_error"].values())
    model = small()
    kept = convert(model, tmp_path, count=1, layers=[1])
    assert list(kept.provenance[-1].evidence["output_error"]) == ["layer 1"]
    for name in model.weights:
        if not name.startswith("blocks.1.mixer."):
            assert np.array_equal(model.weights.array(name), kept.weights.array(name))
    before, after = kept.provenance[-1].evidence["cache_bytes_per_token"]
    assert (before, after) == (2 * 2 * 40 * 2, 2 * 40 * 2 + 40 * 2)


def test_threads_change_no_bit(tmp_path):
    model = small()
    one, two = (
        BUILT_IN["kv_heads"].apply(model, KvHeads(count=1), windows_for(model), Run(tmp_path / str(threads), threads)) for threads in (1, 2)
    )
    for name in one.weights:
        assert np.array_equal(one.weights.array(name), two.weights.array(name))


def test_a_familys_layout_says_it_and_transformers_reads_it(tmp_path):
    import torch
    import transformers

    config = LLAMA.examples[0]
    model = dataclasses.replace(random_weights(LLAMA.spec(config)), source=Source("llama", config))
    made = convert(model, tmp_path, count=1)
    assert unread_elsewhere(made) == ""
    save(made, tmp_path / "out")
    again = load_directory(tmp_path / "out", "again")
    assert again.spec == made.spec
    ids = np.random.default_rng(0).integers(0, 97, 17).tolist()
    assert np.array_equal(again.logits(ids), made.logits(ids))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert theirs.config.num_key_value_heads == 1
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(expected - made.logits(ids)).max() < 1e-4 * np.abs(expected).max()


def test_one_layer_alone_is_in_hastens_own_layout(tmp_path):
    config = LLAMA.examples[0]
    model = dataclasses.replace(random_weights(LLAMA.spec(config)), source=Source("llama", config))
    made = convert(model, tmp_path, count=1, layers=[1])
    assert "llama does not describe" in unread_elsewhere(made)
    save(made, tmp_path / "out")
    assert load_directory(tmp_path / "out", "again").spec == made.spec


def test_normed_keys_are_averaged_and_values_aligned(tmp_path):
    model = random_weights(NORMED.spec(NORMED.examples[0]))
    made = convert(model, tmp_path, count=1, fit=False)
    mixer = model.spec.blocks[0].mixer
    assert mixer.k_norm is not None
    name = "blocks.0.mixer.k.weight"
    by_head = model.weights.array(name).reshape(mixer.kv_heads, mixer.head_dim, -1)
    assert np.allclose(made.weights.array(name), by_head.mean(0), atol=1e-6)
    assert np.array_equal(made.weights.array("blocks.0.mixer.q.weight"), model.weights.array("blocks.0.mixer.q.weight"))
    assert away(model, made) < away(model, convert(model, tmp_path, count=1, fit=False, pool="mean"))


def test_natively_it_is_the_same_model_and_its_pages_are_half_as_large(tmp_path):
    made = convert(small(), tmp_path, count=1)
    before, after = (sum(pool.page_bytes for pool in CpuBackend().session(each, 64).compiled.pools) for each in (small(), made))
    assert 2 * after == before == 16 * made.provenance[-1].evidence["cache_bytes_per_token"][0]
    ids = np.random.default_rng(0).integers(0, made.spec.vocab, 30).tolist()
    assert native_error(made, ids) < 1.2
    assert lower(made.spec).states[0].kv_heads == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"count": 4}, "has 6 key/value heads, which can become 1 or 2 or 3"),
        ({"count": 6}, "which can become 1 or 2 or 3"),
        ({"count": 0}, "count is 0"),
        ({"count": 1, "layers": [2]}, "layers: 2 is none of random, whose layers are 0 to 1"),
        ({"count": 1, "layers": []}, "none is named"),
        ({"count": 1, "pool": "best"}, "settings are count, layers, pool, fit"),
    ],
)
def test_what_cannot_work_is_refused_first(settings, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        convert(with_mixers(small(), kv_heads=6), tmp_path, **settings)


def test_kinds_that_cannot_share_are_refused(tmp_path):
    by_name = {family.name: family for family in all_families()}
    relative = random_weights(by_name["transformer_xl"].spec(by_name["transformer_xl"].examples[0]))
    with pytest.raises((ConfigError, UnsupportedError), match="relative sinusoids|can become no fewer"):
        convert(relative, tmp_path, count=1)
    mamba = random_weights(by_name["mamba"].spec(by_name["mamba"].examples[0]))
    with pytest.raises(ConfigError, match="no attention to convert"):
        convert(mamba, tmp_path, count=1)
    rounded = BUILT_IN["rtn"].apply(small(), BUILT_IN["rtn"].settings(weights="int8"), None, Run(tmp_path / "rtn", 1))
    with pytest.raises(ConfigError, match="is quantized already"):
        convert(rounded, tmp_path, count=1)
