"""What must work, and what must be said, where torch is not installed."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from hasten.families import find_family
from tests.families.transformer_xl_oracle import random_checkpoint

BLOCKED = "import sys; sys.modules['torch'] = None; from hasten.cli import main; main()"


def hasten(*arguments):
    return subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [("inspect", "code-8m", "--json"), ("doctor", "--no-measure", "--json")])
def test_works(arguments):
    result = hasten(*arguments)
    assert result.returncode == 0, result.stderr
    json.loads(result.stdout)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_generates_and_evaluates_natively(weights):
    result = hasten("generate", "code-8m", "-p", "import os\n", "-n", "5", "--weights", weights, "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["token_ids"]) == 5
    result = hasten("eval", "code-8m", "--limit", "600", "--weights", weights, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["backend"] == "cpu"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "code-8m", "-p", "x", "--backend", "reference"),
        ("eval", "code-8m", "--limit", "10", "--backend", "reference"),
    ],
)
def test_names_the_extra_to_install(arguments):
    result = hasten(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert "hasten[torch]" in line
    assert "reference" in line


def test_cuda_names_its_extra():
    result = hasten("generate", "code-8m", "-p", "x", "--backend", "cuda")
    assert (result.returncode, result.stdout) == (2, "")
    assert "hasten[cuda]" in result.stderr.splitlines()[-1]
    assert "hasten[cuda]" in json.loads(hasten("doctor", "--no-measure", "--json").stdout)["backends"]["cuda"]


def test_a_model_that_needs_reference_names_the_extra_too(tmp_path):
    """Transformer-XL, whose relative attention has no native kernel, written without torch."""
    full, weights = random_checkpoint(find_family("transfo-xl").examples[0], 0)
    save_file({name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(full))
    result = hasten("generate", str(tmp_path), "--token-ids", "1", "-n", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert "AttendRelative" in result.stderr
    assert "hasten[torch]" in result.stderr.splitlines()[-1]
