"""The native extension on the machine at hand: its features against the kernel's own list, and each roofline kernel it can run."""

import math
import os
import threading
import time
from pathlib import Path

import pytest

from hasten import _native
from hasten.base import hardware

MIB = 1 << 20
CPUINFO = Path("/proc/cpuinfo")
CORES = hardware.detect().cpu.affinity
PEAKS = {"bf16": _native.bf16_peak, "int8": _native.int8_peak, "f32": _native.f32_peak}
EVERY_PEAK = [(kind, isa) for kind in PEAKS for isa in _native.instruction_sets()[kind]]


def cpuinfo(key):
    """The value of `key` for the first processor in /proc/cpuinfo; "" where it has no such line."""
    for line in CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


@pytest.mark.skipif(not CPUINFO.exists(), reason="no /proc/cpuinfo to compare with")
def test_features_are_those_that_the_kernel_lists():
    flags = cpuinfo("flags").split()
    kernels_name = {"avx512_vbmi": "avx512vbmi"}
    found = _native.cpu_features()
    assert len(found) == 15
    assert found == {name: kernels_name.get(name, name) in flags for name in found}


@pytest.mark.skipif(not (CPUINFO.exists() and cpuinfo("vendor_id")), reason="the kernel names no processor")
def test_names_are_those_that_the_kernel_gives():
    assert _native.cpu_vendor() == cpuinfo("vendor_id")
    assert " ".join(_native.cpu_brand().split()) == " ".join(cpuinfo("model name").split())


def test_amx_is_granted_only_where_there_is_amx_and_stays():
    granted = _native.amx_granted()
    assert granted == _native.amx_granted()
    assert _native.cpu_features()["amx_tile"] or not granted


def test_detect_describes_this_machine():
    machine = hardware.detect()
    assert machine.cpu.features == {name for name, present in _native.cpu_features().items() if present}
    assert 1 <= machine.cpu.cores <= machine.cpu.affinity <= os.cpu_count()
    if machine.memory.total is not None:
        assert 0 < machine.memory.available <= machine.memory.total


def test_instruction_sets_follow_the_features():
    features = _native.cpu_features()
    lists = _native.instruction_sets()
    assert set(lists) == {"read", *PEAKS}
    for isas in lists.values():
        assert isas[-1] == "generic"
        assert all(features[isa] for isa in isas[:-1])
    assert ("amx_bf16" in lists["bf16"]) == (features["amx_bf16"] and _native.amx_granted())


@pytest.mark.parametrize(("kind", "isa"), EVERY_PEAK)
def test_every_peak_kernel_sums_right_and_is_sane(kind, isa):
    rate, used = PEAKS[kind](1, 0.02, isa)  # A kernel whose sum is not exact raises.
    assert used == isa
    assert 0.0001 < rate < 100


@pytest.mark.parametrize("isa", _native.instruction_sets()["read"])
@pytest.mark.parametrize("extra", [0, 4097])
def test_every_read_kernel_sums_right_and_is_sane(isa, extra):
    rate, used = _native.streaming_read(4 * MIB + extra, 1, 3, isa)
    assert used == isa
    assert 0.1 < rate < 2000


def test_the_best_instruction_set_is_the_default():
    for kind, peak in PEAKS.items():
        assert peak(1, 0.01)[1] == _native.instruction_sets()[kind][0]
    assert _native.streaming_read(MIB, 1, 1)[1] == _native.instruction_sets()["read"][0]


@pytest.mark.skipif("amx_int8" not in _native.instruction_sets()["int8"], reason="needs AMX")
def test_amx_is_worth_its_tiles():
    assert _native.int8_peak(1, 0.05, "amx_int8")[0] > 2 * _native.int8_peak(1, 0.05, "avx512_vnni")[0]
    assert _native.bf16_peak(1, 0.05, "amx_bf16")[0] > 2 * _native.f32_peak(1, 0.05)[0]


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
@pytest.mark.parametrize("kind", PEAKS)
def test_two_threads_give_the_total_of_both(kind):
    ratios = []
    for _ in range(5):  # Another program on one of the cores takes half of it at worst; a rate per thread, or one thread, would show 1.
        ratios.append(PEAKS[kind](2, 0.05)[0] / PEAKS[kind](1, 0.05)[0])
        if 1.2 < ratios[-1] < 2.8:
            return
    pytest.fail(f"two threads reach {ratios} times the rate of one")


def test_measure_roofline_measures():
    threads = min(2, CORES)
    roofline = hardware.measure_roofline(threads, read_bytes=32 * MIB, repeats=3, seconds=0.05)
    rates = [roofline.read_gb_per_s, roofline.bf16_tflops, roofline.int8_tops, roofline.f32_tflops]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert roofline.threads == threads
    assert roofline.bf16_isa == _native.instruction_sets()["bf16"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "bytes is 0; accepted: 1048576 to "),
        ((-MIB, 1, 1), "bytes is -1048576; accepted"),
        ((MIB - 1, 1, 1), "bytes is 1048575; accepted"),
        ((1 << 50, 1, 1), "bytes is 1125899906842624; accepted"),
        ((10**30, 1, 1), "bytes is 1000000000000000000000000000000; accepted"),
        ((MIB, 0, 1), f"threads is 0; accepted: 1 to {CORES} "),
        ((MIB, -1, 1), "threads is -1; accepted"),
        ((MIB, CORES + 1, 1), f"threads is {CORES + 1}; accepted"),
        ((MIB, 10**30, 1), "threads is 1000000000000000000000000000000; accepted"),
        ((MIB, 1, 0), "repeats is 0; accepted: 1 to 100 "),
        ((MIB, 1, 101), "repeats is 101; accepted"),
        ((MIB, 1, 1, "sse9"), "isa is 'sse9'; this machine accepts best, "),
    ],
)
def test_streaming_read_refuses(arguments, message):
    with pytest.raises(ValueError) as caught:
        _native.streaming_read(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PEAKS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1), "threads is 0; accepted"),
        ((CORES + 1, 0.1), f"threads is {CORES + 1}; accepted"),
        ((1, 0.0), "seconds is 0.0; accepted: above 0, at most 60"),
        ((1, -1.0), "seconds is -1.0; accepted"),
        ((1, math.nan), "seconds is nan; accepted"),
        ((1, math.inf), "seconds is inf; accepted"),
        ((1, 60.1), "seconds is 60.1; accepted"),
        ((1, 0.1, ""), "isa is ''; this machine accepts best, "),
    ],
)
def test_peaks_refuse(kind, arguments, message):
    with pytest.raises(ValueError) as caught:
        PEAKS[kind](*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.timed
@pytest.mark.parametrize(
    "measure", [*(lambda peak=peak: peak(1, 0.3) for peak in PEAKS.values()), lambda: _native.streaming_read(64 * MIB, 1, 60)]
)
def test_python_runs_on_while_it_measures(measure):
    span = []

    def work():
        span.append(time.perf_counter())
        measure()
        span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.002)
    worker.join()
    start, end = span
    assert sum(start < tick < end for tick in ticks) >= 10
