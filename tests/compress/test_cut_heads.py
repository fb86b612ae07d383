"""Heads cut: those that do nothing go first and nothing changes, groups stay whole, and what is left is an ordinary model."""

import dataclasses

import msgspec
import numpy as np
import pytest

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load, save, unread_elsewhere
from hasten.compress.cut.heads import CutHeads, check_cut_heads, cut_heads, heads_of, to_go
from hasten.compress.recipe import recipe_of
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.formats.cache import MeantCache
from hasten.spec import Alibi, Attention, LatentAttention, RMSNorm, Rotary
from tests.compress.models import changed, cut, random_weights, small, windows_for
from tests.families.oracles import make_checkpoint, read_checkpoint

IDS = np.random.default_rng(5).integers(0, 90, 20).tolist()
FAMILIES = [(family, index) for family in all_families() for index in range(len(family.examples))]

SHAPES = {  # heads, key/value heads, what else is odd
    "grouped": (6, 2, {}),
    "biases": (8, 4, {"bias": True, "out_bias": True}),
    "multi-query": (5, 1, {"q_norm": RMSNorm(eps=1e-6), "k_norm": RMSNorm(eps=1e-6)}),
    "multi-head": (4, 4, {"sinks": True}),
    "gated": (6, 3, {"gate": True, "bias": True}),
    "alibi": (6, 2, {"position": Alibi(slopes=(0.5, 0.25, 0.1, 0.05, 0.02, 0.01))}),
    "values of their own size": (6, 2, {"value_dim": 12, "sinks": True}),
}


def model_of(shape, seed=0, blocks=2):
    """Blocks of one odd attention."""
    heads, kv_heads, odd = SHAPES[shape]
    spec = small().spec
    fields = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": 20,
        "value_dim": 20,
        "scale": 20**-0.5,
        "position": Rotary(base=1e4, dims=12),
    }
    block = msgspec.structs.replace(spec.blocks[0], mixer=Attention(**{**fields, **odd}))
    return random_weights(msgspec.structs.replace(spec, blocks=(block,) * blocks), seed)


def idle(model, gone):
    """``model`` whose query heads ``gone`` (by block) have no say."""
    arrays = {}
    for index, heads in gone.items():
        name, dim = f"blocks.{index}.mixer.o.weight", model.spec.blocks[index].mixer.value_dim
        array = model.weights.array(name).copy()
        for head in heads:
            array[:, head * dim : (head + 1) * dim] = 0
        arrays[name] = array
    return changed(model, arrays)


def of_groups(model, kind, share, seed):
    """Heads that may go of each block: as many of each group, or whole groups; and which units these leave."""
    random, gone, left = np.random.default_rng(seed), {}, {}
    for index, block in enumerate(model.spec.blocks):
        heads, kv_heads = block.mixer.heads, block.mixer.kv_heads
        per = heads // kv_heads
        if kind == "kv" or per == 1:
            groups = random.permutation(kv_heads)[: round(share * kv_heads)]
            gone[index] = [group * per + each for group in groups for each in range(per)]
        else:
            gone[index] = [group * per + each for group in range(kv_heads) for each in random.permutation(per)[: round(share * per)]]
        left[index] = sorted({*range(heads)} - {*gone[index]})
    return gone, left


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(("shape", "kind", "share"), [
    ("grouped", "query", 1 / 3), ("grouped", "kv", 0.5), ("biases", "query", 0.5), ("biases", "kv", 0.25), ("multi-query", "query", 0.4),
    ("multi-head", "query", 0.25), ("multi-head", "kv", 0.5), ("gated", "query", 0.5), ("gated", "kv", 1 / 3), ("alibi", "query", 1 / 3),
    ("alibi", "kv", 0.5), ("values of their own size", "query", 1 / 3), ("values of their own size", "kv", 0.5),
])  # fmt: skip
def test_heads_that_do_nothing_go_first_and_nothing_changes(shape, kind, share, compensate, tmp_path):
    model = model_of(shape)
    gone, left = of_groups(model, kind, share, seed=len(shape))
    model = idle(model, gone)
    settings = {"share": share, "kind": kind, "compensate": compensate, "damp": 1e-6}
    made = cut(model, {"cut_heads": settings}, tmp_path, windows_for(model, lengths=(48,) * 12))
    for index, block in enumerate(made.spec.blocks):
        assert block.mixer.heads == len(left[index])
        dim, path = block.mixer.head_dim, f"blocks.{index}.mixer.q.weight"
        rows = [head * dim + each for head in left[index] for each in range(dim)]
        assert np.array_equal(made.weights.array(path), model.weights.array(path)[rows])
        if isinstance(block.mixer.position, Alibi):
            assert block.mixer.position.slopes == tuple(SHAPES[shape][2]["position"].slopes[head] for head in left[index])
    expected, found = model.logits(IDS), made.logits(IDS)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    keys = sum(block.mixer.kv_heads for block in made.spec.blocks) / sum(block.mixer.kv_heads for block in model.spec.blocks)
    assert keys == pytest.approx(1 - share if kind == "kv" or shape == "multi-head" else 1)
    save(made, tmp_path / "m")
    read = load(str(tmp_path / "m"))
    assert read.spec == made.spec
    assert np.allclose(read.logits(IDS), found, atol=1e-5)
    assert np.sqrt(np.mean((read.logits(IDS, "cpu") - found) ** 2)) < 0.03 * found.std()  # it plays natively, in bf16


