"""`hasten compare` and what it measures, next to plain loops, and next to models that are known to be bigger, worse or the same."""

import dataclasses
import json
import math
import weakref

import msgspec
import numpy as np
import pytest

from hasten.base import hardware
from hasten.base.errors import ConfigError, UserError
from hasten.checkpoint import load
from hasten.compress.evidence import Gate, Timed
from hasten.compress.make import Calibration, make, time_both
from hasten.compress.recipe import recipe_of
from hasten.compress.walk import Run
from hasten.engine.backends import open_scorer
from hasten.formats.weights import Weight, Weights
from hasten.measure import Windows, cut_windows, held_out, read_corpus, speed
from hasten.measure.compare import Comparison, compare, even_windows, shared_windows
from hasten.measure.size import Size
from hasten.measure.speed import Ratio, Speed, Speeds, SpeedTest, measure_speeds, require_room
from hasten.program import Batch
from tests.cli import assert_refused, main
from tests.compress.models import small

QUICK = ["--batch", "1,2", "--prompt", 4, "--new", 2]
TINY = SpeedTest((1, 2), prompt=4, new=2)


@pytest.fixture
def hasten(monkeypatch, capsys):
    return lambda *arguments: main(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def base():
    return load("code-8m")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of four short documents."""
    folder = tmp_path_factory.mktemp("texts")
    for number, document in enumerate(held_out().documents[:4]):
        (folder / f"{number}.py").write_text(document[: 300 + 200 * number])
    return folder


@pytest.fixture(scope="module")
def made(base, texts, tmp_path_factory):
    """code-8m in two bits, which is smaller and worse, and what was said of it."""
    out, run = tmp_path_factory.mktemp("out") / "two-bits", Run(tmp_path_factory.mktemp("work") / "work", 2)
    recipe, gate = recipe_of([{"rtn": {"weights": "int2-g64"}}]), Gate(most=None, path=texts)
    return out, make(base, recipe, out, calibration=Calibration(), gate=gate, run=run, speed=TINY)


@pytest.fixture(scope="module")
def noisy(base):
    """code-8m with a little noise on one weight."""
    name = "blocks.3.mixer.q.weight"
    array = base.weights[name].load().astype(np.float32)
    array += np.random.default_rng(0).normal(size=array.shape).astype(np.float32) * array.std() * 0.5
    return dataclasses.replace(
        base, name="noisy", weights=Weights({**base.weights, name: Weight(array.shape, array.dtype, lambda: array)})
    )  # fmt: skip


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max(-1, keepdims=True) - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))


def test_means_and_spreads_are_those_of_plain_loops(base, noisy, texts):
    windows = cut_windows(base, read_corpus(texts), 32)
    assert windows.documents == tuple(sorted(windows.documents))
    assert {*windows.documents} == {0, 1, 2, 3}
    assert len(windows.windows) > 12
    heard = []
    same, found = compare(base, [base, noisy], windows, 32, lambda *said: heard.append(said))
    sums, tokens = np.zeros((4, 4)), np.zeros(4)
    players = [open_scorer(model, "cpu", 32) for model in (base, noisy)]
    for document, ids in zip(windows.documents, windows.windows, strict=True):
        first, second = (log_softmax(player.score(Batch.of([ids[:-1]]))) for player in players)
        for p, q, target in zip(first, second, ids[1:], strict=True):
            sums[document] += [-p[target], -q[target], (np.exp(p) * (p - q)).sum(), p.argmax() == q.argmax()]
            tokens[document] += 1
    assert heard[-1] == (windows.tokens, windows.tokens)
    assert found.tokens == windows.tokens == tokens.sum()
    means = sums.sum(0) / tokens.sum()
    assert [found.base_loss, found.loss, found.kl, found.agreement] == pytest.approx(means, rel=1e-4)
    assert found.increase == pytest.approx(means[1] / means[0] - 1, rel=1e-3)
    assert found.kl > 1e-3
    assert (same.kl, same.agreement, same.increase, same.worse) == (pytest.approx(0, abs=1e-6), 1.0, 0.0, False)
    # the standard error, by leaving one document out at a time, which agrees with the formula where no document is most of the text
    over = found.over_documents
    assert over.documents == 4
    own = sums[:, 1] / tokens
    assert (over.loss.low, over.loss.high) == pytest.approx(tuple(np.percentile(own, [10, 90])), rel=1e-4)
    left = (sums[:, 2] - means[2] * tokens) / tokens.sum()
    assert over.kl.error == pytest.approx(math.sqrt(4 / 3 * (left**2).sum()), rel=1e-3)


def test_spreads_are_nearly_those_of_the_jackknife():
    random, documents = np.random.default_rng(3), 200
    tokens = random.integers(50, 150, documents)
    base = tokens * random.normal(2.2, 0.3, documents)
    sums = np.stack([base, base * random.normal(1.02, 0.03, documents), tokens * 0.01, tokens * 0.9], 1)
    found = Comparison.of(sums, tokens)
    without = np.array([np.delete(sums, one, 0).sum(0) / np.delete(tokens, one).sum() for one in range(documents)])
    for spread, values in ((found.over_documents.loss, without[:, 1]), (found.over_documents.increase, without[:, 1] / without[:, 0])):
        jackknife = math.sqrt((documents - 1) / documents * ((values - values.mean()) ** 2).sum())
        assert spread.error == pytest.approx(jackknife, rel=0.05)
    assert found.over_documents.kl.error == pytest.approx(0, abs=1e-12)
    assert found.worse
    assert Comparison.of(sums[:1], tokens[:1]).over_documents is None
    some = np.array([[2.0, 2.2, 0, 1], [0, 0, 0, 0], [2.0, 1.9, 0, 1]]), np.array([1, 0, 1])  # a document of no tokens does not count
    assert Comparison.of(*some).over_documents.documents == 2
    assert not Comparison.of(*some).worse  # up in one, down in another
    with pytest.raises(UserError, match="too short"):
        Comparison.of(np.zeros((1, 4)), np.zeros(1, np.int64))


def test_few_tokens_are_of_many_documents():
    windows = Windows(((0,) * 5, (1,) * 5, (2,) * 3, (3,) * 5, (4,) * 2, (5,) * 5), (0, 0, 0, 1, 1, 2))
    order = even_windows(windows)
    assert [ids[0] for ids in order.windows] == [0, 3, 5, 1, 4, 2]
    assert order.documents == (0, 1, 2, 0, 1, 0)
    assert order.tokens == windows.tokens == 19
    some = even_windows(windows, 10)
    assert [(ids[0], len(ids)) for ids in some.windows] == [(0, 5), (3, 5), (5, 3)]
    assert some.tokens == 10


def test_other_tokens_do_not_compare(base, texts):
    corpus = read_corpus(texts)
    other = dataclasses.replace(base, name="other", spec=msgspec.structs.replace(base.spec, vocab=8000))
    with pytest.raises(UserError, match=r"other has a vocabulary of 8,000 tokens and code-8m one of 8,192"):
        shared_windows(base, [base, other], corpus, 64, 100)

    class Shifted:
        start_id = base.tokenizer.start_id

        def encode(self, text, add_special_tokens=True):
            return [(token + 1) % 8192 for token in base.tokenizer.encode(text, add_special_tokens)]

    shifted = dataclasses.replace(base, name="shifted", tokenizer=Shifted())
    with pytest.raises(UserError, match="shifted and code-8m make other tokens of the same text"):
        shared_windows(base, [shifted], corpus, 64, 100)
    assert shared_windows(base, [base], corpus, 64, 100).tokens == 100


def test_ratios_have_intervals_of_ranks():
    for rounds, out in ((5, 0), (7, 0), (8, 1), (20, 5)):  # 2 * binomial(rounds, 1/2).cdf(out) <= 0.1, the largest such
        ways = [sum(math.comb(rounds, below) for below in range(most + 1)) * 2 / 2**rounds for most in (out, out + 1)]
        assert ways[0] <= 0.1 < ways[1]
        seconds = np.random.default_rng(rounds).permutation(np.arange(1.0, rounds + 1))
        found = Ratio.of(seconds, [1.0] * rounds)
        assert (found.low, found.high) == (1 + out, rounds - out)
        assert found.median == np.median(seconds)
    assert Ratio.of([2.0, 3.0, 2.0, 4.0, 2.0], [1.0] * 5).word == "faster"
    assert Ratio.of([2.0, 3.0, 0.5, 4.0, 2.0], [1.0] * 5).word == "no faster"
    assert Ratio.of([0.9] * 5, [1.0] * 5).word == "slower"
    with pytest.raises(ConfigError, match="at least 5"):
        SpeedTest(rounds=4)
    assert SpeedTest().within(40) == SpeedTest(prompt=20, new=16)
    assert SpeedTest().within(100_000) == SpeedTest()


def test_models_are_timed_in_turn_and_one_is_open_at_a_time(base, noisy, monkeypatch):
    order, opened = [], []
    real, opens = speed.Trial.time, speed.open_runner

    def timed(self):
        assert [runner() is not None for runner in opened] == [False] * (len(opened) - 1) + [True]
        order.append((names[-1], self.case.batch))
        return real(self)

    names = []

    def opening(model, cases, **settings):
        names.append("base" if model is base else "other")
        runner = opens(model, cases, **settings)
        opened.append(weakref.ref(runner.session))
        return runner

    monkeypatch.setattr(speed.Trial, "time", timed)
    monkeypatch.setattr(speed, "open_runner", opening)
    heard = []
    first, second = measure_speeds(base, [noisy], TINY, threads=1, report=lambda *said: heard.append(said))
    assert heard[-1] == (20, 20)
    assert names == ["base", "other", "other", "base", "base", "other", "other", "base", "base", "other"]
    assert order == [(name, batch) for name in names for batch in (1, 2)]
    assert [row.batch for row in first.rows] == [row.batch for row in second.rows] == [1, 2]
    assert {row.decode for row in first.rows} == {None}
    for row in second.rows:
        assert 0 < row.decode.low <= row.decode.median <= row.decode.high
        assert row.prefill_tokens_per_s > 0
    assert (second.backend, second.threads, second.weights, second.activations) == ("cpu", 1, "bf16", "bf16")


def test_lines_say_what_is_not_faster():
    fast, same, slow = Ratio(1.5, 1.4, 1.6), Ratio(1.01, 0.9, 1.1), Ratio(0.5, 0.4, 0.6)
    speeds = Speeds("cpu", "avx2", 2, "int4", "bf16", "bf16", (Speed(1, 10, 10, same, fast), Speed(8, 10, 10, slow, slow)))
    assert speeds.lines("slower") == ["slower at batch 8: prefill 0.50 × (0.40 to 0.60)", "slower at batch 8: decode 0.50 × (0.40 to 0.60)"]
    assert Timed(TINY, speeds, speeds).not_faster()[0] == "no faster at batch 1: prefill 1.01 × (0.90 to 1.10)"


def test_the_table_is_what_was_measured(base, made, hasten, texts):
    out, result = made
    done = hasten("compare", "code-8m", out, "code-8m", *QUICK, "--text", texts, "--limit", 500, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    first, small, again = facts["models"]
    assert small["bytes"] == load(out).weights.nbytes
    assert small["linear_bytes"] == pytest.approx(result.shrunk.after, rel=1e-3)  # on disk each has its shape besides
    assert first["linear_bytes"] == result.shrunk.before
    assert small["bits_per_linear_weight"] == pytest.approx(16 * result.shrunk.after / result.shrunk.before, rel=1e-3)
    assert (small["weights"], small["activations"], first["weights"]) == ("int2-g64", "bf16", "bf16")
    windows = even_windows(cut_windows(base, read_corpus(texts), 512), 500)
    (alone,) = compare(base, [load(out)], windows, 512)
    assert small["quality"] == json.loads(json.dumps({**dataclasses.asdict(alone), "increase": alone.increase}))
    assert (again["quality"]["kl"], again["quality"]["agreement"], first["quality"]) == (pytest.approx(0, abs=1e-6), 1.0, None)
    assert facts["tokens"] == 500
    assert facts["documents"] == small["quality"]["over_documents"]["documents"] > 1
    assert [row["batch"] for row in small["speed"]["rows"]] == [1, 2]
    assert first["speed"]["rows"][0]["decode"] is None
    worse = [line for line in facts["findings"] if line.startswith("worse")]
    assert len(worse) == 1
    assert str(out) in worse[0]


def test_the_table_for_people(made, hasten, texts):
    out, _ = made
    done = hasten("compare", out, "code-8m", "--text", texts, "--no-speed")
    assert done.code == 0, done.err
    assert "± is the standard error over documents" in done.out
    assert "int2-g64" in done.out
    assert "tokens a second" not in done.out
    assert f"does not pay: code-8m is bigger, 16,785,920 bytes where {out} takes" in done.out
    assert "worse" not in done.out


def test_random_weights_have_bytes_and_speed_alone(hasten, texts):
    done = hasten("compare", "random:gpt2", "code-8m", "--no-speed")
    assert done.code == 0, done.err
    assert "random:gpt2 has no tokenizer, so there is no text to score" in done.out
    done = hasten("compare", "code-8m", "random:gpt2", "code-8m", "--no-speed", "--text", texts, "--json")
    facts = json.loads(done.out)
    assert [each["quality"] is None for each in facts["models"]] == [True, True, False]
    assert facts["not_scored"] == ["random:gpt2 has no tokenizer, so there is no text to score it on: compared by bytes and speed alone"]


def test_mistakes_are_one_line(hasten, texts, monkeypatch):
    assert_refused(hasten("compare", "code-8m", "no-such-model"), "no-such-model")
    assert_refused(hasten("compare", "code-8m", "code-8m", "--batch", "1,x"), "batch is '1,x'")
    assert_refused(hasten("compare", "code-8m", "code-8m", "--prompt", 4000), "4020", "2048")
    assert_refused(hasten("compare", "code-8m", "code-8m", "--text", texts, "--window", 4000), "window is 4000")
    monkeypatch.setattr(hardware, "memory", lambda root: hardware.Memory(None, 1 << 20, None, None))
    assert_refused(hasten("compare", "code-8m", "code-8m", "--text", texts), "2 models side by side", "compare fewer")


def test_a_result_says_how_fast_it_is(made, hasten):
    out, result = made
    evidence = load(out).provenance[-1].evidence
    assert evidence["speed"] == json.loads(json.dumps(dataclasses.asdict(result.timed)))
    assert evidence["speed"]["test"] == {"batches": [1, 2], "prompt": 4, "new": 2, "rounds": 5}
    assert evidence["speed"]["made"]["weights"] == "int2-g64"
    assert evidence["over_documents"]["documents"] == result.comparison.over_documents.documents
    assert result.timed.not_faster() == result.timed.made.lines("slower", "no faster")


def test_quantize_prints_tokens_a_second(hasten, texts, tmp_path):
    asked = ["--method", "rtn", "--weights", "int8", "--held-out", texts, "--batch", "1"]
    done = hasten("quantize", "code-8m", tmp_path / "out", *asked)
    assert done.code == 0, done.err
    assert "tokens a second, bf16 × bf16 → int8 × bf16" in done.out
    assert "  batch 1: prefill " in done.out
    lines = [line for line in done.out.splitlines() if line.startswith(("slower at batch 1", "no faster at batch 1"))]
    done = hasten("quantize", "code-8m", tmp_path / "other", *asked[:-2], "--no-speed", "--json")
    facts = json.loads(done.out)
    assert facts["not_timed"] == "it was not asked for"
    assert "speed" not in load(tmp_path / "other").provenance[-1].evidence
    assert len(lines) <= 2


def test_what_has_no_room_to_be_timed_is_kept_and_said(base, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "memory", lambda root: hardware.Memory(None, 30 << 20, None, None))
    require_room([base], "no more")
    with pytest.raises(UserError, match=r"2 models side by side take .* no more"):
        require_room([base, base], "no more")
    assert isinstance(time_both(base, base, TINY, Run(tmp_path, 1)), Timed)  # one at a time
    monkeypatch.setattr(hardware, "memory", lambda root: hardware.Memory(None, 3 << 20, None, None))
    assert "takes 0.0 GiB" in time_both(base, base, TINY, Run(tmp_path, 1))


def test_sizes_leave_head_and_routers_out(base):
    found = Size.of(base)
    assert found.bits_per_linear_weight == 16
    assert found.linear_weights == sum(
        weight.size for name, weight in base.weights.items() if name.startswith("blocks.") and "norm" not in name
    )
    experts = small("MoE")
    routers = [name for name in experts.weights if "router" in name]
    assert routers
    its = Size.of(experts)
    assert its.linear_weights == sum(
        weight.size for name, weight in experts.weights.items() if weight.size and len(weight.shape) > 1
        and name.startswith("blocks.") and name not in routers
    )  # fmt: skip
