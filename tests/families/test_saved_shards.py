"""Shards that hasten wrote, read by transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.utils.hub import get_checkpoint_shard_files

from hasten import save
from hasten.formats.safetensors import layout_of, write_sharded
from tests.pure.test_checkpoint import CONFIG, TIED, tiny


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
def test_shards_load_in_transformers(config, tmp_path):
    model = tiny(config)
    save(model, tmp_path / "model", max_shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("model-0*.safetensors"))) >= 3
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = [3, 14, 15, 92, 65]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(model.logits(ids) - expected).max() < 1e-5


def test_transformers_finds_the_shards_and_their_tensors(tmp_path):
    tensors = {f"layer.{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    write_sharded(tmp_path, layout_of(tensors), tensors.__getitem__, {}, max_shard_bytes=128)
    files, found = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / "model.safetensors.index.json"))
    assert [Path(file).name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(found["all_checkpoint_keys"]) == sorted(tensors)