def test_where_no_share_is_even_blocks_lose_what_costs_least(tmp_path):
    model = model_of("biases", blocks=4)  # groups of two: one of each is half of a block's heads
    gone, left = of_groups(model, "query", 0.5, seed=2)
    del gone[1], gone[3]
    model = idle(model, gone)
    assert to_go(heads_of(model.spec, CutHeads()), CutHeads()) is None
    made = cut(model, {"cut_heads": {"damp": 1e-6}}, tmp_path, windows_for(model, lengths=(48,) * 12))
    assert [block.mixer.heads for block in made.spec.blocks] == [4, 8, 4, 8]
    assert made.provenance[-1].evidence["left"] == {f"blocks.{index}.mixer": left[index] for index in (0, 2)}
    assert made.provenance[-1].evidence["expected_kl"] == pytest.approx(0, abs=1e-5)
    assert made.provenance[-1].evidence["heads"] == [32, 24]
    expected, found = model.logits(IDS), made.logits(IDS)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    save(made, tmp_path / "m")
    read = load(str(tmp_path / "m"))
    assert read.spec == made.spec
    assert np.allclose(read.logits(IDS), found, atol=1e-5)


def test_what_is_lost_is_less_where_the_others_make_it_good(tmp_path):
    model = model_of("grouped")
    expected, away = model.logits(IDS), []
    for compensate in (True, False):
        settings = {"share": 1 / 3, "compensate": compensate}
        made = cut(model, {"cut_heads": settings}, tmp_path / str(compensate), windows_for(model, lengths=(48,) * 24))
        away.append(np.sqrt(np.mean((made.logits(IDS) - expected) ** 2)))
        assert 0 < made.provenance[-1].evidence["mean_error"] < 1
    assert away[0] < away[1]


def test_bytes_fall_by_the_share(tmp_path):
    model = model_of("biases")
    made = cut(model, {"cut_heads": {"share": 0.25, "kind": "kv"}}, tmp_path)
    before, after = (
        sum(weight.nbytes for name, weight in each.weights.items() if ".mixer." in name and name.endswith("weight"))
        for each in (model, made)
    )
    assert after == 0.75 * before


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_kills_change_nothing(threads, tmp_path):
    model = model_of("biases")
    text, settings = windows_for(model), CutHeads()
    whole = cut_heads(model, settings, text, Run(tmp_path / "a", 1))

    def stop(doing, done, of):
        if doing == "block 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_heads(model, settings, text, Run(tmp_path / "b", threads, stop))
    assert (tmp_path / "b" / "cut" / "block-0000.safetensors").is_file()
    again = cut_heads(model, settings, text, Run(tmp_path / "b", threads))
    assert whole.spec == again.spec
    for name in whole.weights:
        assert np.array_equal(whole.weights.array(name), again.weights.array(name))


