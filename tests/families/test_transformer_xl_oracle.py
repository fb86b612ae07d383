"""The Transformer-XL oracle held to what must be true of it whatever the weights."""

import itertools

import numpy as np
import pytest

from tests.families.transformer_xl_oracle import TINY, attention_probabilities, embed, random_checkpoint, transformer_xl_logits

TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], 11).tolist()

VARIANTS = [
    dict(zip(("same_length", "clamp_len", "untie_r", "pre_lnorm", "tie_word_embeddings"), values, strict=True))
    for values in itertools.product((False, True), (-1, 3), (False, True), (False, True), (True,))
] + [{"tie_word_embeddings": False}]

variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: ",".join(f"{key}={value}" for key, value in variant.items()))
SPANS = [(4, 6), (5, 2), (3, 3), (1, 4), (16, 5), (4, 1)]


def logits_in_one_pass(weights, config, token_ids, segment, memory, zero_memory=False):
    """The same logits without segments: one pass over the whole text, the segments only in the mask, distances by the shift of the paper's
    appendix B. What a layer keeps of a token does not depend on who looks at it, so a mask over absolute positions says everything.
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    n_head, d_head, d_model = config["n_head"], config["d_head"], config["d_model"]
    before = memory if zero_memory else 0
    p = np.arange(len(token_ids))
    k = np.arange(-before, len(token_ids))
    seen = (k <= p[:, None]) & (k >= (p - p % segment - memory)[:, None])
    if config["same_length"]:
        seen &= k > p[:, None] - memory

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_epsilon"]) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(x):
        return x.reshape(len(x), n_head, d_head)

    # Column c of the scores by distance belongs to distance len(k) - 1 - c; the shift moves row i so that column j means key j.
    distance = np.arange(len(k) - 1, -1, -1)
    if config["clamp_len"] > 0:
        distance = distance.clip(max=config["clamp_len"])
    angle = distance[:, None] / 10000 ** (np.arange(0, d_model, 2) / d_model)
    r = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    h = w["transformer.word_emb.emb_layers.0.weight"][token_ids] * d_model**0.5
    for layer in range(config["n_layer"]):
        name = f"transformer.layers.{layer}"
        owner = f"{name}.dec_attn" if config["untie_r"] else "transformer"
        x = np.concatenate([np.zeros((before, d_model)), h])
        if config["pre_lnorm"]:
            x = norm(f"{name}.dec_attn.layer_norm", x)
        query, key, value = (heads(part) for part in np.split(x @ w[f"{name}.dec_attn.qkv_net.weight"].T, 3, axis=1))
        query = query[before:]
        content = np.einsum("inh,jnh->nij", query + w[f"{owner}.r_w_bias"], key)
        by_distance = np.einsum("inh,jnh->nij", query + w[f"{owner}.r_r_bias"], heads(r @ w[f"{name}.dec_attn.r_net.weight"].T))
        padded = np.concatenate([np.zeros((n_head, len(p), 1)), by_distance], axis=2)
        shifted = padded.reshape(n_head, len(k) + 1, len(p))[:, 1:].reshape(n_head, len(p), len(k))
        scores = np.where(seen, (content + shifted) / d_head**0.5, -np.inf)
        a = np.exp(scores - scores.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        mixed = np.einsum("nij,jnh->inh", a, value).reshape(len(p), -1) @ w[f"{name}.dec_attn.o_net.weight"].T
        o = h + mixed if config["pre_lnorm"] else norm(f"{name}.dec_attn.layer_norm", h + mixed)
        x = norm(f"{name}.pos_ff.layer_norm", o) if config["pre_lnorm"] else o
        inner = np.maximum(x @ w[f"{name}.pos_ff.CoreNet.0.weight"].T + w[f"{name}.pos_ff.CoreNet.0.bias"], 0)
        y = o + inner @ w[f"{name}.pos_ff.CoreNet.3.weight"].T + w[f"{name}.pos_ff.CoreNet.3.bias"]
        h = y if config["pre_lnorm"] else norm(f"{name}.pos_ff.layer_norm", y)
    out = "transformer.word_emb.emb_layers.0.weight" if config["tie_word_embeddings"] else "crit.out_layers.0.weight"
    return h @ w[out].T + w["crit.out_layers.0.bias"]


def close(a, b):
    return np.allclose(a, b, rtol=0, atol=1e-10)


@variants
@pytest.mark.parametrize("zero_memory", [False, True])
def test_segments_and_memory_are_one_mask_over_absolute_positions(variant, zero_memory):
    config, weights = random_checkpoint(variant, 1)
    for segment, memory in SPANS:
        recurrent = transformer_xl_logits(weights, config, TOKENS, segment, memory, zero_memory=zero_memory)
        assert recurrent.shape == (len(TOKENS), config["vocab_size"])
        assert close(recurrent, logits_in_one_pass(weights, config, TOKENS, segment, memory, zero_memory))


@variants
def test_segments_do_not_matter_when_memory_holds_the_whole_text(variant):
    config, weights = random_checkpoint(variant, 2)
    whole = transformer_xl_logits(weights, config, TOKENS, len(TOKENS), len(TOKENS))
    for segment in (1, 2, 3, 5, 40):
        assert close(transformer_xl_logits(weights, config, TOKENS, segment, len(TOKENS)), whole)


def test_without_memory_every_segment_is_a_text_of_its_own():
    config, weights = random_checkpoint({}, 3)
    apart = [transformer_xl_logits(weights, config, TOKENS[begin : begin + 4], 4, 0) for begin in (0, 4, 8)]
    assert close(transformer_xl_logits(weights, config, TOKENS, 4, 0), np.concatenate(apart))


@variants
def test_same_length_is_a_sliding_window_whatever_the_segments(variant):
    config, weights = random_checkpoint({**variant, "same_length": True}, 4)
    one_by_one = transformer_xl_logits(weights, config, TOKENS, 1, 4)
    for segment in (2, 3, 4, 7, 40):
        assert close(transformer_xl_logits(weights, config, TOKENS, segment, 4), one_by_one)


# Segments of 4 with a memory of 3: position 7 ends a segment whose memory is 1, 2, 3; position 8 begins one whose memory is 5, 6, 7.
@pytest.mark.parametrize(
    ("same_length", "sees"),
    [
        (False, {0: [0], 7: [1, 2, 3, 4, 5, 6, 7], 8: [5, 6, 7, 8], 10: [5, 6, 7, 8, 9, 10]}),
        (True, {0: [0], 7: [5, 6, 7], 8: [6, 7, 8], 10: [8, 9, 10]}),
    ],
)
def test_one_layer_sees_from_the_memory_to_itself_and_nothing_else(same_length, sees):
    config, weights = random_checkpoint({"same_length": same_length, "n_layer": 1}, 5)
    base = transformer_xl_logits(weights, config, TOKENS, 4, 3)
    found = {query: [] for query in sees}
    for position in range(len(TOKENS)):
        other = list(TOKENS)
        other[position] = (other[position] + 1) % config["vocab_size"]
        moved = transformer_xl_logits(weights, config, other, 4, 3)
        for query in sees:
            if not close(moved[query], base[query]):
                found[query].append(position)
    assert found == sees


def test_memory_reaches_one_segment_further_with_every_layer():
    for n_layer in (1, 2, 3):
        config, weights = random_checkpoint({"n_layer": n_layer}, 6)
        other = [(TOKENS[0] + 1) % config["vocab_size"], *TOKENS[1:]]
        base = transformer_xl_logits(weights, config, TOKENS, 2, 2)
        changed = ~np.isclose(transformer_xl_logits(weights, config, other, 2, 2), base, rtol=0, atol=1e-14).all(axis=1)
        assert np.flatnonzero(changed).max() == 2 * (n_layer + 1) - 1


@variants
def test_probabilities_of_a_query_sum_to_one_over_what_it_sees(variant):
    config, weights = random_checkpoint(variant, 7)
    context = embed(weights, config, TOKENS)
    a = attention_probabilities(weights, config, 0, context[5:], context, 4)
    assert a.shape == (config["n_head"], 6, 11)
    assert close(a.sum(axis=2), 1)
    for i in range(6):
        first = 5 + i - 4 + 1 if config["same_length"] else 0
        assert (a[:, i, first : 5 + i + 1] > 0).all()
        assert (a[:, i, :first] == 0).all()
        assert (a[:, i, 5 + i + 1 :] == 0).all()
    assert a.max() > 2 / 11


def test_a_clamp_beyond_the_longest_distance_changes_nothing_and_one_below_it_does():
    config, weights = random_checkpoint({}, 8)
    free = transformer_xl_logits(weights, config, TOKENS, 4, 6)
    assert close(transformer_xl_logits(weights, {**config, "clamp_len": 9}, TOKENS, 4, 6), free)
    assert close(transformer_xl_logits(weights, {**config, "clamp_len": 0}, TOKENS, 4, 6), free)
    clamped = transformer_xl_logits(weights, {**config, "clamp_len": 2}, TOKENS, 4, 6)
    assert close(clamped[:3], free[:3])
    assert not np.isclose(clamped[3:], free[3:]).all(axis=1).any()


def test_only_distances_matter_not_positions():
    config, weights = random_checkpoint({}, 9)
    text = TOKENS[:4]
    # Without memory the same segment gives the same logits wherever it stands.
    twice = transformer_xl_logits(weights, config, [*text, *text], 4, 0)
    assert close(twice[:4], twice[4:])


def test_every_weight_matters():
    config, weights = random_checkpoint({"tie_word_embeddings": False}, 10)
    base = transformer_xl_logits(weights, config, TOKENS[:6], 2, 2)
    for name, value in weights.items():
        other = {**weights, name: value * 1.5}
        same = close(transformer_xl_logits(other, config, TOKENS[:6], 2, 2), base)
        assert same == (name == "transformer.pos_emb.inv_freq"), name


def test_a_checkpoint_is_the_same_for_the_same_seed_and_names_what_its_config_says():
    config, weights = random_checkpoint({}, 11)
    again = random_checkpoint({}, 11)[1]
    assert weights.keys() == again.keys()
    assert all((weights[name] == again[name]).all() for name in weights)
    assert "transformer.layers.2.dec_attn.r_w_bias" in weights
    assert "transformer.r_w_bias" not in weights
    assert "crit.out_layers.0.weight" not in weights
    shared = random_checkpoint({"untie_r": False, "tie_word_embeddings": False}, 11)[1]
    assert "transformer.layers.2.dec_attn.r_w_bias" not in shared
    assert shared["transformer.r_r_bias"].shape == (config["n_head"], config["d_head"])
    assert shared["crit.out_layers.0.weight"].shape == (config["vocab_size"], config["d_model"])


@pytest.mark.parametrize("bad", [{"cutoffs": [4]}, {"div_val": 4}, {"d_embed": 8}, {"d_model": 11, "d_embed": 11}, {"attn_type": 1}])
def test_what_is_not_read_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        random_checkpoint(bad, 0)


def test_a_query_that_could_see_nothing_is_refused():
    config, weights = random_checkpoint({"same_length": True}, 12)
    with pytest.raises(ValueError, match="from 1 with same_length"):
        transformer_xl_logits(weights, config, TOKENS, 4, 0)
