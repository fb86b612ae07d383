"""Linear attention made of softmax attention: what it computes, that features learn and where they need not, that the cache stops growing
in the chosen layers, and that the result is played, saved, healed and refused like any other conversion's."""

import dataclasses

import msgspec
import numpy as np
import pytest
import torch

from hasten.backends.reference import ReferenceBackend, play
from hasten.backends.reference.play import weights_of
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load, load_directory, save
from hasten.checkpoint.save import unread_elsewhere
from hasten.cli.convert import short_form
from hasten.cli.inspect import describe
from hasten.compress.convert.features import START, Seen, divergence
from hasten.compress.data import text_of
from hasten.compress.gates import require_smaller
from hasten.compress.recipe import carry_out, recipe_of
from hasten.compress.walk import Run
from hasten.engine import LLM, SamplingParams
from hasten.engine.stepper import Stepper
from hasten.families import all_families
from hasten.measure.cost import operations
from hasten.model import Source
from hasten.program import Batch, RecurrentGroup, lower
from hasten.spec import Alibi, Attention, LayerNorm, LinearAttention, RelativeSinusoid, RMSNorm, SlidingWindow
from tests.cli import assert_refused, main
from tests.compress.models import changed, random_weights, small, windows_for

FAMILIES = {family.name: family for family in all_families()}
RMS = RMSNorm(eps=1e-6)
QUICK = {"steps": 8}


def convert(model, tmp_path, threads=2, **settings):
    (step,) = recipe_of([{"linear_attention": {**QUICK, **settings}}])
    assert step.needs_text
    step.transform.check(model, step.settings)
    return step.transform.apply(model, step.settings, windows_for(model), Run(tmp_path / "work", threads))


def with_mixers(model, count=2, **changes):
    """``model`` with so many blocks, and other fields in its mixers."""
    block = model.spec.blocks[0]
    block = msgspec.structs.replace(block, mixer=msgspec.structs.replace(block.mixer, **changes))
    return random_weights(msgspec.structs.replace(model.spec, blocks=(block,) * count).checked(), seed=4)


def of_family(name, **more):
    config = {**FAMILIES[name].examples[0], **more}
    return dataclasses.replace(random_weights(FAMILIES[name].spec(config)), source=Source(name, config))


def ids_of(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.spec.vocab, count).tolist()


def away(model, other):
    ids = ids_of(model, 30, 1)
    a, b = model.logits(ids), other.logits(ids)
    assert np.isfinite(b).all()
    return np.abs(a - b).max() / np.abs(a).max()


def evidence_of(model):
    return model.provenance[-1].evidence


def features(rows):
    """[softmax(x), softmax(−x)] of float64 rows."""
    rises, falls = (np.exp(x - x.max(-1, keepdims=True)) for x in (rows, -rows))
    return np.concatenate([rises / rises.sum(-1, keepdims=True), falls / falls.sum(-1, keepdims=True)], -1)


