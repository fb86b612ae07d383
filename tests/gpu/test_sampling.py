"""Tokens drawn on the device against the engine's own sampler: the same, whatever the settings; and its arithmetic, to the bit."""

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hasten import _native
from hasten.backends.cuda import drawing as plain
from hasten.backends.cuda.drawing import drawing
from hasten.backends.cuda.kernels.history import History, changed
from hasten.backends.cuda.kernels.noise import LOWER_HALF, mass_of, natural_log, noise_words, uniform
from hasten.backends.cuda.kernels.sampling import Scratch, default_parts, sample
from hasten.engine.sampler import native_row
from hasten.engine.sampling import Purpose, SamplingParams
from hasten.program import Wanted
from tests.engine.sampling_oracle import changed as changed_logits

INF = np.inf
SEEDS = (0, 7, 2**32 - 1, 2**32, 1234567890123456789, 2**63 - 1)


def rows_of(settings, seed=11):
    """Wanted rows, each with a key of its own."""
    return [
        Wanted(seed=SEEDS[i % len(SEEDS)] + (seed if i % 6 == 1 else 0), choice=i % 3, position=seed * 1000 + i, **its)
        for i, its in enumerate(settings)
    ]  # fmt: skip


def engine_tokens(logits, rows):
    """The native sampler's tokens; −1 where it has an error."""
    names = ("temperature", "top_k", "top_p", "min_p")
    native = [native_row(SamplingParams(**{name: getattr(row, name) for name in names}), [], row.seed, row.choice) for row in rows]
    vocab = logits.shape[1]
    masks = np.stack([np.full(-(-vocab // 32), 2**32 - 1, np.uint32) if row.mask is None else row.mask for row in rows])
    tokens, positions = np.full(len(rows), -99, np.int32), np.array([row.position for row in rows])
    try:
        _native.Sampler(None).sample(logits, native, positions, tokens, masks=masks, purpose=Purpose.TOKEN)
    except ValueError:
        assert (tokens == -1).any()
    return tokens.tolist()


def poisoned(scratch):
    for field in dataclasses.fields(scratch):
        its = getattr(scratch, field.name)
        its.fill_(float("nan") if its.is_floating_point() else -(2**30))
    return scratch


def device_tokens(device, logits, rows, history=None, slots=None, *, bucket=0, parts=1, bits=8, block=1024, searches=None):
    vocab, bucket = logits.shape[1], bucket or len(rows)
    made = drawing(rows, slots or [None] * len(rows), bucket, vocab)
    masks = np.full((bucket, -(-vocab // 32)), 0x5A5A5A5A, np.int32) if made.masks is None else made.masks
    filled = torch.full((bucket, vocab), float("nan"))
    filled[: len(rows)] = torch.from_numpy(logits)
    tokens, scratch = torch.full((bucket,), -77, dtype=torch.int32, device=device), poisoned(Scratch.of(bucket, parts, device, bits=bits))
    top_k, top_p = searches or (made.top_k, made.top_p)
    settings, masks = (torch.from_numpy(each).to(device) for each in (made.settings, masks))
    sample(filled.to(device), masks, settings, tokens, scratch, history, top_k=top_k, top_p=top_p, block=block)
    return tokens.tolist(), scratch


def logits_of(seed, rows, vocab, kind="normal"):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)
    if kind == "ties":
        x = np.round(x / 2) * np.float32(2)  # a handful of values, 0 and −0 among them
    elif kind == "infinities":
        x[rng.random(x.shape) < 0.6] = -INF
        x[:, 0] = 1.5
    return x


def bits_of(allowed, vocab):
    mask = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def settings_of(vocab, seed):
    """Seven rows: greedy, plain, every limit alone and together, hot, cold, masked."""
    rng = np.random.default_rng(seed)
    some = bits_of(np.flatnonzero(rng.random(vocab) < 0.3).tolist() or [vocab - 1], vocab)
    return [
        {"mask": some},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": max(1, vocab // 3), "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.5, "top_p": 0.9, "mask": some},
        {"temperature": 50.0, "top_k": 4},
        {"temperature": 1e-3, "top_p": 0.5},
        {"temperature": 4.0, "min_p": 0.4, "mask": some},
    ]


@pytest.mark.parametrize(
    ("vocab", "kind", "parts", "block"),
    [(1, "normal", 2, 16), (31, "ties", 1, 32), (33, "ties", 2, 32), (1000, "infinities", 1, 1024), (5003, "normal", 2, 4096)],
)
def test_tokens_are_the_engines(device, vocab, kind, parts, block):
    logits, rows = logits_of(vocab, 7, vocab, kind), rows_of(settings_of(vocab, vocab))
    tokens, _ = device_tokens(device, logits, rows, parts=parts, block=block)
    assert tokens == engine_tokens(logits, rows)
    assert vocab < 1000 or tokens[1:] != logits.argmax(axis=1).tolist()[1:]  # noise decides


def test_a_row_has_its_token_in_any_company_and_cut(device):
    """Alone, among seven, in a larger bucket whose other rows hold rubbish; by other blocks, parts and bits at a time."""
    logits, rows = logits_of(3, 3, 500, "ties"), rows_of(settings_of(500, 3)[2:5])
    expected = engine_tokens(logits, rows)
    assert device_tokens(device, logits, rows, bucket=5, parts=2, block=128)[0] == [*expected, -1, -1]
    for at, cut in ((0, {"parts": 1, "bits": 4}), (1, {"parts": 3, "block": 64})):
        assert device_tokens(device, logits[[at]], rows[at : at + 1], **cut)[0] == expected[at : at + 1]


def test_equal_logits_are_kept_from_the_lowest_id_up(device):
    limits = [{"top_k": 5}, {"top_p": 0.1}, {"top_k": 20, "top_p": 0.1}, {"top_k": 39}, {"min_p": 1.0}, {"temperature": 0.0}]
    logits, rows = np.zeros((6, 40), np.float32), rows_of([{"temperature": 2.0, **its} for its in limits])
    logits[:, ::2], logits[3, 7] = -0.0, -INF
    tokens, _ = device_tokens(device, logits, rows, parts=3, block=16)
    assert tokens == engine_tokens(logits, rows)
    assert all(token < most for token, most in zip(tokens, (5, 4, 2, 40, 40, 1)))


def test_temperatures_from_tiny_to_large(device):
    logits = logits_of(4, 5, 31)
    rows = rows_of([{"temperature": t} for t in (5e-324, 1e-300, 1e-3, 9.0, 100.0)])
    tokens, _ = device_tokens(device, logits, rows, block=8)
    assert tokens == engine_tokens(logits, rows)
    assert tokens[:3] == logits.argmax(axis=1).tolist()[:3]


def test_rows_without_a_token_say_so(device):
    """NaN and +inf wherever they are, no id that may come, a row that is left to the engine; beside a mask that leaves one id."""
    vocab = 70
    logits = logits_of(5, 7, vocab)
    logits[0, 69], logits[1, 3], logits[2] = np.nan, INF, -INF
    masks = [None, bits_of([5], vocab), None, bits_of([], vocab), bits_of([66], vocab), bits_of([66], vocab), None]
    rows = rows_of([{"mask": mask, "temperature": 1.0 if i != 5 else 0.0} for i, mask in enumerate(masks)])
    expected = engine_tokens(logits, rows)
    assert expected[:6] == [-1, -1, -1, -1, 66, 66]
    rows[6] = dataclasses.replace(rows[6], presence_penalty=1.0)
    tokens, _ = device_tokens(device, logits, rows, block=32)
    assert tokens == [*expected[:6], -1]


def test_launches_that_no_row_asks_for_may_be_left_out(device):
    logits, rows = logits_of(6, 2, 31), rows_of([{}, {"temperature": 1.0, "min_p": 0.1}])
    left_out, scratch = device_tokens(device, logits, rows, block=32)
    assert (scratch.states == -(2**30)).all()
    launched, scratch = device_tokens(device, logits, rows, block=32, searches=(True, True))
    assert left_out == launched == engine_tokens(logits, rows)
    assert (scratch.totals == 0).all()  # no row of them searched


def test_shapes_that_do_not_go_together_are_refused(device):
    logits, tokens, scratch = torch.zeros(2, 40), torch.zeros(2, dtype=torch.int32), Scratch.of(2, 1, "cpu")
    settings, masks = torch.zeros(len(plain.FIELDS), 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int32)
    for wrong in (
        (logits, masks[:, :1].contiguous(), settings, tokens, scratch), (logits, masks, settings[:-1], tokens, scratch),
        (logits, masks, settings, tokens[:1], scratch), (logits, masks, settings, tokens, Scratch.of(3, 1, "cpu")),
        (torch.zeros(40, 2).T, masks, settings, tokens, scratch),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            sample(*wrong)
    with pytest.raises(ValueError, match="a history of 39 ids"):
        sample(logits, masks, settings, tokens, scratch, History.of(1, 39, "cpu"))
    with pytest.raises(ValueError, match="blocks of a power of two"):
        sample(logits, masks, settings, tokens, scratch, block=48)


# --- bias and penalties


def test_penalties_need_no_token_to_leave_the_device(device):
    """Three steps, of which the kernels note the tokens; the engine's own rows are told them."""
    vocab, rng = 64, np.random.default_rng(9)
    asked = [
        {"repetition_penalty": 1.7}, {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.8, "top_k": 20},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 0.5}, {"temperature": 1.0}, {"repetition_penalty": 2.0},
    ]  # fmt: skip
    bias = {2: {3: 6.5, 9: -100.0, 40: 2.25, 999: 5.0}}
    prompts = [rng.integers(0, vocab, 12).tolist() for _ in asked]
    prompts[0], prompts[4] = [int(logits_of(20 + step, 5, vocab)[0].argmax()) for step in range(3)], [50, 20, 30, 999]
    slots = [4, 0, 2, None, 1]
    history = History.of(5, vocab, device)
    history.words.fill_(-1)
    history.biases.fill_(float("nan"))
    params = [SamplingParams(**its, logit_bias=bias.get(row, {})) for row, its in enumerate(asked)]
    native = [native_row(each, prompt, 5, row) for row, (each, prompt) in enumerate(zip(params, prompts))]
    for slot, prompt, each in zip(slots, prompts, params):
        if slot is not None:
            history.begin(slot, prompt, (), each.logit_bias)
    outputs, turned = [[] for _ in asked], []
    for step in range(3):
        logits = logits_of(20 + step, 5, vocab)
        logits[4] = np.where(np.isin(np.arange(vocab), [20, 30]), np.float32(-3e38), -INF)  # twice that is no float32
        expected = np.full(5, -99, np.int32)
        _native.Sampler(None).sample(logits, native, np.arange(5) + step, expected)
        rows = [
            Wanted(seed=5, choice=row, position=row + step, bias=[*bias.get(row, {}).items()], **its)
            for row, its in enumerate(asked)
        ]  # fmt: skip
        tokens, _ = device_tokens(device, logits, rows, history, slots, block=64)
        assert tokens == expected.tolist()
        turned += [tokens[0] != logits[0].argmax()]
        for row, (output, token) in enumerate(zip(outputs, tokens)):
            output.append(token)
            native[row].append(token)
    assert any(turned)  # a penalty has changed what is likeliest
    assert outputs[4] == [20] * 3
    anew = History.of(5, vocab, device)
    for slot, prompt, output, each in zip(slots, prompts, outputs, params):
        if slot is not None:
            anew.begin(slot, prompt, output, each.logit_bias)
            assert torch.equal(history.words[slot], anew.words[slot])


def test_logits_are_changed_to_the_bit(device):
    vocab, rng = 500, np.random.default_rng(10)
    prompt, output = rng.integers(0, vocab, 300).tolist(), rng.integers(0, vocab // 4, 200).tolist()
    bias = [(token, float(value)) for token, value in zip(rng.permutation(vocab)[:200].tolist(), rng.normal(size=200) * 5)]
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.3, logit_bias=bias)
    history, given = History.of(2, vocab, device), logits_of(10, 1, vocab)[0]
    given[::7], given[3], given[4] = -INF, 3.4e38, -3.4e38
    history.begin(1, [*prompt, 3, 4], output, params.logit_bias)
    x = torch.full((512,), -INF, device=device)
    x[:vocab] = torch.from_numpy(given)
    settings = torch.tensor([params.repetition_penalty, params.presence_penalty, params.frequency_penalty], dtype=torch.float64)
    _changed[(1,)](x, history.words, history.biases, settings.to(device), vocab, 512, enable_fp_fusion=False)
    expected = changed_logits(given, params, [*prompt, 3, 4], output, bias=bias)
    assert np.array_equal(x[:vocab].cpu().numpy(), expected)
    assert (x[vocab:] == -INF).all()
    assert np.mean(expected != given) > 0.5


def test_a_slot_takes_as_many_biases_as_a_request_may_have(device):
    history = History.of(1, 1100, device)
    history.begin(0, (), (), [(token, token / 7) for token in range(1024)])
    places = (history.words[0].cpu().numpy().view(np.uint32) >> np.uint32(21)).astype(np.int64)
    assert places.tolist() == [*range(1, 1025), *[0] * 76]
    assert history.biases[0, 1023].item() == 1023 / 7
    with pytest.raises(ValueError, match="1025"):
        history.begin(0, (), (), [(0, 1.0)] * 1025)


@triton.jit
def _changed(x, words, biases, settings, vocab, COUNT: tl.constexpr):
    """In slot 1."""
    at, slot = tl.arange(0, COUNT), tl.full((), 1, tl.int64)
    repetition, presence, frequency = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    tl.store(x + at, changed(tl.load(x + at), words, biases, slot, at, vocab, repetition, presence, frequency))


# --- the arithmetic


@triton.jit
def _noise(key, out, FIRST: tl.constexpr, IDS: tl.constexpr):
    counter = (FIRST // 4 + tl.arange(0, IDS // 4)).to(tl.uint32)
    seed, position, choice, purpose = tl.load(key), tl.load(key + 1), tl.load(key + 2), tl.load(key + 3)
    upper = noise_words(seed, position, choice, purpose, counter)
    lower = noise_words(seed, position, choice, purpose, counter | LOWER_HALF)
    tl.store(out + tl.arange(0, IDS), uniform(upper, lower))


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (1234567890123456789, 77, 3, 1), (2**63 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1)])
def test_noise_is_the_engines_to_the_bit(device, key):
    first, count = 260_096, 256
    out = torch.full((count,), float("nan"), dtype=torch.float64, device=device)
    _noise[(1,)](torch.tensor(key, dtype=torch.int64, device=device), out, first, count, enable_fp_fusion=False)
    seed, position, choice, purpose = key
    assert np.array_equal(out.cpu().numpy(), _native.noise(seed, choice, position, purpose, first + count)[first:])


@triton.jit
def _reckon(given, logs, masses, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    x = tl.load(given + at)
    tl.store(logs + at, natural_log(tl.abs(x)))
    tl.store(masses + at, mass_of(x))


def reckoned(device, given):
    logs = torch.full((len(given),), float("nan"), dtype=torch.float64, device=device)
    masses = torch.full((len(given),), -1, dtype=torch.int64, device=device)
    _reckon[(1,)](torch.from_numpy(given).to(device), logs, masses, len(given), enable_fp_fusion=False)
    return logs.cpu().numpy(), masses.cpu().numpy()


def kept(logits, **params):
    ids, _ = _native.Sampler(None).candidates(logits[None], native_row(SamplingParams(**params), [], 0))
    return set(ids.tolist())


def test_logarithms_are_the_engines_to_the_bit(device):
    """The engine keeps what has a log-weight of ln min_p: here of two ids one, whose log-weight is put there and just beyond."""
    shares = np.random.default_rng(7).uniform(0.4, 0.99, 64)
    logs, _ = reckoned(device, shares)
    np.testing.assert_allclose(logs, np.log(shares), rtol=1e-15)
    told = 0
    for share, log in zip(shares.tolist(), logs.tolist()):
        for weight, both in ((log, True), (np.nextafter(log, -INF), False)):
            about = [1 / -weight]
            about += [np.nextafter(about[0], 0), np.nextafter(about[0], INF)]
            for temperature in (float(each) for each in about if 1 / each == -weight):
                assert kept(np.array([0, -1], np.float32), temperature=temperature, min_p=share) == ({0, 1} if both else {0})
                told += 1
                break
    assert told >= 100


def test_masses_are_the_engines_to_the_unit(device):
    """The engine keeps the fewest ids whose mass reaches top_p of all: here one unit of it decides."""
    logits = np.sort(logits_of(8, 1, 64)[0])[::-1].copy()
    logits[-1] = logits[0] - 39
    _, masses = reckoned(device, logits.astype(np.float64) - np.float64(logits[0]))
    assert masses[0] == 2**42
    assert masses[-1] == 0
    np.testing.assert_allclose(masses, np.exp(logits.astype(np.float64) - logits[0]) * 2**42, rtol=1e-10, atol=0.51)
    whole, reached = int(masses.sum()), np.cumsum(masses)
    for count in (1, 2, 5, 20, 40):
        for target, ids in ((int(reached[count - 1]), count), (int(reached[count - 1]) + 1, count + 1)):
            share = np.nextafter(target / whole, 0)
            while np.ceil(share * whole) < target:
                share = np.nextafter(share, 1)
            assert np.ceil(share * whole) == target
            assert kept(logits, temperature=1.0, top_p=float(share)) == set(range(ids))


def test_parts_fill_a_device_and_no_more():
    assert [default_parts(rows, 128_256) for rows in (1, 2, 8, 64, 1000)] == [126, 126, 33, 4, 1]
    assert default_parts(1, 31) == 1


# --- plain data


def test_what_the_device_does_not_draw_is_left_with_a_reason():
    plainly = Wanted(seed=1, position=2, temperature=1.0)
    asked = [
        ("penalties", {"presence_penalty": 0.5}), ("penalties", {"repetition_penalty": 1.1}), ("penalties", {"frequency_penalty": -1.0}),
        ("bias", {"bias": [(3, 1.0)]}), ("log-probabilities", {"logprobs": 0}), ("another row", {"presence_penalty": 0.5}),
    ]  # fmt: skip
    slotted = dataclasses.replace(plainly, presence_penalty=0.25)
    rows = [plainly, slotted, *(dataclasses.replace(plainly, **its) for _, its in asked)]
    made = drawing(rows, [None, 3, *[None] * 5, 3], 9, 100)
    assert sorted(made.left) == [2, 3, 4, 5, 6, 7]
    assert all(word in made.left[row] for row, (word, _) in enumerate(asked, 2))
    assert made.settings[plain.FIELDS.index("kind")].tolist() == [plain.DRAWN, plain.DRAWN, *[plain.NOT_DRAWN] * 7]
    assert made.settings[plain.FIELDS.index("slot")].tolist() == [-1, 3, *[-1] * 7]
    assert "1048577 ids" in drawing([plainly], [None], 1, 2**20 + 1).left[0]
    with pytest.raises(ValueError, match="9 rows"):
        drawing([plainly] * 9, [None] * 9, 8, 100)


def test_settings_hold_what_was_wanted():
    mask = bits_of([31, 32], 40)
    wanted = Wanted(seed=2**63 - 1, position=2**32 - 1, choice=5, purpose=1, temperature=0.3, top_k=7, top_p=0.25, min_p=0.125, mask=mask)
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    rows = [dataclasses.replace(wanted, temperature=0.0), dataclasses.replace(wanted, **penalties)]
    made = drawing([*rows, dataclasses.replace(wanted, top_k=40, mask=None)], [None, 4, None], 4, 40)
    column = dict(zip(plain.FIELDS, made.settings[:, 1].tolist()))
    reals = {name: np.array(column.pop(name)).view(np.float64).item() for name in plain.REALS}
    assert column == {"kind": 2, "masked": 1, "slot": 4, "seed": 2**63 - 1, "position": 2**32 - 1, "choice": 5, "purpose": 1, "top_k": 7}
    assert reals == {"top_p": 0.25, "min_p": 0.125, "inverse": 1 / 0.3, "repetition": 1.5, "presence": 0.5, "frequency": -0.5}
    assert made.masks.view(np.uint32).tolist() == [mask.tolist(), mask.tolist(), [0, 0], [0, 0]]
    assert [*made.settings[plain.FIELDS.index("kind")], *made.settings[plain.FIELDS.index("top_k")]] == [1, 2, 2, 0, 0, 7, 0, 0]
    assert (made.top_k, made.top_p) == (True, True)
    greedy = drawing([Wanted(seed=1, position=2, top_k=3, top_p=0.5)], [None], 1, 40)
    assert (greedy.top_k, greedy.top_p, greedy.masks) == (False, False, None)
