"""Writing a model: a directory that hasten and, where the layout can say it, transformers load. Whole or not at all."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from hasten.base.errors import CheckpointError
from hasten.checkpoint.load import HASTEN_TYPE, Sidecar
from hasten.families import find_family
from hasten.formats.safetensors import write_sharded
from hasten.formats.tensor_map import TensorMap, apply_map, inverse, rename
from hasten.model import Model

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def save(model: Model, directory: Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write ``model`` to ``directory``.

    A Spec that the original config still describes is written in its family's own layout, any other under hasten's names with the
    Spec in `hasten.json`. The directory appears complete or not at all. Raises CheckpointError where it exists and is not empty,
    unless ``overwrite``."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise CheckpointError(f"{directory} exists and is not empty; choose another directory, or overwrite it on purpose")
    config, tensor_map = _layout(model)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tensors = apply_map(inverse(tensor_map), model.weights)
        layout = {name: (weight.dtype, weight.shape) for name, weight in tensors.items()}
        write_sharded(staging, layout, lambda name: tensors[name].load(), {"format": "pt"}, max_shard_bytes=max_shard_bytes)
        _write_json(staging / "config.json", config)
        if model.generation:
            _write_json(staging / "generation_config.json", dict(model.generation))
        spec = model.spec if config["model_type"] == HASTEN_TYPE else None
        sidecar = Sidecar(spec=spec, provenance=model.provenance)
        (staging / "hasten.json").write_bytes(msgspec.json.format(msgspec.json.encode(sidecar), indent=2) + b"\n")
        if model.tokenizer is not None:
            for name in TOKENIZER_FILES:
                if (source := model.tokenizer.path.parent / name).is_file():
                    shutil.copyfile(source, staging / name)
        staging.chmod(0o755)
        _replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _layout(model: Model) -> tuple[dict[str, Any], TensorMap]:
    """The config to write, and the map from its tensor names to canonical ones."""
    if model.source is not None:
        config = dict(model.source.config)
        family = find_family(config.get("model_type"))
        if family.spec(config) == model.spec:
            return config, family.tensors(model.spec, config)
    return {"model_type": HASTEN_TYPE, "architectures": []}, tuple(rename(name, name) for name in model.weights)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def _replace(staging: Path, directory: Path) -> None:
    """Put the finished directory in place; what was there goes only once its successor stands, and comes back where it cannot."""
    if not directory.exists():
        os.replace(staging, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    try:
        os.replace(directory, old / "it")
        try:
            os.replace(staging, directory)
        except BaseException:
            os.replace(old / "it", directory)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
