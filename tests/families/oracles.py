"""Independent implementations of every family: random checkpoints on disk, and the logits somebody else's code gives for them."""

import json
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from tests.families.transformer_xl_oracle import random_checkpoint, transformer_xl_logits

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

Logits = Callable[[list[int]], np.ndarray]


def make_checkpoint(config: Mapping[str, Any], directory: Path) -> Logits:
    """Write a random checkpoint for ``config`` and return its oracle: token ids → logits [T, vocab]."""
    seed = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    if config["model_type"] == "transfo-xl":
        full, weights = random_checkpoint(config, seed)
        directory.mkdir(exist_ok=True)
        save_file({name: np.ascontiguousarray(w, dtype=np.float32) for name, w in weights.items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(full))
        return read_checkpoint(directory)
    torch.manual_seed(seed)
    values = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.CONFIG_MAPPING[config["model_type"]](**values)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("A_log"):
                parameter.uniform_(0, 2)
            elif parameter.is_floating_point() and not name.endswith(("inv_freq", "embed_scale")):
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
    model.save_pretrained(directory)
    return read_checkpoint(directory)


def read_checkpoint(directory: Path) -> Logits:
    """The oracle of a checkpoint on disk, whoever wrote it."""
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] == "transfo-xl":
        from safetensors.numpy import load_file

        weights = load_file(directory / "model.safetensors")
        return lambda ids: transformer_xl_logits(weights, config, ids, segment=config["tgt_len"], memory=config["mem_len"])
    # Transformers' eager Falcon adds ALiBi twice, once inside the mask; its default adds it once, as the published code does.
    attention = "sdpa" if config["model_type"] == "falcon" and config["alibi"] else "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention, dtype=torch.float32).eval()
    if config["model_type"] == "mpt":
        # Transformers' MPT never passes alibi_bias_max on; the published code does.
        build = partial(model.transformer.build_mpt_alibi_tensor, alibi_bias_max=model.config.attn_config.alibi_bias_max)
        model.transformer.build_mpt_alibi_tensor = build

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    return logits
