"""Which backend 'auto' takes where there is a GPU, where there is none, and where the GPU cannot play the model."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from hasten.backends.cuda import backend as module
from hasten.backends.cuda.backend import INTERPRETED, CudaBackend
from hasten.backends.cuda.kernels.cache import PAGE
from hasten.base import hardware
from hasten.base.errors import UnsupportedError, UserError
from hasten.checkpoint import load
from hasten.engine import backends
from hasten.engine.backends import choose_backend
from hasten.engine.llm import LLM
from hasten.engine.sampling import SamplingParams
from hasten.families import all_families, find_family
from hasten.measure.speed import fit_together, require_room
from hasten.program import Formats
from tests.cli import main
from tests.families.oracles import make_checkpoint
from tests.families.transformer_xl_oracle import random_checkpoint
from tests.gpu.conftest import SHOWN


@pytest.fixture
def small(tmp_path):
    (config,) = (family.examples[0] for family in all_families() if family.name == "llama")
    make_checkpoint(config, tmp_path)
    return load(tmp_path)


@pytest.fixture
def on_gpu(monkeypatch):
    """The interpreter as a device, whose driver shows: for what plays nothing, on a machine with a device too."""
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: True)
    monkeypatch.setattr(module, "find_device", lambda: INTERPRETED)


def test_what_is_hidden_from_other_tests_is_shown_to_these():
    """Unless the user hides it."""
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == SHOWN


@pytest.mark.parametrize("formats", [None, Formats("int8"), Formats("int4", "bf16", "fp8"), Formats("fp8", "fp8")])
def test_the_gpu_is_taken_and_said(small, on_gpu, formats):
    name, notice = choose_backend(small, formats=formats)
    assert name == "cuda"
    assert notice.startswith(f"{small.name} runs on interpreter, compute capability 9.0")


def test_once(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: True)
    if not torch.cuda.is_available():
        monkeypatch.setattr(module, "find_device", lambda: INTERPRETED)
    ran = main(monkeypatch, capsys, "generate", tmp_path, "--token-ids", "7,8", "-n", "2", "--json")
    assert ran.code == 0, ran.err
    assert ran.err.count(f"runs on {CudaBackend().described()}") == 1
    named = main(monkeypatch, capsys, "generate", tmp_path, "--token-ids", "7,8", "-n", "2", "--json", "--backend", "cuda")
    assert named.err == ""
    assert json.loads(named.out)["token_ids"] == json.loads(ran.out)["token_ids"]


def test_without_a_gpu_nobody_asks_for_one(small, monkeypatch):
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: False)
    monkeypatch.setattr(module, "find_device", lambda: pytest.fail("asked"))
    assert choose_backend(small) == ("cpu", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a device here")
def test_a_driver_without_a_device(small, monkeypatch):
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: True)
    name, notice = choose_backend(small)
    assert name == "cpu"
    assert "does not run on the GPU: backend 'cuda' needs an NVIDIA GPU: " in notice


def test_what_the_device_cannot_play_runs_on_the_cpu(small, on_gpu, monkeypatch):
    old = dataclasses.replace(INTERPRETED, capability=(8, 6))
    monkeypatch.setattr(module, "find_device", lambda: old)
    assert choose_backend(small)[0] == "cuda"
    for formats, said in (
        (Formats("fp8"), "8.9 for fp8"), (Formats("fp8", "fp8"), "8.9 for fp8"), (Formats(cache="fp8"), "keeps no fp8 cache"),
    ):  # fmt: skip
        name, notice = choose_backend(small, formats=formats)
        assert name == "cpu"
        assert said in notice
    monkeypatch.setattr(CudaBackend, "free_bytes", lambda self: 1000)
    name, notice = choose_backend(small)
    assert name == "cpu"
    assert "the device has 1,000 free" in notice


def least(model, backend):
    """Bytes of memory in which the backend's plan of an LLM is not refused."""
    (its,) = LLM(model, backend=backend).loads()
    return its.weights + its.arena + its.sequence + its.scored


