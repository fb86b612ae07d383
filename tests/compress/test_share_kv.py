"""Layers that read another's keys and values: what they compute, that the cache holds one of them, and how a model becomes one of such."""

import dataclasses

import msgspec
import numpy as np
import pytest

from hasten.backends.cpu import CpuBackend
from hasten.backends.reference import ReferenceBackend
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load_directory, save
from hasten.checkpoint.save import unread_elsewhere
from hasten.compress.blocks import pieces
from hasten.compress.recipe import carry_out, recipe_of
from hasten.compress.walk import Run
from hasten.engine import LLM, SamplingParams
from hasten.engine.stepper import Stepper
from hasten.families import all_families
from hasten.formats.weights import Weight, Weights
from hasten.program import Batch, lower
from hasten.spec import CrossLayerAttention, PreNorm, Rotary, SlidingWindow
from tests.compress.models import native_error, random_weights, small, windows_for
from tests.cuts import assert_the_same_bits_however_cut

FAMILIES = {family.name: family for family in all_families()}


def convert(model, tmp_path, **settings):
    (step,) = recipe_of([{"share_kv": settings}])
    step.transform.check(model, step.settings)
    return step.transform.apply(model, step.settings, windows_for(model), Run(tmp_path / "work", 2))


def deep(count=4, **changes):
    """``small`` with so many blocks, and other fields in its mixers."""
    spec = small().spec
    mixer = msgspec.structs.replace(spec.blocks[0].mixer, **changes)
    block = msgspec.structs.replace(spec.blocks[0], mixer=mixer)
    return random_weights(msgspec.structs.replace(spec, blocks=(block,) * count).checked(), seed=6)


def with_weights(model, changed):
    weights = {**model.weights, **{name: Weight(a.shape, a.dtype, lambda a=a: a) for name, a in changed.items()}}
    return dataclasses.replace(model, weights=Weights(weights))


def ids_of(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.spec.vocab, count).tolist()


def away(model, other):
    ids = ids_of(model, 30, 1)
    a, b = model.logits(ids), other.logits(ids)
    assert np.isfinite(b).all()
    return np.abs(a - b).max() / np.abs(a).max()


