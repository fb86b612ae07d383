"""`hasten bench` and what `hasten doctor` says of kernels: keys, bounds, and costs counted by hand."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu.compile import KERNELS
from hasten.backends.cpu.levels import LEVELS, kernels
from hasten.base import hardware
from hasten.base.errors import UserError
from hasten.checkpoint import SHAPES, load
from hasten.engine.stepper import Stepper
from hasten.formats.linear import NUMBERS, LinearFormat
from hasten.measure import latency
from hasten.measure.context import Line, context_points
from hasten.measure.cost import cache_bytes, operations, read_share, weight_elements
from hasten.measure.kernels import WEIGHTS
from hasten.measure.latency import PROFILED, Case, Latency, Repetition, open_runner, repetitions
from hasten.measure.roofline import LEVELS as LADDER
from hasten.measure.roofline import Limits, Slice, instruction
from hasten.program import Batch, lower
from tests.cli import assert_refused, main
from tests.soak.models import model_of

PROMISED = {
    "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "tpot_ms", "bytes_per_step", "mbu", "mfu", "weights", "activations",
    "backend", "isa", "threads", "step_overhead_us",
}  # fmt: skip
TINY = ("--prompt", 16, "--new", 4, "--repeats", 1)
MODEL = load("code-8m")


@pytest.fixture
def hasten(monkeypatch, capsys):
    return lambda *arguments: main(monkeypatch, capsys, *arguments)


def rows_of(outcome):
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


# --- roofline


def test_roofline(hasten):
    outcome = hasten("bench", "roofline", "--bytes", 4 << 20, "--repeats", 2, "--seconds", 0.01, "--json")
    facts = json.loads(outcome.out)
    assert facts["read_bytes"] == 4 << 20
    assert facts["isa"] == _native.isa_level()
    assert facts["threads"] >= 1
    assert min(facts["read_gb_per_s"], facts["bf16_tflops"], facts["int8_tops"]) > 0
    for kind in ("bf16", "int8", "f32"):
        assert facts[f"{kind}_instruction"] == instruction(kind, facts[f"{kind}_isa"])
    assert "GB/s from 4 MiB" in hasten("bench", "roofline", "--bytes", 4 << 20, "--repeats", 1, "--seconds", 0.01).out


@pytest.mark.parametrize("level", _native.available_isas())
@pytest.mark.parametrize("arithmetic", ["bf16", "int8", "f32"])
def test_a_lower_level_is_held_to_its_own_peak(level, arithmetic):
    isa = Limits(1, level, arithmetic, 1).peak_isa
    assert isa in _native.instruction_sets()[arithmetic]
    assert isa.startswith(LADDER[: LADDER.index(level) + 1])
    assert (isa == "generic") == (level == "generic")
    assert Limits(1, level, arithmetic, 1).slice(0.001).peak_tops > 0


def test_limits_are_the_larger_of_two_times():
    limit = Slice(read_gb_per_s=10, peak_tops=2)
    assert limit.seconds(1e9, 0) == pytest.approx(0.1)
    assert limit.seconds(1e9, 1e12) == pytest.approx(0.5)


# --- latency


@pytest.mark.parametrize("weights", NUMBERS)
def test_latency(hasten, weights):
    (row,) = rows_of(hasten("bench", "latency", "code-8m", "--weights", weights, *TINY, "--json"))
    assert row.keys() >= PROMISED
    assert (row["weights"], row["backend"], row["isa"]) == (weights, "cpu", _native.isa_level())
    usual = LinearFormat.parse(weights).activations[0]
    assert row["activations"] == {"f32": "float32"}.get(usual, usual)
    assert all(row[key] > 0 for key in PROMISED - {"weights", "activations", "backend", "isa"})
    assert row["mbu"] == pytest.approx(row["bytes_per_step"] / row["tpot_ms"] / 1e6 / row["read_gb_per_s"])
    assert row["mfu"] == pytest.approx(row["prefill_operations"] / row["ttft_ms"] / 1e9 / row["peak_tops"])
    assert row["tpot_ms"] == pytest.approx(1e3 / row["decode_tokens_per_s"])
    assert row["ttft_ms"] == pytest.approx(16e3 / row["prefill_tokens_per_s"])
    assert row["tape_overhead_us"] <= row["step_overhead_us"]


def test_a_row_for_each_of_several_values(hasten):
    several = ("--weights", "int8,bf16", "--batch", "1,3", "--prompt", "5,9", "--new", 2, "--repeats", 1)
    rows = rows_of(hasten("bench", "latency", "code-8m", *several, "--json"))
    assert [(row["weights"], row["batch"], row["prompt"]) for row in rows] == [
        (weights, batch, prompt) for batch in (1, 3) for prompt in (5, 9) for weights in ("int8", "bf16")
    ]
    assert len({row["bytes_per_step"] for row in rows}) == 8
    table = hasten("bench", "latency", "code-8m", *several).out.splitlines()
    assert len(table) == 1 + 1 + 8
    assert "code-8m, backend cpu" in table[0]


def test_formats_are_timed_in_turn_where_all_fit_in_memory(hasten, monkeypatch):
    order, real = [], latency.Trial.time

    def timed(self):
        order.append(id(self))
        return real(self)

    monkeypatch.setattr(latency.Trial, "time", timed)
    asked = ("bench", "latency", "code-8m", "--weights", "int8,bf16", *TINY, "--repeats", 2, "--json")
    assert "not in turn" not in hasten(*asked).err
    a, b = order[:2]
    assert a != b
    assert order == [a, b, b, a]
    order.clear()
    monkeypatch.setattr(hardware, "memory", lambda *_: hardware.Memory(None, 20 << 20, None, None))
    done = hasten(*asked)
    assert "not in turn" in done.err
    assert [row["weights"] for row in rows_of(done)] == ["int8", "bf16"]
    assert order[0] == order[1]
    assert order[2] == order[3]


@pytest.mark.parametrize(
    ("asked", "played"), [((), ("float32", "float32")), (("--weights", "fp8", "--activations", "fp8"), ("fp8", "fp8"))]
)
def test_latency_of_the_reference(asked, played, hasten):
    (row,) = rows_of(hasten("bench", "latency", "code-8m", "--backend", "reference", *asked, *TINY, "--json"))
    assert row.keys() >= PROMISED
    assert (row["backend"], row["weights"], row["activations"], row["step_overhead_us"]) == ("reference", *played, None)
    assert row["mbu"] == pytest.approx(row["bytes_per_step"] / row["tpot_ms"] / 1e6 / row["read_gb_per_s"])


def test_a_forced_level_and_one_thread(hasten):
    (row,) = rows_of(hasten("bench", "latency", "code-8m", "--isa", "generic", "--threads", 1, *TINY, "--json"))
    assert (row["isa"], row["threads"], row["peak_isa"]) == ("generic", 1, "generic")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch", "0"), ("batch is '0'", "1 or more")),
        (("--batch", "1,,2"), ("batch is '1,,2'",)),
        (("--prompt", "x"), ("prompt is 'x'",)),
        (("--prompt", "-3"), ("prompt is '-3'",)),
        (("--prompt", "99999"), ("code-8m accepts up to",)),
        (("--weights", "bf16,int9"), ("int9", "accepted are")),
        (("--weights", "int8", "--activations", "bf32"), ("bf32", "accepted")),
        (("--weights", "fp8", "--activations", "fp8", "--backend", "cpu"), ("fp8 have no kernels here", "--backend cuda", "reference")),
        (("--cache", "int1"), ("int1", "accepted")),
        (("--backend", "tpu"), ("tpu",)),
        (("--isa", "sse9"), ("sse9", "accepted")),
        (("--threads", 4096), ("threads is 4096",)),
    ],
)
def test_wrong_arguments_to_latency(hasten, arguments, said):
    assert_refused(hasten("bench", "latency", "code-8m", *TINY[2:], *arguments), *said)


def test_wrong_arguments_to_the_others(hasten):
    assert_refused(hasten("bench", "ops", "--shape", "no-such"), "no-such", "shapes are")
    assert_refused(hasten("bench", "ops", "--only", "fly"), "only is 'fly'", "linear")
    assert_refused(hasten("bench", "ops", "--isa", "sse9"), "sse9")
    assert_refused(hasten("bench", "roofline", "--bytes", 4 << 20, "--threads", 4096), "threads")
    assert_refused(hasten("bench", "roofline", "--bytes", 4 << 20, "--seconds", 0), "seconds")
    assert hasten("bench", "latency", "code-8m", "--new", 0).code == 2


@pytest.mark.parametrize("cache", ["bf16", "int8", "fp8"])
def test_a_runner_counts_the_bytes_of_its_cache(cache):
    case = Case(batch=1, prompt=16, new=4)
    runner = open_runner(MODEL, [case], cache=cache, threads=1)
    (group,) = runner.program.states
    rows = {"bf16": 2 * 64, "int8": 64 + 2, "fp8": 64 + 2}
    assert runner.cache == cache
    assert runner.bytes_per_step(case)[1] == round(2 * group.layers * group.kv_heads * rows[cache] * (17 + 20) / 2)


def test_medians_are_taken_within_repetitions():
    """A machine that halves its speed halves the limit too, so the shares stay."""
    case = Case(batch=2, prompt=16, new=4)
    runner = open_runner(MODEL, [case], weights="int8", threads=1)
    step_bytes = runner.bytes_per_step(case)[0]
    prefill = operations(runner.program, [0, 0], 16, 2)
    repeats = [
        Repetition(ttft_s=slow, tpot_s=slow, limit=Slice(2 * step_bytes / slow / 1e9, 4 * prefill / slow / 1e12),
                   step_overhead_us=(slow,), tape_overhead_us=(slow / 2,))
        for slow in (1.0, 2.0, 8.0)
    ]  # fmt: skip
    row = Latency.of(runner, case, repeats)
    assert (row.mbu, row.mfu) == (pytest.approx(0.5), pytest.approx(0.25))
    assert (row.ttft_ms, row.tpot_ms, row.decode_tokens_per_s) == (2000.0, 2000.0, 1.0)
    assert (row.step_overhead_us, row.tape_overhead_us) == (2.0, 1.0)


def test_repetitions_time_what_they_say():
    case = Case(batch=2, prompt=8, new=3)
    runner = open_runner(MODEL, [case], threads=1)
    played = [each for (each,) in repetitions([runner], case, 2)]
    assert len(played) == 2
    for each in played:
        assert len(each.step_overhead_us) == PROFILED
        assert each.tpot_s > 0
        assert each.ttft_s > 0


def test_random_weights_may_run_past_their_context_unless_positions_are_a_table():
    with pytest.raises(UserError, match="code-8m accepts up to"):
        open_runner(MODEL, [Case(1, MODEL.spec.context, 1)])
    with pytest.raises(UserError, match="random:gpt2 accepts up to 1024"):
        open_runner(load("random:gpt2"), [Case(1, 1024, 1)], backend="reference")


# --- context


def test_context(hasten):
    # In a process of its own, for the memory of this one grows and shrinks with other tests.
    command = [sys.executable, "-m", "hasten.cli", "bench", "context", "code-8m", "--context", "700,9,100,1000", "--steps", "1"]
    out = subprocess.run([*command, "--weights", "int8", "--json"], capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["context"] for row in rows] == [9, 100, 700, 1000]
    (group,) = lower(MODEL.spec, cache="bfloat16").states
    for row in rows:
        assert row["cache_bytes"] == group.bytes_per_token() * 16 * -(-(row["context"] + 1) // 16)
        assert row["planned_bytes"] == row["weight_bytes"] + row["arena_bytes"] + row["cache_bytes"]
        assert row["resident_bytes"] > row["weight_bytes"] / 2
        assert row["tpot_ms"] > 0
    assert len({row["weight_bytes"] for row in rows}) == len({row["arena_bytes"] for row in rows}) == 1
    table = hasten("bench", "context", "code-8m", "--context", "5,6,7", "--steps", 1).out
    assert "a step takes" in table
    assert "R² " in table


def test_a_grown_sequence_has_keys_everywhere(monkeypatch):
    """A page left out would hold zeros, or nothing of its own to read."""
    runner = open_runner(MODEL, [Case(1, 900, 1)], threads=1)
    taken = {}
    start = Stepper.start

    def noted(stepper, sequences):
        taken["stepper"], taken["state"] = stepper, start(stepper, sequences)
        return taken["state"]

    monkeypatch.setattr(Stepper, "start", noted)
    assert len([*context_points(runner, [20, 600, 900], 1, None)]) == 3
    (pages,) = taken["state"].sequences[0].pages.tables
    assert len(pages) == -(-901 // 16) == len({*pages})
    logits, _ = taken["stepper"].step(Batch.of([[1]], [901]), taken["state"])
    assert np.isfinite(logits).all()


def test_a_window_does_not_grow():
    with pytest.raises(UserError, match="random window: .* sees all positions"):
        next(context_points(open_runner(model_of("window"), [Case(1, 50, 1)], threads=1), [5, 20, 40], 1, None))


def test_a_line_through_points():
    line = Line.through([1, 2, 4], [3.0, 5.0, 9.0])
    assert (line.at_zero, line.slope, line.r2) == (pytest.approx(1), pytest.approx(2), pytest.approx(1))
    assert line.worst == pytest.approx(0, abs=1e-12)
    bent = Line.through([1, 2, 3, 4], [1.0, 4.0, 9.0, 16.0])
    assert bent.r2 < 0.99
    assert bent.worst == pytest.approx(1.0)  # 0 where 1 was measured
    with pytest.raises(UserError, match="three points"):
        Line.through([1, 2, 2], [3.0, 5.0, 9.0])


def test_wrong_arguments_to_context(hasten):
    assert_refused(hasten("bench", "context", "code-8m", "--context", "5,6"), "context is '5,6'", "three")
    assert_refused(hasten("bench", "context", "code-8m", "--context", "1,2,99999"), "code-8m accepts up to")
    assert_refused(hasten("bench", "context", "random:gemma-3-1b", "--context", "1,2,3", "--weights", "int9"), "int9")


# --- what is counted


def test_costs_by_hand():
    config = SHAPES["tinyllama-1.1b"]
    program = lower(load("random:tinyllama-1.1b").spec, cache="bfloat16")
    width, inner, layers, kv = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], 4 * 64
    body = layers * (2 * width * width + 2 * width * kv + 3 * width * inner)
    head = config["vocab_size"] * width
    attention = layers * 32 * 2 * (64 + 64)  # for each query and key
    assert operations(program, [0], 5, 1) == 2 * body * 5 + 2 * head + attention * (1 + 2 + 3 + 4 + 5)
    assert operations(program, [9, 4], 1, 2) == 2 * (2 * body + 2 * head) + attention * (10 + 5)
    assert cache_bytes(program, [9, 4]) == layers * 2 * kv * 2 * (10 + 5)
    assert weight_elements(program) == body + head + (2 * layers + 1) * width
    assert read_share(program, 1) == 1


def test_costs_under_a_window_and_of_experts():
    program = lower(load("random:mistral-7b").spec)
    (group,) = program.states
    assert cache_bytes(program, [10_000]) == group.bytes_per_token() * 4096
    program = lower(load("random:mixtral-8x7b").spec)
    experts, others = 8 * 3 * 4096 * 14336 * 32, weight_elements(program) - 8 * 3 * 4096 * 14336 * 32 - 65 * 4096
    assert read_share(program, 1) == pytest.approx((experts * 2 / 8 + others) / (experts + others))
    assert read_share(program, 200) == pytest.approx(1)
    assert operations(program, [0], 1, 1) == pytest.approx(2 * (experts * 2 / 8 + others), rel=1e-4)


def test_bytes_per_step_are_those_at_the_mean_context():
    case = Case(batch=3, prompt=10, new=5)
    runner = open_runner(MODEL, [case], weights="int8", threads=1)
    per_token = sum(group.bytes_per_token() for group in runner.program.states)
    assert runner.bytes_per_step(case) == (runner.weight_bytes + 3 * per_token * 13, 3 * per_token * 13)  # 11, 12, 13, 14, 15


# --- kernels


def test_ops(hasten):
    quick = ("--rows", "1,17", "--context", 20, "--bytes", 1 << 20, "--threads", 1)
    rows = rows_of(hasten("bench", "ops", *quick, "--only", "rms_norm,to_bf16,quantize_rows,rotate,append_kv,attend,add,embed", "--json"))
    assert {row["op"] for row in rows} == {"rms_norm", "to_bf16", "quantize_rows", "rotate", "append_kv", "attend", "add", "embed"}
    for row in rows:
        assert min(row["us"], row["bytes"], row["of_limit"], row["gb_per_s"]) > 0
        assert math.isfinite(row["of_limit"])
        assert row["rows"] in {1, 17}
        assert (row["context"] == 20) == (row["op"] == "attend")
        assert row["bound"] in {"read", "peak"}


def test_ops_of_a_linear_layer(hasten):
    quick = ("--shape", "smollm2-135m", "--rows", "1", "--context", 20, "--bytes", 1, "--only", "linear")
    rows = rows_of(hasten("bench", "ops", *quick, "--json"))
    assert {row["format"] for row in rows} == {f"{weights} × {activations}" for weights, activations in WEIGHTS}
    assert "576x1536" in {row["shape"] for row in rows}
    for row in rows:
        out, width = map(int, row["shape"].split("x"))
        assert row["operations"] == 2 * out * width
        assert row["bytes"] > out * width / 2


# --- doctor


def test_doctor_tells_the_kernel_of_every_op_and_format(hasten):
    facts = json.loads(hasten("doctor", "--no-measure", "--json").out)["kernels"]
    assert {fact["op"] for fact in facts} == {op.__name__ for op in KERNELS}
    assert {fact["format"] for fact in facts if fact["op"] == "Linear"} == set(NUMBERS)
    best, refusals = _native.isa_level(), _native.isa_refusals()
    for fact in facts:
        assert LADDER.index(fact["level"]) <= LADDER.index(best)
        assert fact["level"] in LEVELS[fact["op"]][fact["format"]]
        for level, reason in fact["refused"].items():
            assert LADDER.index(level) > LADDER.index(fact["level"])
            assert reason == refusals[level] != ""
    lines = hasten("doctor", "--no-measure").out.splitlines()
    told = [line for line in lines if line.startswith("kernel ")]
    assert len(told) == len({(fact["level"], *fact["refused"].items()) for fact in facts})
    for fact in facts:  # each once, on a line of its own level and reasons
        (line,) = (line for line in told if re.search(rf"\b{fact['op']} (\S+\|)?{re.escape(fact['format'])}(\||,|$)", line))
        assert line.startswith(f"kernel    {fact['level']}")
        assert all(reason in line for reason in fact["refused"].values())


def test_a_forced_level_is_named_as_the_reason():
    for kernel in kernels("generic"):
        assert kernel.level == "generic"
        assert set(kernel.refused) == set(LEVELS[kernel.op][kernel.format]) - {"generic"}
        for level, reason in kernel.refused.items():
            assert reason == (_native.isa_refusals()[level] or "generic was asked for")