def test_what_is_planned_and_not_allowed_runs_on_the_cpu(small, on_gpu):
    """The bound that was given is told as the reason."""
    needed, there = least(small, "cpu"), least(small, "cuda")
    assert needed < there
    with pytest.raises(UserError, match="are not enough"):
        LLM(small, backend="cuda", memory=there - 1)
    assert LLM(small, memory=there).backend == "cuda"
    llm = LLM(small, memory=there - 1)
    assert llm.backend == "cpu"
    assert llm.notice.startswith(f"{small.name} does not run on the GPU: {there - 1:,} bytes of memory are not enough")
    assert llm.notice.count("GPU") == 1
    assert llm.memory_plan().total <= there - 1
    assert len(llm.generate([[7, 8]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
    with pytest.raises(UserError, match=f"{needed - 1:,} bytes of memory are not enough"):
        LLM(small, memory=needed - 1)


def test_what_is_planned_and_not_free_runs_on_the_cpu(small, on_gpu, monkeypatch):
    """Although weights and a step of few tokens would fit."""
    (its,), cache = LLM(small, backend="cuda").loads(), 1 << 20
    needed = its.weights + its.arena + cache
    monkeypatch.setattr(CudaBackend, "free_bytes", lambda self: needed)
    assert LLM(small, cache_bytes=cache).backend == "cuda"
    monkeypatch.setattr(CudaBackend, "free_bytes", lambda self: needed - 1)
    assert choose_backend(small)[0] == "cuda"
    llm = LLM(small, cache_bytes=cache)
    assert llm.backend == "cpu"
    assert f"steps of up to 512 tokens take {needed:,}, and {needed - 1:,} are free" in llm.notice
    assert LLM(small, backend="cuda", cache_bytes=cache).backend == "cuda"  # who names it shall have it


def test_a_cache_that_nobody_bounds_takes_what_weights_and_steps_leave(small, monkeypatch):
    backend = CudaBackend(INTERPRETED)
    program = backend.program(small, 256)
    taken = backend.session(small, 256, cache_bytes=1).room.nbytes + backend.weight_bytes(program)
    page, whole = sum(group.bytes_per_token() * PAGE for group in program.states), -(-256 // PAGE)
    counts = []
    for left in (whole * page, 3 * whole * page):
        assert left < (taken + left) // 4
        monkeypatch.setattr(CudaBackend, "free_bytes", lambda self, left=left: taken + left)
        counts += backend.session(small, 256).pages.values()
    assert counts == [whole, 3 * whole]


def test_what_neither_has_kernels_for_says_both(on_gpu, tmp_path):
    from safetensors.numpy import save_file

    full, weights = random_checkpoint(find_family("transfo-xl").examples[0], 0)
    save_file({name: weight.astype("float32") for name, weight in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(full))
    name, notice = choose_backend(load(tmp_path))
    assert name == "reference"
    assert "does not run on the GPU" in notice
    assert "no native kernel for" in notice


def test_a_format_that_nobody_has_is_told_at_once(small, on_gpu):
    with pytest.raises(UnsupportedError, match="int9"):
        choose_backend(small, formats=Formats("int9"))


def test_memory_is_the_devices_where_models_run_there(small, on_gpu, monkeypatch):
    monkeypatch.setattr(hardware, "memory", lambda root: hardware.Memory(None, 0, None, None))
    needed = CudaBackend(INTERPRETED).weight_bytes(CudaBackend(INTERPRETED).program(small))
    monkeypatch.setattr(CudaBackend, "free_bytes", lambda self: 3 * needed)
    monkeypatch.setattr(CudaBackend, "hindrance", lambda *_: "")  # there would be no room for a step
    require_room([small, small, small], "")
    with pytest.raises(UserError, match="4 models side by side take"):
        require_room([small] * 4, "")
    assert fit_together(small, "cuda", [Formats(), Formats()])
    assert not fit_together(small, "cuda", [Formats()] * 3)


@pytest.mark.parametrize(("shows", "blocked"), [(False, False), (True, True)], ids=["no driver's file", "no torch"])
def test_torch_is_not_imported_for_nothing(shows, blocked):
    code = f"""
import sys
if {blocked}: sys.modules["torch"] = None
from hasten.base import hardware
hardware.may_have_gpu = lambda: {shows}
from hasten.checkpoint import load
from hasten.engine.backends import choose_backend
assert choose_backend(load("code-8m")) == ("cpu", "")
assert not sys.modules.get("torch") and "triton" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_both_of_torch_and_triton_are_needed(small, on_gpu, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    assert choose_backend(small) == ("cpu", "")