@pytest.mark.parametrize(("family", "index"), FAMILIES, ids=lambda value: getattr(value, "name", value))
def test_every_familys_model_is_cut_or_refused_by_name(family, index, tmp_path):
    model = random_weights(family.spec(family.examples[index]))
    settings, mixers = CutHeads(share=0.5), {type(block.mixer).__name__: block.mixer for block in model.spec.blocks}
    if refused := [mixer for mixer in mixers.values() if not isinstance(mixer, Attention | LatentAttention)]:
        with pytest.raises(UnsupportedError, match=f"is {type(refused[0]).__name__}, which has no query heads to cut"):
            check_cut_heads(model, settings)
        return
    if all(mixer.heads == 1 for mixer in mixers.values()):
        with pytest.raises(ConfigError, match="heads, and 1 to 0 of these can go"):
            check_cut_heads(model, settings)
        return
    made = cut(model, {"cut_heads": {"share": 0.5}}, tmp_path / "work")
    heads = [sum(block.mixer.heads for block in each.spec.blocks) for each in (model, made)]
    assert heads[1] < heads[0]
    assert made.weights.parameters < model.weights.parameters
    assert np.isfinite(made.logits(IDS[:8])).all()


@pytest.mark.parametrize(
    ("name", "index", "kind"),
    [("llama", 0, "query"), ("llama", 0, "kv"), ("llama", 1, "query"), ("qwen2", 0, "kv"), ("qwen3", 0, "query"),
     ("mixtral", 0, "query"), ("deepseek_v3", 0, "query")],
)  # fmt: skip
def test_transformers_loads_it_with_the_same_logits(name, index, kind, tmp_path):
    config = next(family for family in all_families() if family.name == name).examples[index]
    make_checkpoint(config, tmp_path / "plain")
    model = load(str(tmp_path / "plain"))
    made = cut(model, {"cut_heads": {"share": 0.5, "kind": kind}}, tmp_path / "work")
    assert not unread_elsewhere(made)
    save(made, tmp_path / "m")
    expected, found = read_checkpoint(tmp_path / "m")(IDS), made.logits(IDS)
    assert np.abs(expected - found).max() < 1e-4 * np.abs(expected).max()
    assert np.allclose(load(str(tmp_path / "m")).logits(IDS), found, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"share": 0.0}, "share is 0.0; accepted"),
        ({"share": 0.01}, "is 0 of 12 heads, and 1 to 8 of these can go"),
        ({"share": 0.9}, "is 11 of 12 heads, and 1 to 8"),
        ({"share": 0.9, "kind": "kv"}, "is 4 of 4 heads, and 1 to 2"),
        ({"damp": 1.0}, "damp is 1.0"),
        ({"measure": 0}, "measure is 0"),
        ({"skip": ["*"]}, "no mixer that is not skipped"),
    ],
)
def test_what_cannot_work_is_refused_first(settings, reason):
    (step,) = recipe_of([{"cut_heads": settings}])
    with pytest.raises(ConfigError, match=reason):
        step.transform.check(small(), step.settings)


def test_norms_over_all_heads_are_refused():
    spec = small().spec
    mixer = msgspec.structs.replace(spec.blocks[0].mixer, q_norm=RMSNorm(eps=1e-6), norm_span="row")
    model = random_weights(msgspec.structs.replace(spec, blocks=(spec.blocks[0], msgspec.structs.replace(spec.blocks[1], mixer=mixer))))
    with pytest.raises(UnsupportedError, match="blocks.1.mixer normalizes all heads together"):
        check_cut_heads(model, CutHeads(share=0.5))
    check_cut_heads(model, CutHeads(share=0.5, kind="kv", skip=("blocks.1.*",)))


def test_scales_of_the_cache_are_not_outlived():
    model = small()
    scales = {"blocks.0.mixer.k_scale": model.weights["norm.weight"]}
    with pytest.raises(ConfigError, match="scales for its cached keys and values"):
        check_cut_heads(dataclasses.replace(model, cache=MeantCache("fp8", scales)), CutHeads(share=0.5))
