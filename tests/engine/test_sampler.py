"""The native sampler against a plain NumPy reading, transformers' processors, and the distribution itself."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hasten import _native
from hasten.engine.request import Request
from hasten.engine.sampler import Sampler, native_row, token_masks
from hasten.engine.sampling import Purpose, SamplingParams
from tests.engine import sampling_oracle as oracle

ISAS = [isa for isa in _native.available_isas() if isa != "amx"]
VOCABS = [1, 2, 5, 63, 64, 65, 511, 512, 513, 4097, 32_001]
WARM = {"temperature": 1.0}
THREADS = min(2, len(os.sched_getaffinity(0)))


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def native(params, prompt=(), output=(), seed=7, choice=0, **more):
    """A native row of those settings; ``more`` are those that SamplingParams does not have."""
    if not more:
        row = native_row(params, prompt, seed, choice)
    else:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        row = _native.SamplingRow(
            **{name: getattr(params, name) for name in names}, seed=seed, choice=choice, prompt=np.array(prompt, np.int64), **more
        )
    for token in output:
        row.append(token)
    return row


def matrix(logits):
    return np.atleast_2d(np.asarray(logits, np.float32))


def draws(logits, rows, positions, *, isa="best", pool=None, **more):
    logits = matrix(logits)
    tokens = np.full(len(rows), -7, np.int32)
    _native.Sampler(pool, isa).sample(logits, rows, np.asarray(positions, np.int64), tokens, **more)
    return tokens.tolist()


def draw(logits, params, position=0, prompt=(), output=(), **keys):
    return draws(logits, [native(params, prompt, output, **keys)], [position])[0]


def candidates(logits, params, prompt=(), output=(), mask=None, isa="best", **more):
    ids, weights = _native.Sampler(None, isa).candidates(matrix(logits), native(params, prompt, output, **more), mask)
    return ids, weights


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_k": 10**6},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.3, "top_p": 0.9999999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.5},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_survivors_and_probabilities_are_those_of_transformers(setting):
    import torch
    from transformers.generation import logits_process as hf

    params = SamplingParams(**setting)
    chain = []
    if params.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(hf.MinPLogitsWarper(params.min_p))
    rng = np.random.default_rng(0)
    for vocab, spread in [(5, 1.0), (300, 3.0), (5000, 2.0), (5000, 0.1)]:
        logits = (rng.standard_normal(vocab) * spread).astype(np.float32)
        prompt, output = rng.integers(vocab, size=40).tolist(), rng.integers(vocab, size=20).tolist()
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        for step in chain:
            scores = step(torch.tensor([prompt + output]), scores)
        expected = torch.softmax(scores[0], -1).numpy()
        ids, weights = candidates(logits, params, prompt, output)
        assert ids.tolist() == np.flatnonzero(expected > 0).tolist()
        # a penalised logit is rounded to float32
        np.testing.assert_allclose(softmax(weights), expected[ids], rtol=1e-6 if params.repetition_penalty != 1 else 1e-9)


def some_logits(rng, vocab, kind):
    x = rng.standard_normal(vocab) * rng.choice([0.05, 1.0, 4.0, 12.0])
    if kind == "ties":
        x = np.round(x)
    if kind == "masked":
        x[rng.random(vocab) < 0.5] = -np.inf
        x[rng.integers(vocab)] = 1.0
    if kind == "zeros":
        x = rng.choice([0.0, -0.0], size=vocab)
    return x.astype(np.float32)


def some_params(rng):
    pick = rng.choice
    return SamplingParams(
        temperature=float(pick([0.0, 1e-300, 0.2, 0.7, 1.0, 1.6, 100.0])), top_k=int(pick([0, 0, 1, 3, 40, 3000])),
        top_p=float(pick([1.0, 1.0, 0.0, 0.3, 0.9, 0.999])), min_p=float(pick([0.0, 0.0, 0.01, 0.2, 1.0])),
        repetition_penalty=float(pick([1.0, 1.0, 1.3, 0.7])), presence_penalty=float(pick([0.0, 0.0, 0.5, -0.4])),
        frequency_penalty=float(pick([0.0, 0.0, 0.2, -0.3])),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["plain", "ties", "masked", "zeros"])
def test_candidates_and_draws_are_the_oracles(isa, kind):
    rng = np.random.default_rng(ISAS.index(isa) * 100 + len(kind))
    drawn = truncated = close = 0
    for vocab in VOCABS:
        for _ in range(12 if vocab < 1000 else 5):
            logits, params = some_logits(rng, vocab, kind), some_params(rng)
            prompt, output = rng.integers(vocab, size=9).tolist(), rng.integers(vocab, size=6).tolist()
            bias = [(int(token), float(rng.normal() * 3)) for token in rng.choice(vocab + 3, size=2, replace=False)]
            allowed = rng.random(vocab) < 0.8
            allowed[rng.choice(np.flatnonzero(logits > -np.inf))] = True
            mask = token_masks([np.flatnonzero(~allowed).tolist()], vocab)
            row = oracle.changed(logits, params, prompt, output, bias=bias, allowed=allowed)
            expected, expected_weights = oracle.survivors(row, params)
            ids, weights = candidates(logits, params, prompt, output, mask, isa, logit_bias=bias)
            seed, position = int(rng.integers(2**63)), int(rng.integers(2**32))
            sampling = native(params, prompt, output, seed, 3, logit_bias=bias)
            (token,) = draws(logits, [sampling], [position], isa=isa, masks=mask)
            if not np.array_equal(ids, expected):  # a mass on the very edge of top-p; rounding may see it on either side
                edge = set(ids.tolist()) ^ set(expected.tolist())
                assert len(edge) == 1, (vocab, params)
                assert 0 < params.top_p < 1
                close += 1
                continue
            np.testing.assert_allclose(weights, expected_weights, rtol=1e-14, atol=0)
            best, lead = oracle.sample(row, params, seed, 3, position)
            assert token == best or lead < 1e-9, (vocab, params)
            drawn += len(ids) > 1
            truncated += 1 < len(ids) < (row > -np.inf).sum()
    assert drawn > 15
    assert truncated > 3
    assert close <= 4


def test_additive_penalties_are_their_plain_reading():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(30).astype(np.float32)
    output = rng.integers(30, size=50).tolist()
    params = SamplingParams(**WARM, frequency_penalty=0.4, presence_penalty=-0.7)
    plain = logits.astype(np.float64)
    for token in set(output):
        plain[token] -= 0.4 * output.count(token) - 0.7
    ids, weights = candidates(logits, params, [0, 1, 2] * 9, output)
    np.testing.assert_allclose(softmax(weights), softmax(plain)[ids], rtol=1e-5)


def test_the_penalties_apply_in_order_and_greedy_honours_them():
    logits = [2.0, 1.5, -1.0]
    assert draw(logits, SamplingParams()) == 0
    assert draw(logits, SamplingParams(repetition_penalty=2.0), prompt=[0]) == 1
    assert draw(logits, SamplingParams(presence_penalty=1.0), prompt=[0]) == 0
    assert draw(logits, SamplingParams(presence_penalty=1.0), output=[0]) == 1
    assert draw(logits, SamplingParams(frequency_penalty=0.2), output=[0, 0, 0]) == 1
    assert draw(logits, SamplingParams(), logit_bias=[(1, 0.6)]) == 1
    # Repetition first: 2 / 2 - 0.4 = 0.6 stays below 0.7; additive first would give (2 - 0.4) / 2 = 0.8. Bias before both.
    params = SamplingParams(temperature=1.0, repetition_penalty=2.0, presence_penalty=0.4)
    _, weights = candidates([2.0, 0.7], params, output=[0])
    np.testing.assert_allclose(weights[1] - weights[0], np.float32(0.7) - 0.6, rtol=1e-6)
    _, weights = candidates([1.0, 0.7], params, output=[0], logit_bias=[(0, 1.0)])
    np.testing.assert_allclose(weights[1] - weights[0], np.float32(0.7) - 0.6, rtol=1e-6)


def test_penalties_do_not_overflow():
    high = np.finfo(np.float32).max
    ids, weights = candidates([high, -high, 0], SamplingParams(**WARM, repetition_penalty=0.01), prompt=[0])
    assert (ids.tolist(), weights[0]) == ([0, 1, 2], 0.0)
    assert draw([-high, -np.inf], SamplingParams(repetition_penalty=100), prompt=[0, 1]) == 0


@pytest.mark.row("foreign token ids", "at the tokenizer's length and the logits' width")
def test_ids_outside_the_vocabulary_touch_nobody():
    params = SamplingParams(**WARM, repetition_penalty=1.5, frequency_penalty=1.0)
    logits = [1.0, 2.0, 3.0]
    clean = candidates(logits, params)
    dirty = candidates(logits, params, [3, 4, -1], [2**31, -3], token_masks([[3, -1]], 3), logit_bias=[(3, 5.0), (-1, 5.0), (2**40, 1.0)])
    assert all(np.array_equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize(
    "setting",
    [{}, {"temperature": 1.6, "top_k": 9, "top_p": 0.9}, {"temperature": 0.6, "min_p": 0.05}, {"top_p": 0.7}, {"top_k": 3}],
    ids=str,
)
def test_draws_follow_the_distribution(setting):
    params = SamplingParams(**{**WARM, **setting})
    logits = (np.random.default_rng(2).standard_normal(12) * 1.5).astype(np.float32)
    kept, weights = oracle.survivors(logits, params)
    expected = np.zeros(12)
    expected[kept] = softmax(weights)
    n = 100_000
    seen = np.bincount(draws(np.tile(logits, (n, 1)), [native(params)] * n, np.arange(n)), minlength=12)
    assert seen[expected == 0].sum() == 0
    live = expected > 0
    chi_square = (((seen - n * expected)[live]) ** 2 / (n * expected[live])).sum()
    freedom = live.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4  # beyond four deviations
    assert 0.5 * np.abs(seen / n - expected).sum() < 0.01


def test_draws_from_a_wide_vocabulary_follow_the_distribution():
    vocab, n = 5000, 4000
    logits = (np.random.default_rng(3).standard_normal(vocab) * 2).astype(np.float32)
    order = np.argsort(softmax(logits.astype(np.float64)))
    parts = np.empty(vocab, np.int64)  # ten parts of about equal probability, likely and unlikely ids apart
    parts[order] = np.minimum(np.cumsum(softmax(logits.astype(np.float64))[order]) * 10, 9.999).astype(np.int64)
    expected = n * np.bincount(parts, softmax(logits.astype(np.float64)))
    seen = np.bincount(parts[draws(np.tile(logits, (n, 1)), [native(SamplingParams(**WARM))] * n, np.arange(n))], minlength=10)
    assert ((seen - expected) ** 2 / expected).sum() < 9 + 4 * math.sqrt(18) + 4


def test_the_batch_the_threads_and_the_level_change_nothing():
    rng = np.random.default_rng(4)
    vocab, count = 3001, 40
    logits = np.stack([some_logits(rng, vocab, "plain") for _ in range(count)])
    params = [some_params(rng) for _ in range(count)]
    prompts = rng.integers(vocab, size=(count, 5))
    positions = rng.integers(1000, size=count)

    def rows():
        return [native(p, prompt.tolist(), seed=seed) for seed, (p, prompt) in enumerate(zip(params, prompts))]

    alone = [draws(logits[i], [row], positions[i : i + 1])[0] for i, row in enumerate(rows())]
    assert len(set(alone)) > count / 2
    for threads in (1, THREADS):
        for isa in ISAS:
            pool = _native.ThreadPool(threads)
            assert draws(logits, rows(), positions, isa=isa, pool=pool) == alone
            order = rng.permutation(count)
            shuffled = rows()
            assert draws(logits[order], [shuffled[i] for i in order], positions[order], isa=isa, pool=pool) == [alone[i] for i in order]


def test_one_sampler_serves_vocabularies_of_any_size_in_turn():
    sampler, rng = _native.Sampler(None), np.random.default_rng(5)
    for vocab in (5, 4097, 1, 64):
        logits, tokens = some_logits(rng, vocab, "plain"), np.zeros(1, np.int32)
        sampler.sample(logits[None], [native(SamplingParams(**WARM, top_p=0.8))], np.array([3]), tokens)
        assert tokens.tolist() == draws(logits, [native(SamplingParams(**WARM, top_p=0.8))], [3])


def test_seed_choice_position_and_purpose_each_change_the_draw_and_nothing_else_does():
    logits = np.zeros((50, 1000), np.float32)

    def all_of(seed=7, choice=0, first=0, **more):
        return draws(logits, [native(SamplingParams(**WARM), seed=seed, choice=choice)] * 50, np.arange(50) + first, **more)

    base = all_of()
    assert base == all_of()
    assert base[1:] == all_of(first=1)[:-1]
    for other in (all_of(seed=8), all_of(seed=7 + 2**32), all_of(choice=1), all_of(purpose=int(Purpose.DRAFT))):
        assert sum(a == b for a, b in zip(base, other)) < 5
    assert len(set(base)) > 40


# --- noise

KNOWN = [  # known-answer vectors of philox4x32-10, published with the generator (Random123): counter, key, words
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_oracles_generator_gives_the_known_answers(counter, key, words):
    assert oracle.philox(np.array(counter, np.uint64), key).tolist() == words


def test_the_noise_is_the_published_generators():
    assert _native.noise(0, 0, 0, 0, 4).tolist() == oracle.noise(0, 0, 0, 0, 4).tolist()
    assert np.floor(_native.noise(0, 0, 0, 0, 4) * 2**32).tolist() == KNOWN[0][2]
    rng = np.random.default_rng(6)
    for n in (0, 1, 3, 4, 5, 1001):
        seed, choice, position, purpose = int(rng.integers(2**63)), *rng.integers(2**32, size=3).tolist()
        noise = _native.noise(seed, choice, position, purpose, n)
        assert np.array_equal(noise, oracle.noise(seed, choice, position, purpose, n))
    noise = _native.noise(1, 2, 3, 0, 100_000)
    assert 0 < noise.min() < 1e-3
    assert 1 - 1e-3 < noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.005
    assert abs(noise.var() - 1 / 12) < 0.002


# --- edges


def test_ties_go_to_the_lowest_id():
    logits = [0, 5, 1, 5, 5, 1]
    assert draw(logits, SamplingParams()) == 1
    assert draw([-0.0, 0.0], SamplingParams()) == draw([0.0, -0.0], SamplingParams()) == 0
    for given, setting, kept in [
        (logits, {"top_k": 2}, [1, 3]),
        (logits, {"top_k": 4}, [1, 2, 3, 4]),
        ([0.0, -0.0, 0.0], {"top_k": 2}, [0, 1]),
        (np.zeros(10), {"top_p": 0.25}, [0, 1, 2]),
        (np.zeros(5000), {"top_p": 0.5}, list(range(2500))),
        (np.zeros(9000), {"top_k": 4500}, list(range(4500))),
        (logits, {"min_p": 1.0}, [1, 3, 4]),
        (np.arange(9000) // 3, {"top_k": 4}, [8994, 8997, 8998, 8999]),
    ]:
        assert candidates(given, SamplingParams(**WARM, **setting))[0].tolist() == kept


def test_top_k_of_a_rising_row_keeps_selecting():
    logits = np.arange(40_000, dtype=np.float32) / 1000
    assert candidates(logits, SamplingParams(**WARM, top_k=5))[0].tolist() == list(range(39_995, 40_000))
    assert candidates(logits[::-1].copy(), SamplingParams(**WARM, top_k=5))[0].tolist() == list(range(5))


def test_extreme_temperatures():
    logits = [1.0, 2.0, 2.0000002]
    assert {draw(logits, SamplingParams(temperature=5e-324), position) for position in range(20)} == {2}
    _, weights = candidates(logits, SamplingParams(temperature=100))
    np.testing.assert_allclose(softmax(weights), 1 / 3, atol=0.01)


def test_masks():
    assert draw([-np.inf, 1.0, -np.inf], SamplingParams(**WARM)) == 1
    for params in (SamplingParams(**WARM), SamplingParams()):
        assert draws([[9.0, 1.0, -np.inf]], [native(params)], [0], masks=token_masks([[0]], 3)) == [1]
    for vocab in (31, 32, 33, 100):
        for allowed in {0, vocab // 2, vocab - 1}:
            masks = token_masks([set(range(vocab)) - {allowed}, ()], vocab)
            drawn = draws(np.zeros((2, vocab)), [native(SamplingParams(**WARM))] * 2, [0, 0], masks=masks)
            assert drawn == [allowed, draw(np.zeros(vocab), SamplingParams(**WARM))]


BAD = [
    ([0, np.nan], "NaN, first at id 1: the model overflowed"),
    ([0, np.inf], r"\+inf, first at id 1: the model overflowed"),
    ([-np.inf] * 2, "leave no id to choose"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(**WARM, top_p=0.5)], ids=["greedy", "warm"])
def test_unusable_rows_are_named_and_the_others_drawn(bad, message, params):
    tokens = np.full(4, -7, np.int32)
    logits = np.array([[1, 0], [0, 1], bad, bad], np.float32)
    pool = _native.ThreadPool(THREADS)
    with pytest.raises(ValueError, match=f"^row 2: .*{message}") as caught:
        _native.Sampler(pool).sample(logits, [native(params)] * 4, np.arange(4), tokens)
    assert "\n" not in str(caught.value)
    assert (tokens[2:] == -1).all()
    assert (tokens[:2] >= 0).all()
    with pytest.raises(ValueError, match=message):
        candidates(bad, params)


def test_a_wide_row_with_one_nan_is_found():
    for vocab in (32_001, 64):
        for place in (0, vocab // 2, vocab - 1):
            for value, word in ((np.nan, "NaN"), (np.inf, r"\+inf")):
                logits = np.zeros(vocab, np.float32)
                logits[place] = value
                for isa in ISAS:
                    with pytest.raises(ValueError, match=rf"{word}, first at id {place}:"):
                        draws(logits, [native(SamplingParams())], [0], isa=isa)


def test_all_masked_is_an_error():
    with pytest.raises(ValueError, match="row 0: .*leave no id"):
        draws([[1.0, 2.0]], [native(SamplingParams(**WARM))], [0], masks=np.zeros((1, 1), np.uint32))


def test_what_does_not_fit_is_refused():
    row, sampler = native(SamplingParams()), _native.Sampler(None)
    one, at, out = np.zeros((1, 3), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int32)
    sampler.sample(np.zeros((0, 3), np.float32), [], at[:0], out[:0])
    for args, more in [
        ((one, [], at, out), {}),
        ((one, [row], at[:0], out), {}),
        ((one, [row], at, out[:0]), {}),
        ((np.zeros((1, 0), np.float32), [row], at, out), {}),
        ((one, [row], at - 1, out), {}),
        ((one, [row], at + 2**32, out), {}),
        ((one, [row], at, out), {"masks": np.zeros((1, 2), np.uint32)}),
        ((one, [row], at, out), {"masks": np.zeros((2, 1), np.uint32)}),
        ((one, [row], at, out), {"logprobs": np.zeros(2, np.float32)}),
        ((one, [row], at, out), {"top_ids": np.zeros((1, 2), np.int32), "top_logprobs": np.zeros((1, 2), np.float32)}),
    ]:
        with pytest.raises(ValueError):
            sampler.sample(*args, **more)
    for setting in (
        {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 1.1}, {"top_p": math.nan},
        {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"presence_penalty": math.nan}, {"frequency_penalty": math.inf}, {"seed": -1},
        {"choice": 2**32}, {"logprobs": -2}, {"logit_bias": [(0, math.inf)]},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            _native.SamplingRow(**setting)
    for bad in ((-1, 0, 0, 0, 1), (0, -1, 0, 0, 1), (0, 0, 2**32, 0, 1), (0, 0, 0, 0, -1)):
        with pytest.raises(ValueError):
            _native.noise(*bad)
    with pytest.raises(ValueError, match="isa 'mmx'"):
        _native.Sampler(None, "mmx")


# --- log-probabilities


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_log_probabilities_are_those_of_the_logits_as_they_came(isa, vocab):
    rng = np.random.default_rng(vocab)
    logits = np.stack([some_logits(rng, vocab, kind) for kind in ("plain", "ties", "masked", "plain")])
    wanted = [2, 5, 0, -1]
    params = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.7)
    rows = [native(params, [0, 1], logprobs=count) for count in wanted]
    logprobs, top_ids = np.full(4, 9, np.float32), np.full((4, 5), -9, np.int32)
    top_logprobs = np.full((4, 5), 9, np.float32)
    tokens = draws(logits, rows, np.arange(4), isa=isa, logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs)
    assert tokens == draws(logits, [native(params, [0, 1])] * 4, np.arange(4))
    wide = logits.astype(np.float64)
    expected = wide - wide.max(1, keepdims=True) - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
    for row, count in enumerate(wanted):
        if count < 0:
            assert np.isnan(logprobs[row])
        else:
            np.testing.assert_allclose(logprobs[row], expected[row, tokens[row]], rtol=1e-6, atol=1e-7)
        ranked = np.lexsort((np.arange(vocab), -wide[row]))
        ranked = ranked[wide[row][ranked] > -np.inf][: max(count, 0)]
        assert top_ids[row].tolist() == ranked.tolist() + [-1] * (5 - len(ranked))
        np.testing.assert_allclose(top_logprobs[row, : len(ranked)], expected[row][ranked], rtol=1e-6, atol=1e-7)
        assert (top_logprobs[row, len(ranked) :] == -np.inf).all()


# --- what the engine asks


def request(index, params, prompt=(1, 2)):
    return Request(index, prompt, params, limit=100, end_ids=frozenset({0}), detokenizer=None, program_context=100)


def test_requests_come_and_go_without_changing_each_others_draws():
    rng = np.random.default_rng(8)
    every = [
        request(
            i, SamplingParams(temperature=1.2, repetition_penalty=1.4, frequency_penalty=0.5, min_tokens=i % 3, seed=i, ignore_eos=i == 4)
        )
        for i in range(5)
    ]
    logits = rng.standard_normal((8, 5, 40)).astype(np.float32)
    sampler = Sampler()
    forbade = 0
    for step, present in enumerate([[0, 1], [0, 1, 2], [2, 1], [1, 3, 4], [4], [4, 3], [3], [3, 4]]):
        running = [every[i] for i in present]
        drawn = sampler.draw(logits[step, present], running)
        for one, token, row in zip(running, [draw.token for draw in drawn], logits[step, present]):
            allowed = np.ones(40, bool)
            allowed[sorted(one.forbidden)] = False
            forbade += bool(one.forbidden)
            plain = oracle.changed(row, one.params, one.prompt, one.output, allowed=allowed)
            assert token == oracle.sample(plain, one.params, one.seed, 0, len(one.prompt) + len(one.output))[0]
            one.take(token)
    assert forbade


def test_an_unusable_row_is_its_own_sequences_error():
    params = SamplingParams(logprobs=1)
    rows = [[1, 2, 0], [0, np.nan, 0], [3, 1, 2], [np.inf, 0, 0], [-np.inf] * 3]
    draws = Sampler().draw(np.array(rows, np.float32), [request(index, params) for index in range(5)])
    assert [draw.token for draw in draws] == [1, -1, 0, -1, -1]
    assert [draw.error is None for draw in draws] == [True, False, True, False, False]
    assert "NaN, first at id 1" in draws[1].error
    assert "+inf, first at id 0" in draws[3].error
    assert "leave no id" in draws[4].error
    assert [draw.logprob is None for draw in draws] == [False, True, False, True, True]


@pytest.mark.parametrize("vocab", [2, 33, 8192])
def test_log_probabilities_of_given_tokens_are_those_of_drawn_ones(vocab):
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((6, vocab)) * 5).astype(np.float32)
    tokens = rng.integers(vocab, size=6).tolist()
    scored = Sampler().score(logits, tokens, 2)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    for row, one in enumerate(scored):
        assert one.token == tokens[row]
        np.testing.assert_allclose(one.logprob, expected[row, tokens[row]], rtol=1e-6, atol=1e-7)
        assert [token for token, _ in one.top] == np.argsort(-expected[row], kind="stable")[:2].tolist()
    drawn = Sampler().draw(logits, [request(index, SamplingParams(temperature=1.0, seed=index, logprobs=2)) for index in range(6)])
    again = Sampler().score(logits, [draw.token for draw in drawn], 2)
    assert again == [draw.logprob for draw in drawn]


def test_a_mask_wins_over_what_is_forbidden():
    class Masked(Request):
        mask = np.array([0b101], np.uint32)

    def masked(index, params):
        return Masked(index, (1,), params, limit=100, end_ids=frozenset({0}), detokenizer=None, program_context=100)

    logits = np.array([[9, 8, 7, 6]] * 3, np.float32)
    draws = Sampler().draw(logits, [masked(0, SamplingParams()), masked(1, SamplingParams(min_tokens=1)), request(2, SamplingParams())])
    assert [draw.token for draw in draws] == [0, 2, 0]
    Masked.mask = np.array([0b1], np.uint32)
    assert Sampler().draw(logits[:1], [masked(0, SamplingParams(min_tokens=1))])[0].token == 0  # nothing but the end is left
    Masked.mask = np.zeros(1, np.uint32)
    assert "leave no id" in Sampler().draw(logits[:1], [masked(0, SamplingParams())])[0].error


def test_choices_have_noise_of_their_own():
    logits = np.zeros((8, 1000), np.float32)
    params = SamplingParams(temperature=1.0, seed=5, n=8)

    def choice(number):
        return Request(0, (1,), params, limit=9, end_ids=frozenset(), detokenizer=None, program_context=9, choice=number)

    tokens = [draw.token for draw in Sampler().draw(logits, [choice(number) for number in range(8)])]
    assert len(set(tokens)) == 8
    backwards = [draw.token for draw in Sampler().draw(logits, [choice(number) for number in reversed(range(8))])]
    assert backwards == tokens[::-1]
    assert tokens == [draw(logits[0], params, 1, [1], seed=5, choice=number) for number in range(8)]


def test_logit_bias_is_added_before_the_draw():
    logits = [1.0, 0.0, 0.5, 0.2]
    assert draw(logits, SamplingParams(logit_bias={3: 100})) == 3
    assert draw(logits, SamplingParams(logit_bias={0: -100})) == 2
    assert draw(logits, SamplingParams(logit_bias=[(0, -0.6), (9, 100)])) == 2  # an id that is not there changes nothing
    ids, weights = candidates(logits, SamplingParams(**WARM, logit_bias={1: 2.0, 2: -1.5}))
    np.testing.assert_allclose(softmax(weights), softmax(np.array([1.0, 2.0, -1.0, 0.2])), rtol=1e-6)


def test_the_engine_imports_without_the_native_code():
    code = "import sys; sys.modules['hasten._native'] = None; import hasten.engine.llm, hasten.engine.request, hasten.engine.sampling"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
