"""What is counted, without a server: histograms, totals over restarts, bytes that a step reads, one request's outputs, trace ids."""

import random

import numpy as np
import pytest

from hasten import LLM, SamplingParams
from hasten.families.registry import find_family
from hasten.measure.cost import cache_bytes, read_share
from hasten.program import Batch, lower
from hasten.serve.counts import Counts, Tally
from hasten.serve.engine_totals import EngineTotals
from hasten.serve.histogram import SECONDS, TOKENS, Histogram
from hasten.serve.messages import Piece, Submit
from hasten.serve.meter import ReadBytes
from hasten.serve.trace import trace_in
from hasten.serve.work import Work


@pytest.mark.parametrize("bounds", [SECONDS, TOKENS, (1.0,)])
def test_a_histogram_counts_as_numpy_does(bounds):
    values = np.concatenate([10 ** np.random.default_rng(1).uniform(-6, 6, 2000), bounds])  # each bound is its own bucket's
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    found = histogram.buckets()
    assert [float(bound) for bound, _ in found] == pytest.approx([*bounds, np.inf])
    assert [count for _, count in found] == [np.count_nonzero(values <= float(bound)) for bound, _ in found]
    assert found[-1][1] == len(values)
    assert histogram.sum == pytest.approx(values.sum())


def test_totals_never_fall_however_often_engines_die():
    rng, totals, told, now = random.Random(3), EngineTotals(), 0, 0.0
    for _ in range(50):
        totals.begin()
        assert totals.total("steps") == told
        count = 0
        for _ in range(rng.randrange(4)):  # one may die before it says anything
            count += rng.randrange(5)
            now += 0.25
            totals.take({"steps": count}, now, True)
        told += count
    assert totals.total("steps") == told > 100
    assert totals.total("nothing") == 0


