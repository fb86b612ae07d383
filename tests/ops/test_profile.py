"""Profiling a native step: the same step, and times that add up."""

import time

import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu import CpuBackend
from hasten.base import hardware
from hasten.checkpoint import load
from hasten.engine.stepper import Stepper
from hasten.program import Batch, Formats

MODEL = load("code-8m")
IDS = np.random.default_rng(0).integers(0, MODEL.spec.vocab, 700).tolist()


@pytest.fixture(scope="module", params=range(1, min(2, hardware.detect().cpu.cores) + 1))
def session(request):
    return Stepper(CpuBackend(threads=request.param).session(MODEL, 1024)), request.param


def test_a_profiled_step_is_the_same_step(session):
    session, _ = session
    batch = Batch.of([IDS[:30], IDS[30:35]], rows="last")
    plain, state = session.step(batch, session.start(2))
    profiled, after, _ = session.profile(batch, session.start(2))
    assert np.array_equal(plain, profiled)
    assert [sequence.length for sequence in after.sequences] == [sequence.length for sequence in state.sequences] == [30, 5]


def test_the_sums_are_consistent(session):
    session, threads = session
    state = session.start(1)
    _, state, _ = session.profile(Batch.of([IDS[:64]], rows="last"), state)
    began = time.perf_counter_ns()
    _, _, profile = session.profile(Batch.of([IDS[64:65]], [64], rows="last"), state)
    outside = time.perf_counter_ns() - began
    assert profile.op_ns.shape == (session.session.compiled.tape.ops, threads)
    assert (profile.op_ns >= 0).all()
    assert profile.op_ns.sum() > 0
    assert profile.kernel_ns == profile.op_ns.sum(axis=0).max()
    assert profile.kernel_ns <= profile.tape_ns <= profile.step_ns <= outside
    assert profile.overhead_ns == profile.step_ns - profile.kernel_ns > 0
    # No thread may leave an op before all have: the ops' slowest threads one after another fit into the step too.
    assert profile.op_ns.max(axis=1).sum() <= profile.tape_ns


def test_every_op_has_its_name(session):
    session, _ = session
    names = session.session.compiled.tape.op_names
    assert len(names) == session.session.compiled.tape.ops
    layers, head = MODEL.spec.blocks, f"linear {MODEL.spec.vocab}x{MODEL.spec.width}"
    assert names[-1] == head
    parts = [part for name in names for part in name.split(" + ")]
    assert parts.count("attend") == parts.count("append_kv") == len(layers)
    assert {"embed", "rotary_table", "rms_norm", "to_bf16", "rotate", "add", "gate", "select_rows"} <= set(parts)
    assert all(names)


def test_the_name_tells_how_rows_are_fed():
    names = " ".join(CpuBackend(threads=1).session(MODEL, 64, Formats("int8")).compiled.tape.op_names)
    assert "quantize_rows" in names
    assert "to_bf16" not in names


def test_a_long_batch_is_added_up(session):
    session, _ = session
    _, _, long = session.profile(Batch.of([IDS], rows="last"), session.start(1))
    _, _, short = session.profile(Batch.of([IDS[:10]], rows="last"), session.start(1))
    assert long.op_ns.shape == short.op_ns.shape
    assert long.kernel_ns > 5 * short.kernel_ns
    assert long.kernel_ns <= long.tape_ns <= long.step_ns


def test_profile_refuses_what_run_refuses():
    tape = _native.Tape(_native.ThreadPool(1), "generic", 64, 8, 10, 16)
    step = [np.array([10], np.int32), np.zeros(1, np.int32), np.array([0, 1], np.int32), np.zeros(0, np.int32), [_native.PageTable([])],
            np.empty((0, 10), np.float32)]  # fmt: skip
    op_ns = np.zeros((0, 1), np.int64)
    for play in (tape.run, lambda *arguments: tape.profile(*arguments, op_ns)):
        with pytest.raises(ValueError, match="token id 10 is outside the vocabulary"):
            play(*step)
    step[0] = np.array([9], np.int32)
    wall_ns, clock_ns = tape.profile(*step, op_ns)
    assert wall_ns >= 0
    assert clock_ns == 0
    with pytest.raises(ValueError, match="op_ns must be"):
        tape.profile(*step, np.zeros((1, 1), np.int64))


def test_every_level_is_refused_with_its_reason_or_runs():
    refusals = _native.isa_refusals()
    assert list(refusals) == ["generic", "avx2", "avx512", "amx"]
    assert refusals["generic"] == ""
    assert [level for level, reason in refusals.items() if not reason][::-1] == _native.available_isas()
    for level, reason in refusals.items():
        lacking = [name for name, there in _native.cpu_features().items() if not there and name in reason.replace(",", " ").split()]
        assert lacking or not reason.startswith("this machine lacks"), (level, reason)
