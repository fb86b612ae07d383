"""`hasten train`: models from nothing and ones that learn on, text of every kind, and what cannot be."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

from hasten.checkpoint import load, load_directory
from hasten.compress.examples import read_examples
from tests.cli import assert_refused, main

QUICK = ["--tokens", "128", "--sequence", "64", "--eval-tokens", "200", "--threads", "1"]


@pytest.fixture
def hasten(monkeypatch, capsys):
    return lambda *arguments: main(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Two narrow blocks with the bundled model's vocabulary."""
    path = tmp_path_factory.mktemp("spec") / "narrow.json"
    whole = msgspec.to_builtins(load("code-8m").spec)
    for block in whole["blocks"]:
        block["mixer"] |= {"heads": 2, "kv_heads": 1, "head_dim": 16, "value_dim": 16}
        block["mixer"]["position"]["dims"] = 16
        block["feed_forward"]["hidden"] = 48
    path.write_text(json.dumps(whole | {"width": 32, "blocks": whole["blocks"][:2]}))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.mkdir()
    for place in range(3):
        (path / f"{place}.py").write_text(f"def f{place}(x):\n    return x + {place}\n\n" * 30)
    return path


def test_a_model_is_made_of_a_spec(tmp_path, hasten, spec, text):
    out = tmp_path / "out"
    done = hasten("train", spec, out, "--steps", 12, "--rate", "0.02", "--text", text, *QUICK, "--json", "--plot", tmp_path / "loss.svg")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["steps"] == len(facts["losses"]) == 12
    assert facts["first_loss"] > 8.5  # about ln 8192
    assert facts["last_loss"] < facts["first_loss"] - 1
    read = load(out)
    assert read.spec.width == 32
    assert {str(weight.dtype) for weight in read.weights.values()} == {"bfloat16"}
    assert read.tokenizer.encode("def") == load("code-8m").tokenizer.encode("def")
    assert read.provenance[-1].transform == "train"
    assert read.provenance[-1].evidence["steps"] == 12
    assert (tmp_path / "loss.svg").is_file()
    assert not (tmp_path / ".out.work").exists()
    again = hasten("train", out, tmp_path / "on", "--steps", 4, "--rate", "0.002", "--text", text, *QUICK, "--json")
    on = json.loads(again.out)
    assert on["held_out_loss_before"] == facts["held_out_loss_after"]
    assert on["first_loss"] < facts["last_loss"] + 1
    assert len(load(tmp_path / "on").provenance) == 2


def test_from_nothing_keeps_the_layout(tmp_path, hasten, text):
    done = hasten("train", "code-8m", tmp_path / "out", "--from-nothing", "--steps", 1, "--text", text, *QUICK)
    assert done.code == 0, done.err
    assert "1 steps in" in done.out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    made, shipped = load(tmp_path / "out"), load("code-8m")
    assert made.spec == shipped.spec
    assert not np.array_equal(made.weights.array("embedding.weight"), shipped.weights.array("embedding.weight"))


def test_a_killed_training_goes_on_to_the_same_losses(tmp_path, hasten, spec, text):
    asked = ["--steps", 20, "--text", text, *QUICK, "--json"]
    whole = json.loads(hasten("train", spec, tmp_path / "whole", *asked).out)
    command = [sys.executable, "-m", "hasten.cli", "train", spec, tmp_path / "cut", *asked, "--steps", 20]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    state = tmp_path / ".cut.work" / "state.safetensors"
    while not state.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut").exists()
    again = json.loads(hasten("train", spec, tmp_path / "cut", *asked).out)
    assert again["losses"] == whole["losses"]
    one, other = (load(tmp_path / name) for name in ("whole", "cut"))
    assert all(np.array_equal(one.weights.array(name), other.weights.array(name)) for name in one.weights)


def test_answers_are_learned_and_prompts_are_not(tmp_path):
    model = load("code-8m")
    pairs = [("def f(x):", " return x"), ("x = " * 90, "1"), ("", "pass")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in pairs))
    name, examples = read_examples(model, path, 32)
    assert name == str(path)
    tokenizer = model.tokenizer
    assert len(examples) == 3
    for example, (_, answer) in zip(examples, pairs):
        assert list(example.ids[example.learned_from :]) == [*tokenizer.encode(answer, add_special_tokens=False), *model.eos_token_ids[:1]]
        assert len(example.ids) <= 33
    assert examples[0].ids[0] == tokenizer.start_id
    path.write_text(json.dumps({"text": "import os\n" * 9}))
    assert read_examples(model, path, 32)[1][0].learned_from == 1


def test_refusals(tmp_path, hasten, spec, text):
    asked = ["--steps", 1, "--text", text, *QUICK]
    out = tmp_path / "out"
    assert_refused(hasten("train", "code-8m", out, "--steps", 1, "--minutes", 1), "give one")
    assert_refused(hasten("train", "code-8m", out, *asked, "--precision", "fp4"), "--precision is 'fp4'; accepted: auto, float32, bfloat16")
    assert_refused(hasten("train", tmp_path / "none.json", out, *asked), "cannot be read")
    assert_refused(hasten("train", "code-8m", out, *asked, "--tokenizer", "code-8m"), "--tokenizer goes with a .json file")
    assert_refused(hasten("train", "code-8m", out, *asked, "--rate", "0"), "rate is 0.0")
    assert_refused(hasten("train", "code-8m", out, "--minutes", "-1", "--text", text), "teach nothing")
    assert_refused(hasten("train", "random:tinyllama-1.1b", out, *asked), "no tokenizer")
    small = msgspec.convert(json.loads(spec.read_text()), dict) | {"vocab": 100}
    (tmp_path / "small.json").write_text(json.dumps(small))
    assert_refused(hasten("train", tmp_path / "small.json", out, *asked), "ids up to 8191 and the Spec has a vocabulary of 100")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": ""}')
    assert_refused(hasten("train", "code-8m", out, "--steps", 1, "--text", tmp_path / "bad.jsonl"), '"answer": "…"} is needed')
    assert hasten("quantize", "code-8m", tmp_path / "q", "--method", "rtn", "--gate-tokens", 100, "--weights", "int8").code == 0
    assert_refused(hasten("train", tmp_path / "q", out, *asked), "stored quantized")
    (out / "kept").mkdir(parents=True)
    assert_refused(hasten("train", "code-8m", out, *asked), "exists and is not empty")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert dataclasses.is_dataclass(load_directory(tmp_path / "q", "q"))