def test_shares_are_those_of_the_last_second_and_of_the_time_that_steps_took():
    totals = EngineTotals()
    totals.begin()
    assert (totals.read_bytes_s(0.0), totals.kernel_share(0.0)) == (0.0, None)
    for tick in range(1, 41):  # half of the time there is nothing to do; a slow time, then a fast one
        fast = max(0, tick - 20)
        totals.take(
            {
                "step_ns": tick * 125_000_000, "read_bytes": 1_000_000 * tick + 9_000_000 * fast, "profiled_ns": 1000 * tick,
                "kernel_ns": 500 * tick + 250 * fast,
            },
            100 + tick / 4, tick < 40,
        )  # fmt: skip
        if tick == 20:
            assert totals.read_bytes_s(105.0) == pytest.approx(1e6 / 0.125)
            assert totals.kernel_share(105.0) == pytest.approx(0.5)
    assert totals.read_bytes_s(110.0) == pytest.approx(10e6 / 0.125)
    assert totals.kernel_share(110.1) == pytest.approx(0.75)
    assert (totals.read_bytes_s(120.0), totals.kernel_share(120.0)) == (0.0, None)  # nothing runs any more
    totals.begin()
    assert totals.read_bytes_s(110.0) == 0.0


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "deepseek_v3", "mamba", "gemma3_text"])
def test_bytes_of_a_step_are_those_of_its_cost(name):
    family = find_family(name)
    program = lower(family.spec(family.examples[0]))
    rng = np.random.default_rng(4)
    read = ReadBytes(program, 1_000_000)
    for _ in range(20):
        starts = rng.integers(0, program.context // 2, rng.integers(1, 9)).tolist()
        lengths = rng.integers(1, program.context // 2, len(starts)) if rng.random() < 0.5 else np.ones(len(starts), int)
        batch = Batch.of([[1] * length for length in lengths], starts, rows="last")
        last = [start + int(length) - 1 for start, length in zip(starts, lengths)]
        weights = 1_000_000 * read_share(program, int(lengths.sum())) / read_share(program, 1)
        assert read.of(batch) == pytest.approx(weights + cache_bytes(program, last), abs=1)


def test_work_counts_its_steps_profiles_some_and_gives_what_it_gave():
    llm = LLM("code-8m", max_sequences=2)
    prompts, params = [[5, 6, 7], [9] * 40, [11] * 20], SamplingParams(max_tokens=100, ignore_eos=True)
    wanted = [one.token_ids for one in llm.generate(prompts, params)]
    work = Work(llm)
    for id, prompt in enumerate(prompts):
        assert not work.submit(Submit(id, prompt, params, ""))
    assert not work.stats().counters["steps"]  # what was before is not this one's
    found, begun = dict.fromkeys(range(3), ()), []
    while work.busy:
        for piece in work.step():
            found[piece.id] += piece.token_ids
        begun += work.take_begun()
    assert [*found.values()] == wanted
    assert [id for id, _ in begun] == [0, 1, 2]
    assert max(begun[0][1], begun[1][1]) < begun[2][1]  # the third waited for a slot
    counted = work.stats().counters
    assert counted["prompt_tokens"] == 63
    assert counted["hit_tokens"] + counted["computed_tokens"] + 3 == 63 + 300  # the last token of each is not computed
    assert 0 < counted["kernel_ns"] < counted["profiled_ns"] < counted["step_ns"]
    weights = llm.engine().session._native.compiled.weight_bytes
    assert counted["read_bytes"] > counted["steps"] * weights
    assert counted["read_bytes"] - counted["steps"] * weights < counted["steps"] * weights  # short texts: the cache is less


def piece(choice: int, tokens: int, reason: str | None = None) -> Piece:
    return Piece(1, choice, "x", tuple(range(tokens)), reason)


def test_a_tally_takes_each_time_from_where_it_begins():
    counts = Counts()
    tally = Tally(counts, 100.0, [7, 9], 2)
    for output, tokens, reason, now in (
        (0, 1, None, 100.5), (1, 1, None, 100.5), (0, 1, None, 100.6), (0, 2, "length", 100.9), (1, 0, "stop", 101.0),
        (2, 3, "stop", 103.0),
    ):  # fmt: skip
        tally.take(output, piece(output % 2, tokens, reason), 100.1, 0.3, now)
    tally.cut(1, "abort")
    assert counts.prompt_tokens == 16
    assert counts.output_tokens == 8
    assert counts.ended == {"stop": 2, "length": 1, "abort": 1, "error": 0}
    expected = {
        "first_token": [0.5, 0.5, 3.0], "inter_token": [0.1, 0.3], "per_token": [0.4 / 3], "whole": [0.9, 1.0, 3.0], "queue": [0.3] * 3,
        "prefill": [0.1, 0.1, 2.6], "decode": [0.4, 0.5, 0.0], "prompt_lengths": [7, 7, 9], "output_lengths": [4, 1, 3],
    }  # fmt: skip
    for name, values in expected.items():
        histogram = getattr(counts, name)
        assert histogram.buckets()[-1][1] == len(values), name
        assert histogram.sum == pytest.approx(sum(values)), name


GOOD_ID, GOOD_SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
GOOD = b"00-" + GOOD_ID + b"-" + GOOD_SPAN + b"-01"


@pytest.mark.parametrize(
    ("value", "sampled"),
    [(GOOD, True), (GOOD[:-2] + b"00", False), (GOOD[:-2] + b"ff", True), (b"cc" + GOOD[2:], True), (b"cc" + GOOD[2:] + b"-what", True)],
)
def test_a_valid_traceparent_is_taken(value, sampled):
    trace = trace_in([(b"host", b"x"), (b"traceparent", value)])
    assert (trace.id.encode(), trace.parent.encode(), trace.sampled) == (GOOD_ID, GOOD_SPAN, sampled)
    assert trace.answer("ab" * 8) == f"00-{trace.id}-{'ab' * 8}-{'01' if sampled else '00'}"


@pytest.mark.parametrize(
    "value",
    [
        b"", b"00", GOOD.upper(), GOOD + b"-what", GOOD + b"\n", b" " + GOOD, b"ff" + GOOD[2:], GOOD[:-1], GOOD + b"0",
        GOOD.replace(b"-", b"_"),
        b"00-" + b"0" * 32 + b"-" + GOOD_SPAN + b"-01", b"00-" + GOOD_ID + b"-" + b"0" * 16 + b"-01", GOOD.replace(b"4bf9", b"4bg9"),
        b"0g" + GOOD[2:], GOOD[:-2] + b"0x", b"\xff" * 55, b"x" * 10_000, b"cc" + GOOD[2:] + b"what", "٠٠-".encode() + GOOD[3:],
    ],
)  # fmt: skip
def test_any_other_is_not(value):
    first, second = (trace_in([(b"traceparent", value)]) for _ in range(2))
    assert first.id != second.id
    assert {first.parent, first.sampled} == {"", False}
    assert len(first.id) == 32


def test_two_traceparents_are_none():
    assert trace_in([(b"traceparent", GOOD), (b"traceparent", GOOD)]).parent == ""
