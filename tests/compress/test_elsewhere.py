"""What several formats in one checkpoint mean to transformers with compressed-tensors, and what is told where it cannot read them."""

import json

import numpy as np
import pytest
import torch
import transformers

from hasten.checkpoint import load, save, unread_elsewhere
from hasten.compress.data import text_of
from hasten.compress.recipe import carry_out, recipe_of
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.formats.quantized import QuantizedWeight
from tests.families.oracles import make_checkpoint

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
IDS = np.random.default_rng(0).integers(0, 8192, 48).tolist()


def mixed(bits, choices, work):
    model = load("code-8m")
    random = np.random.default_rng(1)
    text = text_of("random ids", random.integers(0, model.spec.vocab, (6, 32)).tolist())
    settings = {"bits": bits, "choices": choices, "method": "rtn", "clip": "none", "measure": 2, "skip": ["blocks.[2-7].*"]}
    return carry_out(model, recipe_of([{"mixed": settings}]), text, Run(work, 2))


def judged(directory, ids=IDS):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def relative(a, b):
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


def forms_of(model):
    return {str(weight.form) for weight in model.weights.values() if isinstance(weight, QuantizedWeight)}


def test_formats_by_layer_load_in_transformers(tmp_path):
    pytest.importorskip("compressed_tensors")
    made = mixed(3.5, ["int2", "int4", "int8"], tmp_path / "work")
    assert {"int2", "int4"} <= forms_of(made)
    assert not unread_elsewhere(made)
    save(made, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert len(config["quantization_config"]["config_groups"]) == len(forms_of(made))
    expected = judged(tmp_path / "m")
    assert relative(made.logits(IDS), expected) <= 1e-5
    assert relative(load(str(tmp_path / "m")).logits(IDS, "cpu"), expected) <= 1e-2


def test_three_bits_are_in_hastens_own_layout_and_that_is_told(tmp_path):
    made = mixed(3.6, ["int3", "int4"], tmp_path / "work")
    assert forms_of(made) == {"int3", "int4"}
    assert "cannot say int3" in unread_elsewhere(made)
    save(made, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "hasten"
    read = load(str(tmp_path / "m"))
    assert np.array_equal(read.logits(IDS), made.logits(IDS))
    assert "cannot say int3" in unread_elsewhere(read) or "no family" in unread_elsewhere(read)
    assert not unread_elsewhere(load("code-8m"))


def test_what_is_not_loaded_is_told(tmp_path):
    model = load("code-8m")
    few = {"weights": "int8", "skip": ["blocks.[1-7].*"]}
    head, zeros, plain = (
        carry_out(model, recipe_of([{"rtn": {**few, **settings}}]), None, Run(tmp_path / str(index), 2))
        for index, settings in enumerate([{"head": "int8"}, {"weights": "int4-zp"}, {}])
    )
    assert "embedding is stored in int8" in unread_elsewhere(head)
    assert "packed zero points" in unread_elsewhere(zeros)
    assert not unread_elsewhere(plain)


def test_a_head_of_its_own_loads_in_transformers(tmp_path):
    pytest.importorskip("compressed_tensors")
    config = next(family for family in all_families() if family.name == "llama").examples[0]
    make_checkpoint(config, tmp_path / "plain")
    model = load(str(tmp_path / "plain"))
    assert not model.spec.head.tied
    made = carry_out(model, recipe_of([{"rtn": {"weights": "int4-channel", "head": "int8"}}]), None, Run(tmp_path / "work", 2))
    assert not unread_elsewhere(made)
    save(made, tmp_path / "m")
    ids = np.random.default_rng(1).integers(0, model.spec.vocab, 12).tolist()
    assert relative(made.logits(ids), judged(tmp_path / "m", ids)) <= 1e-5
