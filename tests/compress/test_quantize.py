"""`hasten quantize` and `hasten apply` on the bundled model: what is written is smaller, as good as said, and nothing else is left."""

import dataclasses
import json

import numpy as np
import pytest

from hasten.base.errors import CheckpointError, UserError
from hasten.checkpoint import load
from hasten.compress import gates
from hasten.compress.evidence import Gate
from hasten.compress.gates import GateError, check_written, require_loss, require_smaller, save_checked
from hasten.compress.make import Calibration, make
from hasten.compress.recipe import recipe_of
from hasten.compress.walk import Run
from hasten.engine.backends import choose_backend, choose_judge
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weights
from hasten.measure import cut_windows, held_out
from hasten.measure.compare import Comparison, compare, even_windows
from hasten.program import Formats
from tests.cli import main

QUICK = ["--samples", "8", "--sequence", "64", "--gate-tokens", "2000", "--no-speed"]


@pytest.fixture
def hasten(monkeypatch, capsys):
    return lambda *arguments: main(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    ("method", "weights", "share"),
    [
        ("rtn", "int3-g64", 0.24),
        ("gptq", "int4-g64", 0.30),
        ("awq", "int4-g64-zp", 0.31),
        ("smoothquant", None, 0.51),
        ("rotate", "int4-g64", 0.30),
        ("codebook", None, 0.30),
        ("best", "int4-g32", 0.33),
    ],
)
def test_every_method_writes_what_loads_and_is_smaller(method, weights, share, tmp_path, hasten):
    out = tmp_path / "out"
    asked = ["--skip", "blocks.[2-7].*", *(["--weights", weights] if weights else [])]
    done = hasten("quantize", "code-8m", out, "--method", method, *asked, *QUICK, "--json", "--max-loss", "20")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["smaller_share"] < share
    assert abs(facts["loss"] / facts["base_loss"] - 1) < 0.2
    assert 0 < facts["kl"] < 0.3
    assert 0.8 < facts["agreement"] <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no work, no trial
    read = load(out)
    stored = {name: weight for name, weight in read.weights.items() if isinstance(weight, QuantizedWeight)}
    assert len(stored) == 14
    assert {weight.activations for weight in stored.values()} == {"int8" if method in {"smoothquant", "rotate"} else "bf16"}
    assert [step.transform for step in read.provenance][-1] == "measured"
    assert read.provenance[-1].evidence["loss"] == facts["loss"]
    # the same figure from the model as it is on disk
    (found,) = compare(load("code-8m"), [read], even_windows(cut_windows(read, held_out(), 512), 2000), 512)
    assert found.loss == facts["loss"]
    assert found.base_loss == facts["base_loss"]


def test_activations_in_fp8_are_written_as_what_they_are(tmp_path, hasten):
    asked = ["--method", "rtn", "--weights", "fp8", "--activations", "fp8", "--skip", "blocks.[1-7].*"]
    done = hasten("quantize", "code-8m", tmp_path / "out", *asked, *QUICK)
    assert done.code == 0, done.err
    (group,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"].values()
    inputs = group["input_activations"]
    assert (inputs["type"], inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == ("float", 8, "token", True)
    stored = [weight for weight in load(tmp_path / "out").weights.values() if isinstance(weight, QuantizedWeight)]
    assert [(str(weight.form), weight.activations) for weight in stored] == 7 * [("fp8", "fp8")]


def test_a_model_fed_fp8_is_judged_as_it_is_meant():
    """By the reference, for the native backend, which plays it and says so, would feed it bf16."""
    model = load("code-8m")
    name = "blocks.0.mixer.q.weight"

    def storing(activations):
        stored = QuantizedWeight.from_array(model.weights[name].load(), LinearFormat.parse("fp8"), activations)
        return dataclasses.replace(model, weights=Weights({**model.weights, name: stored}))

    assert choose_backend(storing("fp8"))[0] == choose_judge(storing("bf16")) == "cpu"
    assert choose_judge(storing("fp8")) == "reference"
    assert "meant to be fed fp8" in choose_backend(storing("fp8"))[1]
    assert not choose_backend(storing("bf16"))[1]
    assert not choose_backend(storing("fp8"), formats=Formats("fp8", "bf16"))[1]


def test_a_recipe_is_applied(tmp_path, hasten):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- rtn: {weights: int8, layers: ['blocks.*.mixer.*']}\n- gptq: {weights: int4-g64, layers: ['blocks.0.feed*']}\n")
    done = hasten("apply", recipe, "code-8m", tmp_path / "out", *QUICK)
    assert done.code == 0, done.err
    assert "held-out loss" in done.out
    assert "read back from disk" in done.out
    forms = {name: str(weight.form) for name, weight in load(tmp_path / "out").weights.items() if isinstance(weight, QuantizedWeight)}
    assert len(forms) == 8 * 4 + 3
    assert set(forms.values()) == {"int8", "int4-g64"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "magic"], "accepted: rtn, gptq"),
        (["--weights", "int5"], "int5"),
        (["--weights", "bf16"], "not rounded"),
        (["--activations", "int4"], "activations"),
        (["--skip", "blocks.99.*"], "mean no weight"),
        (["--sequence", "4000"], "sequence"),
        (["--text", "/nowhere"], "no file or folder"),
    ],
)
def test_mistakes_are_told_before_anything_begins(options, said, tmp_path, hasten):
    done = hasten("quantize", "code-8m", tmp_path / "out", *options)
    assert done.code == 2
    assert said in done.err
    assert not list(tmp_path.iterdir())