def by_hand(model, ids):
    """Logits of two blocks of grouped-query attention, the second over the first one's keys and values, in loops of NumPy."""
    spec, w = model.spec, {name: model.weights.array(name).astype(np.float64) for name in model.weights}
    x, kept = w["embedding.weight"][ids], {}

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight

    def turned(rows, rotary):
        rows, half = rows.copy(), rotary.dims // 2
        for position in range(len(rows)):
            for pair in range(half):
                angle = position * rotary.base ** (-2 * pair / rotary.dims)
                a, b = rows[position, :, pair].copy(), rows[position, :, pair + half].copy()
                rows[position, :, pair] = a * np.cos(angle) - b * np.sin(angle)
                rows[position, :, pair + half] = a * np.sin(angle) + b * np.cos(angle)
        return rows

    for index, block in enumerate(spec.blocks):
        path, crossed = f"blocks.{index}", isinstance(block.mixer, CrossLayerAttention)
        mixer = block.mixer.attention if crossed else block.mixer
        h = norm(x, w[f"{path}.mixer_norm.weight"])
        q = turned((h @ w[f"{path}.mixer.q.weight"].T).reshape(len(ids), mixer.heads, -1), mixer.position)
        if not crossed:
            k = turned((h @ w[f"{path}.mixer.k.weight"].T).reshape(len(ids), mixer.kv_heads, -1), mixer.position)
            kept[index] = k, (h @ w[f"{path}.mixer.v.weight"].T).reshape(len(ids), mixer.kv_heads, -1)
        k, v = kept[block.mixer.source if crossed else index]
        out = np.zeros((len(ids), mixer.heads, mixer.value_dim))
        for head in range(mixer.heads):
            own = head // (mixer.heads // mixer.kv_heads)
            for at in range(len(ids)):
                scores = k[: at + 1, own] @ q[at, head] * mixer.scale
                weights = np.exp(scores - scores.max())
                out[at, head] = weights @ v[: at + 1, own] / weights.sum()
        x = x + out.reshape(len(ids), -1) @ w[f"{path}.mixer.o.weight"].T
        h = norm(x, w[f"{path}.feed_forward_norm.weight"])
        gate, up = (h @ w[f"{path}.feed_forward.{name}.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{path}.feed_forward.down.weight"].T
    return norm(x, w["norm.weight"]) @ w["head.weight"].T


def test_it_computes_what_is_written_by_hand(tmp_path):
    made = convert(small(), tmp_path)
    assert made.spec.blocks[1].mixer.source == 0
    assert "blocks.1.mixer.k.weight" not in made.weights
    ids = ids_of(made, 12)
    expected = by_hand(made, ids)
    assert np.abs(made.logits(ids) - expected).max() < 1e-4 * np.abs(expected).max()
    assert native_error(made, ids_of(made, 50)) < 1.2


def test_natively_the_same_bits_however_the_batch_is_cut(tmp_path):
    made = convert(deep(), tmp_path)
    sessions = [CpuBackend(threads=threads).session(made, 192) for threads in (1, 2)]
    assert_the_same_bits_however_cut(sessions, ids_of(made, 120))
    reference = Stepper(ReferenceBackend().session(made))
    ids, state, rows = ids_of(made, 40), reference.start(1), []
    for begin in range(0, 40, 7):
        logits, state = reference.step(Batch.of([ids[begin : begin + 7]], [begin]), state)
        rows.append(logits)
    assert np.allclose(np.concatenate(rows), made.logits(ids), atol=1e-4 * np.abs(rows[0]).max())


def test_the_cache_holds_one_of_two(tmp_path):
    model = deep()
    made = convert(model, tmp_path)
    before, after = made.provenance[-1].evidence["cache_bytes_per_token"]
    assert (before, after) == (4 * 2 * 40 * 2, 2 * 2 * 40 * 2)
    session = CpuBackend().session(made, 192)
    assert sum(pool.page_bytes for pool in session.compiled.pools) == after * session.page
    three = convert(model, tmp_path, layers=[1, 2, 3])
    assert [block.mixer.source for block in three.spec.blocks[1:]] == [0, 0, 0]
    assert three.provenance[-1].evidence["cache_bytes_per_token"][1] == before // 4


def test_the_engine_generates_what_it_scores(tmp_path):
    made = convert(deep(), tmp_path)
    prompt = ids_of(made, 21)
    (output,) = LLM(made, backend="cpu").generate([prompt], SamplingParams(max_tokens=9, ignore_eos=True))
    tokens = list(output.token_ids)
    whole = made.logits([*prompt, *tokens], backend="cpu")
    assert whole[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


WORDS = {
    "partly rotated": {},
    "all rotated, biases": {"position": Rotary(base=50.0, dims=20), "bias": True},
    "no positions": {"position": None},
}


@pytest.mark.parametrize("kind", WORDS)
def test_a_layer_that_says_the_same_in_other_words_gives_the_same(kind, tmp_path):
    """The first block writes nothing, so that both attentions read one stream; the second one's heads are the first one's, in another
    order, each pair turned and scaled, what is not rotated and values through matrices."""
    model, random = deep(2, **WORDS[kind]), np.random.default_rng(4)
    mixer, changed = model.spec.blocks[0].mixer, {}
    assert isinstance(model.spec.blocks[0].wiring, PreNorm)
    for name in ("mixer.o.weight", "feed_forward.down.weight"):
        changed[f"blocks.0.{name}"] = np.zeros_like(model.weights.array(f"blocks.0.{name}"))
    changed["blocks.1.mixer_norm.weight"] = model.weights.array("blocks.0.mixer_norm.weight")
    half = mixer.position.dims // 2 if mixer.position else 0
    for name, size in (("k", mixer.head_dim), ("v", mixer.value_dim)):
        maps = random.normal(size=(2, size, size)) / size**0.5 + np.eye(size)
        if name == "k":
            maps[:, : 2 * half, :] = maps[:, :, : 2 * half] = 0
            for matrix in maps:
                for a, b in zip(range(half), range(half, 2 * half)):
                    c, s = random.normal(size=2)
                    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
        for part in ("weight", "bias") if mixer.bias else ("weight",):
            rows = model.weights.array(f"blocks.0.mixer.{name}.{part}").astype(np.float64)
            own = rows.reshape(2, size, *rows.shape[1:])[::-1]
            changed[f"blocks.1.mixer.{name}.{part}"] = np.concatenate([m @ r for m, r in zip(maps, own)]).astype(np.float32)
    model = with_weights(model, changed)
    made = convert(model, tmp_path)
    assert made.provenance[-1].evidence["output_error"]["layer 1"][0] < 1e-5  # before the projection was fitted
    assert away(model, made) < 1e-4


def test_a_fit_gains_and_the_layers_that_keep_theirs_are_as_they_were(tmp_path):
    model = deep()
    made = convert(model, tmp_path)
    errors = made.provenance[-1].evidence["output_error"]
    assert list(errors) == ["layer 1", "layer 3"]
    assert all(after < before for before, after in errors.values())
    for name in made.weights:
        if not name.startswith(("blocks.1.mixer.q", "blocks.1.mixer.o", "blocks.3.mixer.q", "blocks.3.mixer.o")):
            assert made.weights[name] is model.weights[name]


def test_what_rounds_and_heals_comes_after(tmp_path):
    model = deep()
    assert len(pieces(convert(model, tmp_path).spec, 32)) == 3  # the embedding, and two blocks each
    recipe = recipe_of([{"share_kv": {}}, {"gptq": {"weights": "int8"}}])
    made = carry_out(model, recipe, windows_for(model), Run(tmp_path / "recipe", 2))
    assert [step.transform for step in made.provenance] == ["share_kv", "gptq"]
    shared = convert(model, tmp_path)
    assert away(shared, made) < 0.1
    kept = carry_out(model, recipe_of([{"share_kv": {}}, {"cache": {"format": "int8"}}]), windows_for(model), Run(tmp_path / "kept", 2))
    assert {name.rsplit(".", 1)[0] for name in kept.cache.scales} == {"blocks.0.mixer", "blocks.2.mixer"}


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = {**FAMILIES["llama"].examples[0], "num_hidden_layers": 3}
    from hasten.model import Source

    model = dataclasses.replace(random_weights(FAMILIES["llama"].spec(config)), source=Source("llama", config))
    made = convert(model, tmp_path, layers=[2])
    assert "llama does not describe" in unread_elsewhere(made)
    save(made, tmp_path / "out")
    again = load_directory(tmp_path / "out", "again")
    assert again.spec == made.spec
    ids = ids_of(made, 17)
    assert np.array_equal(again.logits(ids), made.logits(ids))


def test_gradients_reach_keys_through_both_layers(tmp_path):
    from hasten.backends.reference import play
    from hasten.backends.reference.play import weights_of

    made = convert(small(), tmp_path)
    program = lower(made.spec, context=32)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights_of(program, made.weights).items()}
    (logits,) = play(program, weights, Batch.of([list(range(20))]))[0].values()
    logits.square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in weights.values())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": [0]}, "layer 0 has no layer before it"),
        ({"layers": [1, 9]}, "layers: 9 is none of"),
        ({"layers": []}, "none is named"),
        ({"size": 2}, "settings are layers"),
    ],
)
def test_what_cannot_work_is_refused_first(settings, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        convert(deep(), tmp_path, **settings)


def test_layers_of_other_shapes_are_no_source(tmp_path):
    spec = deep(2).spec
    other = msgspec.structs.replace(spec.blocks[1].mixer, visible=SlidingWindow(size=9))
    blocks = (spec.blocks[0], msgspec.structs.replace(spec.blocks[1], mixer=other))
    with pytest.raises(ConfigError, match="position and visibility"):
        convert(random_weights(msgspec.structs.replace(spec, blocks=blocks)), tmp_path)
    with pytest.raises(ConfigError, match="one layer with keys and values"):
        convert(deep(1), tmp_path)
    relative = FAMILIES["transformer_xl"]
    with pytest.raises(UnsupportedError, match="relative sinusoids"):
        convert(random_weights(relative.spec(relative.examples[0])), tmp_path)


def test_other_conversions_come_before(tmp_path):
    for later in ({"share_kv": {"layers": [2]}}, {"kv_heads": {"count": 1}}, {"latent": {"rank": 8}}, {"window": {"size": 8}}):
        with pytest.raises(ConfigError, match="put share_kv after other conversions"):
            carry_out(deep(), recipe_of([{"share_kv": {}}, later]), windows_for(deep()), Run(tmp_path / "work", 2))
    recipe = recipe_of([{"kv_heads": {"count": 1}}, {"window": {"size": 40}}, {"share_kv": {}}])
    made = carry_out(deep(), recipe, windows_for(deep()), Run(tmp_path / "all", 2))
    assert made.spec.blocks[3].mixer.attention.kv_heads == 1
    assert [step.transform for step in made.provenance] == ["kv_heads", "window", "share_kv"]
    assert np.isfinite(made.logits(ids_of(made, 50))).all()


def test_layers_whose_weights_are_not_their_own_are_refused(tmp_path):
    for first, reason in (({"share": {}}, "share has blocks be one; put it before"), ({"rank": {"share": 0.5}}, "put rank after")):
        for later in ({"kv_heads": {"count": 1}}, {"latent": {"rank": 8}}, {"share_kv": {}}):
            with pytest.raises(ConfigError, match=reason):
                carry_out(deep(), recipe_of([first, later]), windows_for(deep()), Run(tmp_path / "work", 2))