def test_a_layer_computes_every_query_with_every_key(tmp_path):
    """From the rotated queries and keys on, in quadratic float64, over more tokens than are scanned as one block."""
    made = convert(with_mixers(small(), q_norm=RMS, k_norm=RMS, bias=True, out_bias=True), tmp_path, layers=[1])
    path, ids = "blocks.1.mixer", ids_of(made, 150)
    program = lower(made.spec)
    names = [f"{path}.{name}" for name in ("q_rotated", "k_rotated", "v", "scanned")]
    taps = program.with_outputs(names)
    found, _ = play(taps, weights_of(taps, made.weights), Batch.of([ids]))
    q, k, v, scanned = (found[name].double().numpy() for name in names)
    by_query, by_key = (made.weights.array(f"{path}.{name}_feature.weight").astype(np.float64) for name in "qk")
    assert (by_query.shape, by_key.shape) == ((6, 20, 20), (2, 20, 20))
    for head in range(6):
        own = slice(head * 20, head * 20 + 20)
        theirs = slice(head // 3 * 20, head // 3 * 20 + 20)
        weight = np.tril(features(q[:, own] @ by_query[head].T) @ features(k[:, theirs] @ by_key[head // 3].T).T)
        expected = weight / weight.sum(1, keepdims=True) @ v[:, theirs]
        assert np.abs(scanned[:, own] - expected).max() < 1e-5 * np.abs(expected).max()


def test_attention_that_looks_everywhere_alike_stays_the_same_function(tmp_path):
    """Where queries are zero, softmax's weights are equal, and so are those of any features: a key's sum to 2."""
    model = small()
    zeros = {f"blocks.{n}.mixer.q.weight": np.zeros_like(model.weights.array(f"blocks.{n}.mixer.q.weight")) for n in (0, 1)}
    flat = changed(model, zeros)
    made = convert(flat, tmp_path, layers=[0, 1], fit=False)
    assert [type(block.mixer) for block in made.spec.blocks] == [LinearAttention, LinearAttention]
    assert away(flat, made) < 1e-5
    assert evidence_of(made)["weights_divergence"]["layer 0"][1] < 1e-5
    assert away(model, convert(model, tmp_path, layers=[0, 1], fit=False)) > 1e-3


def test_the_divergence_is_that_of_the_weights_by_hand():
    random, mixer = np.random.default_rng(0), Attention(heads=4, kv_heads=2, head_dim=3, value_dim=3, scale=0.8, position=None)
    shapes = ((4, 7, 3), (2, 7, 3), (4, 7, 3), (2, 7, 3), (4, 3, 3), (2, 3, 3))
    q, k, softmax_q, softmax_k, by_query, by_key = (random.normal(size=shape) for shape in shapes)
    total = 0.0
    for head in range(4):
        scores = softmax_q[head] @ softmax_k[head // 2].T * 0.8
        weights = features(q[head] @ by_query[head].T) @ features(k[head // 2] @ by_key[head // 2].T).T
        for row in range(7):
            p, w = np.exp(scores[row, : row + 1]), weights[row, : row + 1]
            p, w = p / p.sum(), w / w.sum()
            total += (p * np.log(p / w)).sum() / 4
    seen = Seen(*map(torch.from_numpy, (q, k, softmax_q, softmax_k)))
    assert float(divergence(seen, mixer, torch.from_numpy(by_query), torch.from_numpy(by_key))) == pytest.approx(total)


def test_features_learn_to_look_where_softmax_did_and_the_projection_is_fitted(tmp_path):
    model = small()
    begun, some, more = (convert(model, tmp_path, layers=[1], steps=steps, rate=0.05) for steps in (0, 10, 60))
    apart = [evidence_of(made)["weights_divergence"]["layer 1"] for made in (begun, some, more)]
    assert apart[0][0] == apart[0][1] == apart[1][0] == apart[2][0]
    assert apart[2][1] < apart[1][1] < 0.98 * apart[0][1]
    assert all(after < before for before, after in evidence_of(more)["output_error"].values())
    assert evidence_of(convert(model, tmp_path, layers=[1], fit=False))["output_error"] == {}
    for head in begun.weights.array("blocks.1.mixer.k_feature.weight"):
        assert np.array_equal(head, np.eye(20, dtype=np.float32) * head[0, 0])
        assert head[0, 0] > 0
    assert not np.array_equal(more.weights.array("blocks.1.mixer.k_feature.weight")[0], np.eye(20) * head[0, 0])


@pytest.mark.parametrize("louder", [1e-3, 30.0])
def test_features_begin_at_a_size_of_their_own_whatever_queries_and_keys_are(louder, tmp_path):
    model = small()
    louder = {f"blocks.0.mixer.{n}.weight": model.weights.array(f"blocks.0.mixer.{n}.weight") * np.float32(louder) for n in "qk"}
    made = convert(changed(model, louder), tmp_path, layers=[0], steps=0)
    program = lower(made.spec).with_outputs(["blocks.0.mixer.q_feature", "blocks.0.mixer.k_feature"])
    found, _ = play(program, weights_of(program, made.weights), Batch.of([ids_of(made, 100)]))
    for rows in found.values():
        assert float(rows.square().mean().sqrt()) == pytest.approx(START, rel=0.2)


def test_only_chosen_layers_change_the_later_half_unless_named(tmp_path):
    model = with_mixers(small(), count=5)
    made = convert(model, tmp_path)
    assert [type(block.mixer) for block in made.spec.blocks] == [*[Attention] * 3, *[LinearAttention] * 2]
    assert evidence_of(made)["layers"] == [3, 4]
    own = ("o.weight", "q_feature.weight", "k_feature.weight")
    learned = {f"blocks.{n}.mixer.{name}" for n in (3, 4) for name in own}
    assert {name for name in made.weights if made.weights[name] is not model.weights.get(name)} == learned
    named = convert(model, tmp_path, layers=[2, 0])
    assert [type(block.mixer) for block in named.spec.blocks] == [LinearAttention, Attention, LinearAttention, Attention, Attention]
    assert named.provenance[-1].settings == {"layers": [2, 0], "steps": 8, "rate": 0.02, "fit": True}


def test_threads_change_no_bit(tmp_path):
    one, two = (convert(small(), tmp_path, threads=threads, layers=[0, 1]) for threads in (1, 2))
    assert all(np.array_equal(one.weights.array(name), two.weights.array(name)) for name in one.weights)


def test_the_cache_stops_growing(tmp_path):
    model = small()
    made = convert(model, tmp_path)
    found, state = evidence_of(made), 2 * 40 * 21 * 4  # heads × features × (values and 1) × float32
    assert found["cache_bytes_per_token"] == [2 * 80 * 2, 80 * 2]
    groups = lower(made.spec).states
    assert [group.shape for group in groups if isinstance(group, RecurrentGroup)] == [(2, 40, 21)]
    assert sum(group.bytes_per_sequence() for group in groups) == state
    facts = describe(made, lower(made.spec, cache="bfloat16"))
    assert (facts["cache_bytes_per_token"], facts["state_bytes_per_sequence"]) == (160, state)
    assert "LinearAttention(heads 6, kv_heads 2, head_dim 20, value_dim 20, Rotary)" in [block["mixer"] for block in facts["blocks"]]
    before, after = found["cache_bytes_per_sequence"]
    shrunk = require_smaller(model, made)
    assert (shrunk.what, shrunk.before, shrunk.after) == ("the cache of a whole sequence", before, after)
    assert before == 192 * 320
    assert after < before


def test_a_token_costs_the_same_however_many_came_before(tmp_path):
    made = convert(small(), tmp_path, layers=[0, 1])
    program = lower(made.spec)
    assert operations(program, [0], 1, 1) == operations(program, [150], 1, 1)
    scan, features_ = 2 * 2 * (6 + 2) * 40 * 21, 2 * 2 * (6 + 2) * 20 * 20  # two layers, multiplications and additions
    linear = sum(2 * np.prod(shape) for name, shape in program.params.items() if len(shape) == 2 and "embedding" not in name)
    assert operations(program, [0], 1, 1) == linear + scan + features_


def test_in_pieces_and_beside_others_it_is_the_same(tmp_path):
    made = convert(small(), tmp_path)
    ids, other = ids_of(made, 100), ids_of(made, 100, 3)
    expected = [made.logits(each) for each in (ids, other)]
    stepper = Stepper(ReferenceBackend().session(made))
    state, rows = stepper.start(2), ([], [])
    for begin in range(0, 100, 9):
        parts = [each[begin : begin + 9] for each in (ids, other)]
        logits, state = stepper.step(Batch.of(parts, [begin, begin]), state)
        for kept, part in zip(rows, np.split(logits, 2)):
            kept.append(part)
    for kept, whole in zip(rows, expected):
        assert np.abs(np.concatenate(kept) - whole).max() < 1e-4 * np.abs(whole).max()


def test_the_engine_generates_what_it_scores(tmp_path):
    made = convert(small(), tmp_path)
    prompts = [ids_of(made, 21), ids_of(made, 5, 7)]
    outputs = LLM(made, backend="reference").generate(prompts, SamplingParams(max_tokens=9, ignore_eos=True))
    for prompt, output in zip(prompts, outputs):
        tokens = list(output.token_ids)
        assert made.logits([*prompt, *tokens])[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_saved_and_loaded_it_is_the_same(tmp_path):
    made = convert(of_family("llama"), tmp_path, layers=[1])
    assert "llama does not describe" in unread_elsewhere(made)
    save(made, tmp_path / "out")
    again = load_directory(tmp_path / "out", "again")
    assert again.spec == made.spec
    assert again.provenance == made.provenance
    ids = ids_of(made, 17)
    assert np.array_equal(again.logits(ids), made.logits(ids))


def test_gradients_reach_every_weight(tmp_path):
    made = convert(small(), tmp_path)
    program = lower(made.spec, context=32)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights_of(program, made.weights).items()}
    (logits,) = play(program, weights, Batch.of([list(range(20))]))[0].values()
    logits.square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.any() and torch.isfinite(tensor.grad).all() for tensor in weights.values())


def test_what_heals_and_rounds_comes_after(tmp_path):
    file = tmp_path / "text.py"
    file.write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n\n" for n in range(1000, 1200)))
    model = load("code-8m")
    text = text_of("random ids", [ids_of(model, 40, seed) for seed in range(4)])
    heal = {"steps": 3, "tokens": 96, "sequence": 48, "precision": "float32", "text": str(file)}
    recipe = recipe_of([{"linear_attention": {"layers": [7], "steps": 2}}, {"heal": heal}, {"rtn": {"weights": "int8"}}])
    made = carry_out(model, recipe, text, Run(tmp_path / "work", 1))
    assert [step.transform for step in made.provenance[-3:]] == ["linear_attention", "heal", "rtn"]
    assert np.isfinite(made.logits(ids_of(made, 9))).all()
    feature, before = (made.weights.array(f"blocks.7.mixer.{name}_feature.weight") for name in "qk")
    assert feature.dtype == before.dtype == model.weights["embedding.weight"].dtype
    assert feature.astype(np.float32)[0, 0, 1:].any()  # learned off the diagonal


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": [7]}, "layers: 7 is none of"),
        ({"layers": []}, "none is named"),
        ({"steps": -1}, "steps is -1 .* accepted are 0 to 100,000"),
        ({"rate": 0.0}, "rate 0.0; accepted are .* more than 0"),
        ({"size": 8}, "settings are layers, steps, rate, fit"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(settings, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        convert(small(), tmp_path, **settings)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"position": Alibi(slopes=(0.5,) * 6)}, "ALiBi, a bias by distance"),
        ({"position": RelativeSinusoid(), "kv_heads": 6}, "relative sinusoids"),
        ({"visible": SlidingWindow(size=9)}, "a window, whose cache is bounded already"),
        ({"q_norm": LayerNorm(eps=1e-5), "norm_span": "row"}, "norms over all heads' queries or keys together"),
        ({"softcap": 3.0}, "capped scores"),
        ({"sinks": True}, "sinks, which take weight"),
        ({"gate": True}, "a gate"),
        ({"clip": 1.0}, "projections that are clipped"),
    ],
)
def test_kinds_that_cannot_are_refused_by_layer(fields, reason, tmp_path):
    with pytest.raises(UnsupportedError, match=f"layer 1 cannot become linear attention: it has {reason}.*leave it out"):
        convert(with_mixers(small(), **fields), tmp_path)


def test_other_layers_and_shared_weights_are_refused(tmp_path):
    made = convert(small(), tmp_path)
    with pytest.raises(ConfigError, match="layers: 1 is a LinearAttention, which has no keys and values"):
        convert(made, tmp_path, layers=[1])
    with pytest.raises(ConfigError, match="one layer with keys and values, which keeps them unless"):
        convert(made, tmp_path)
    assert {type(block.mixer) for block in convert(made, tmp_path, layers=[0]).spec.blocks} == {LinearAttention}
    read = carry_out(with_mixers(small()), recipe_of(["share_kv"]), windows_for(small()), Run(tmp_path / "read", 1))
    with pytest.raises(ConfigError, match="put share_kv after other conversions"):
        convert(read, tmp_path, layers=[0])
    one = carry_out(with_mixers(small()), recipe_of(["share"]), None, Run(tmp_path / "one", 1))
    with pytest.raises(ConfigError, match="put share after what converts attention"):
        convert(one, tmp_path)


def test_the_command_is_short_for_a_recipe():
    nothing = (None, None, None, None)
    assert short_form(*nothing, True, False, None) == [{"linear_attention": {}}]
    assert short_form(*nothing, True, False, "1,3") == [{"linear_attention": {"layers": [1, 3]}}]
    for wrong, reason in (
        ((*nothing, True, True, None), "2 conversions are asked for; give one of .*--linear"),
        ((None, None, None, 64, True, False, None), "2 conversions"),
        ((None, None, 8, None, True, False, None), "goes with --latent only"),
        ((*nothing, True, False, "1,x"), "--layers is"),
    ):
        with pytest.raises(ConfigError, match=reason):
            short_form(*wrong)


def test_the_command_writes_what_loads_and_refuses_what_it_cannot(tmp_path, monkeypatch, capsys):
    save(of_family("llama"), tmp_path / "in")

    def run(*words):
        return main(monkeypatch, capsys, "convert", tmp_path / "in", *words, "--samples", 8, "--no-speed")

    result = run(tmp_path / "out", "--linear")
    assert result.code == 0, result.err
    assert "the cache of a whole sequence" in result.out
    assert "transformers does not load what was written" in result.out
    assert [type(block.mixer) for block in load_directory(tmp_path / "out", "out").spec.blocks] == [Attention, LinearAttention]
    for words, reason in (
        (("--linear", "--layers", "5"), "layers: 5 is none of"),
        (("--linear", "--share-kv"), "2 conversions are asked for"),
        (("--linear", "--layers", "all"), "--layers is"),
    ):
        refused = run(tmp_path / "no", *words)
        assert_refused(refused, reason)
        assert not (tmp_path / "no").exists()