def test_a_result_that_is_too_bad_is_not_kept(tmp_path, hasten):
    command = ["quantize", "code-8m", tmp_path / "out", "--method", "rtn", "--weights", "int2", *QUICK]
    done = hasten(*command)
    assert done.code == 2
    assert "5.00% are allowed" in done.err
    assert not (tmp_path / "out").exists()
    done = hasten(*command, "--even-if-worse")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_is_taken_is_left(tmp_path, hasten):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    done = hasten("quantize", "code-8m", out, "--method", "rtn")
    assert done.code == 2
    assert "not empty" in done.err
    assert (out / "mine").read_text() == "kept"


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    recipe = recipe_of([{"rtn": {"weights": "int8"}}])
    run = Run(tmp_path_factory.mktemp("work") / "work", 2)
    return make(
        load("code-8m"), recipe, tmp_path_factory.mktemp("out") / "out", calibration=Calibration(), gate=Gate(tokens=1000), run=run
    ).model  # fmt: skip


def test_what_is_read_back_otherwise_is_not_kept(rounded, tmp_path, monkeypatch):
    real = gates.load_directory

    def other(directory, name):
        read = real(directory, name)
        weights = dict(read.weights)
        weights["blocks.3.mixer.q.weight"] = weights["blocks.3.mixer.o.weight"]
        return type(read)(read.name, read.spec, type(read.weights)(weights))

    monkeypatch.setattr(gates, "load_directory", other)
    with pytest.raises(CheckpointError, match=r"blocks\.3\.mixer\.q"):
        save_checked(rounded, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_read_back_as_it_was_is_kept(rounded, tmp_path):
    save_checked(rounded, tmp_path / "out")
    check_written(rounded, load(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="not empty"):
        save_checked(rounded, tmp_path / "out")
    (tmp_path / ".out.1234.trial").mkdir()  # of one that was killed
    (tmp_path / "..out.1234.trial.5678").mkdir()  # of one that was killed while it saved
    save_checked(rounded, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_layer_that_got_no_smaller_is_an_error(rounded):
    shrunk = require_smaller(load("code-8m"), rounded)
    assert shrunk.what == "rounded weights"
    assert shrunk.after / shrunk.before < 0.51
    with pytest.raises(GateError, match="no smaller"):
        require_smaller(rounded, rounded)
    with pytest.raises(GateError, match="nothing to save"):
        require_smaller(load("code-8m"), load("code-8m"))


def test_losses_over_the_limit_and_losses_that_are_no_number_are_refused():
    require_loss(Comparison(2.0, 2.1, 0, 1, 10), 0.051)
    for loss in (2.2, float("nan")):
        with pytest.raises(GateError, match="allowed"):
            require_loss(Comparison(2.0, loss, 0, 1, 10), 0.05)


def test_a_model_compared_with_itself_is_the_same(rounded):
    windows = cut_windows(rounded, held_out(), 64, 500)
    (found,) = compare(rounded, [rounded], windows, 64)
    assert found.tokens == windows.tokens == 500
    assert found.kl == 0
    assert found.agreement == 1
    assert found.loss == found.base_loss
    assert np.isfinite(found.loss)


def test_too_little_memory_is_told_first(tmp_path, monkeypatch):
    from hasten.base import hardware

    monkeypatch.setattr(hardware, "memory", lambda root: hardware.Memory(None, 1 << 20, None, None))
    run = Run(tmp_path / "work", 2)
    with pytest.raises(UserError, match="GiB are free"):
        make(load("code-8m"), recipe_of(["gptq"]), tmp_path / "out", calibration=Calibration(samples=4), gate=Gate(), run=run)
    assert not list(tmp_path.iterdir())
