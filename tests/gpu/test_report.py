"""What `make gpu` would run, on a small model in the interpreter, and the report it writes."""

import pytest
import torch

from benchmarks import gpu
from hasten.backends.cuda import backend, session
from hasten.backends.cuda.limits import limits
from hasten.checkpoint import load
from hasten.families import all_families
from hasten.measure.latency import Case, open_runner
from tests.families.oracles import make_checkpoint


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A model for which 'cuda' is the interpreter where there is no device."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(backend, "find_device", lambda: backend.INTERPRETED)
    (config,) = (family.examples[0] for family in all_families() if family.name == "llama")
    make_checkpoint(config, tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(("weights", "activations"), [("int8", "bf16"), ("fp8", "fp8")])
def test_latency_beside_the_devices_limits(weights, activations, small, monkeypatch):
    asked = set()
    monkeypatch.setattr(session, "limits", lambda device, arithmetic, read: asked.add(arithmetic) or limits(device, arithmetic, read))
    runner = open_runner(load(small), [Case(1, 2, 1)], backend="cuda", weights=weights, activations=activations)
    found = gpu.latency(runner, 1, 2, 1, repeats=1)
    assert (found.backend, found.isa, found.weights, found.activations, found.cache) == ("cuda", "sm_90", weights, activations, "bf16")
    assert asked == {activations}
    assert found.bytes_per_step > 1000
    assert 0 < found.mbu < 1
    assert 0 < found.mfu < 1
    assert found.read_gb_per_s > 0


def test_determinism(small):
    outcome = gpu.determinism(small, prompts=2, longest=6, new=2)
    assert (outcome.figure, outcome.holds) == ("0 tokens of 12 differ", True)


def test_the_report_has_every_line_and_marks_what_did_not_run():
    report = gpu.table({"idle": gpu.Outcome("7.0 % idle", False), "prefill": "not measured: no time was left"}, "today")
    assert report.count("| not measured |") == len(gpu.LINES) - 2
    assert "| 7.0 % idle | **does not hold** |" in report
    assert "| not measured: no time was left |  |" in report
    kept = gpu.REPORT.read_text("utf-8")
    assert all(f"| {line.check} | {line.asked} |" in kept for line in gpu.LINES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    before = gpu.REPORT.read_bytes()
    assert gpu.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert gpu.REPORT.read_bytes() == before
