"""Writing a model: a directory that hasten and, where the layout can say it, transformers load. Whole or not at all."""

import fnmatch
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from hasten.base.errors import CheckpointError, UnsupportedError, one_line
from hasten.checkpoint.load import HASTEN_TYPE, Sidecar
from hasten.families import find_family
from hasten.formats.safetensors import write_sharded
from hasten.formats.tensor_map import TensorMap, apply_map, inverse, rename
from hasten.model import Model

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip

OWNED_FILES = (
    "*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "pytorch_model*.bin", "merges.txt", "vocab*.txt", "README.md",
    "LICENSE*", "NOTICE*", "USE_POLICY.md", ".gitattributes",
)  # fmt: skip
"""What hasten and Hugging Face layouts put beside a config.json; overwriting a directory deletes these and nothing else."""


def save(model: Model, directory: Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write ``model`` to ``directory``.

    A Spec that the original config still describes is written in its family's own layout, any other under hasten's names with the
    Spec in `hasten.json`. The directory appears complete or not at all. Raises CheckpointError where it exists and is not empty,
    unless ``overwrite``, which replaces a model directory and never one that holds anything else (`OWNED_FILES`)."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise CheckpointError(f"{directory} exists and is not empty; choose another directory, or overwrite it on purpose")
    _refuse_foreign(directory)
    for name, weight in model.weights.items():
        if weight.format != "dense":
            raise UnsupportedError(f"weight {name} is in format {one_line(weight.format)}, which cannot be written yet; accepted is dense")
    config, tensor_map = _layout(model)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tensors = apply_map(inverse(tensor_map), model.weights)
        layout = {name: (weight.dtype, weight.shape) for name, weight in tensors.items()}
        write_sharded(staging, layout, lambda name: tensors[name].load(), {"format": "pt"}, max_shard_bytes=max_shard_bytes)
        _write_json(staging / "config.json", config)
        if generation := _generation(model):
            _write_json(staging / "generation_config.json", generation)
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


def _generation(model: Model) -> dict[str, Any]:
    """`generation_config.json`, with the end-of-text ids even where they came from a config that is not written any more."""
    ends = {"eos_token_id": list(model.eos_token_ids)} if model.eos_token_ids else {}
    return {**ends, **{key: value for key, value in model.generation.items() if value is not None}}


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


def _refuse_foreign(directory: Path) -> None:
    """Raise CheckpointError where replacing the directory would delete what belongs to no model."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, which no model replaces; choose another directory, or remove it")
    entries = sorted(directory.iterdir())
    if entries and not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json, so it is no model to overwrite; choose another directory")
    for entry in entries:
        if entry.is_dir() or not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in OWNED_FILES):
            raise CheckpointError(
                f"{directory} holds {one_line(entry.name)}, which is no part of a model and would be deleted; move it away, or choose "
                f"another directory"
            )


def _replace(staging: Path, directory: Path) -> None:
    """Put the finished directory in place; what was there goes only once its successor stands, and comes back where it cannot."""
    _refuse_foreign(directory)  # again: the weights may have taken minutes
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
