"""Quantized checkpoints at the command line."""

import json
import shutil

import numpy as np
import pytest

from hasten import load, save
from hasten.checkpoint import bundled_directory
from hasten.formats.safetensors import SafetensorsFile, layout_of, write
from tests.cli import assert_refused, main
from tests.pure.test_compressed_tensors import MODEL, F, quantized
from tests.pure.test_gguf import SIZES, gguf, model_tensors


def test_inspect_and_generate(tmp_path, monkeypatch, capsys):
    save(quantized([F("int4", 64), F("int8"), F("int4", 16, True)]), tmp_path / "m")
    facts = json.loads(main(monkeypatch, capsys, "inspect", tmp_path / "m", "--json").out)
    assert facts["formats"] == ["bfloat16", "int4-g16-zp × bf16", "int4-g64 × bf16", "int8 × bf16"]
    assert facts["bytes"] == load(tmp_path / "m").weights.nbytes
    played = facts["dequantized"]
    assert set(played.values()) == {"stored in int4-g16-zp, played in bf16: no kernel has that format"}
    assert {name.split(".")[1] for name in played} == {"2", "5"}
    shown = main(monkeypatch, capsys, "inspect", tmp_path / "m")
    assert f"and {len(played) - 1} more stored in int4-g16-zp, played in bf16: no kernel has that format" in shown.out
    program = main(monkeypatch, capsys, "inspect", tmp_path / "m", "--fused").out
    assert "int4-g64" in program
    assert "int8" in program
    done = main(monkeypatch, capsys, "generate", tmp_path / "m", "-p", "import ", "-n", "8")
    assert (done.code, done.err) == (0, "")
    assert done.out.strip()


def test_a_gguf_file_beside_its_tokenizer(tmp_path, monkeypatch, capsys):
    tensors, _ = model_tensors(["BF16"])
    (tmp_path / "m.gguf").write_bytes(gguf({**SIZES, "tokenizer.ggml.eos_token_id": MODEL.eos_token_ids[0]}, tensors))
    asked = ("-p", "import json\n", "-n", "12")
    assert_refused(main(monkeypatch, capsys, "generate", tmp_path / "m.gguf", *asked), "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_directory("code-8m") / name, tmp_path / name)
    done = main(monkeypatch, capsys, "generate", tmp_path / "m.gguf", *asked)
    assert (done.code, done.out) == (0, main(monkeypatch, capsys, "generate", "code-8m", *asked).out)


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0])
def test_a_damaged_scale_is_one_line(bad, tmp_path, monkeypatch, capsys):
    save(quantized([F("int4", 64)]), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    file = SafetensorsFile.open(path)
    arrays = {name: file.read(name).copy() for name in file.entries}
    name = next(name for name in arrays if name.endswith("weight_scale"))
    arrays[name][0, 0] = bad
    write(path, layout_of(arrays), arrays.__getitem__)
    assert_refused(main(monkeypatch, capsys, "generate", tmp_path / "m", "-p", "import ", "-n", "8"), name, "scale of")
