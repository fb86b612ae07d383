"""Writing a model: a directory that hasten and, where the layout can say it, transformers load. Whole or not at all."""

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hasten.base.errors import CheckpointError, one_line
from hasten.checkpoint.load import HASTEN_TYPE, ORIGINAL, Sidecar
from hasten.checkpoint.quantized.cache import cache_tensors, with_cache_scheme
from hasten.checkpoint.quantized.writing import can_say, packed_zero_points, quantization_config, stored_tensors
from hasten.families import find_family
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight, stored_as
from hasten.formats.safetensors import write_sharded
from hasten.formats.tensor_map import apply_map, inverse, rename
from hasten.formats.weights import Weight
from hasten.model import Model

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip

OWNED_FILES = (
    "*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "pytorch_model*.bin", "merges.txt", "vocab*.txt", "README.md",
    "LICENSE*", "NOTICE*", "USE_POLICY.md", ".gitattributes",
)  # fmt: skip
"""What hasten and Hugging Face layouts put beside a config.json; overwriting a directory deletes these and nothing else."""

OWN = ", so it is in hasten's own layout"


def save(model: Model, directory: Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write ``model`` to ``directory``.

    A Spec that the original config still describes is written in its family's own layout, any other under hasten's names with the
    Spec in `hasten.json`; weights that are stored quantized as compressed-tensors, to the bit (hasten's own layout has what that format
    cannot say). The directory appears complete or not at all. Raises CheckpointError where it cannot be, and where it exists and is not
    empty, unless ``overwrite``, which replaces a model directory and never one that holds anything else (`OWNED_FILES`)."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise CheckpointError(f"{directory} exists and is not empty; choose another directory, or overwrite it on purpose")
    _refuse_foreign(directory)
    config, tensors = _layout(model)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:  # a file in the way, a folder nobody may write to
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}; choose another directory") from None
    try:
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


def unread_elsewhere(model: Model) -> str:
    """Why transformers with compressed-tensors does not load what is written of ``model``, in one line; '' where it does."""
    found = _family_layout(model)
    if isinstance(found, str):
        return f"{found}{OWN}"
    for name, weight in model.weights.items():
        if isinstance(weight, QuantizedWeight) and name == "embedding.weight":
            return f"the embedding is stored in {weight.form}, and it loads only a plain one"
        if isinstance(weight, QuantizedWeight) and packed_zero_points(weight):
            return f"{name} has packed zero points, which its version 5 makes no room for (other readers of compressed-tensors do)"
    return ""


def layout_of(model: Model) -> str:
    """The name of the family in whose layout ``model`` is written, or 'hasten'."""
    return "hasten" if model.source is None or isinstance(_family_layout(model), str) else model.source.family


def _layout(model: Model) -> tuple[dict[str, Any], dict[str, Weight]]:
    """The config to write, and the tensors: in the family's own layout where that can say the Spec and what is stored quantized."""
    found = _family_layout(model)
    if not isinstance(found, str):
        return found
    said = with_cache_scheme(quantization_config(model.weights, None, by_name=True), model.cache)
    own: dict[str, Any] = {"model_type": HASTEN_TYPE, "architectures": [], **({"quantization_config": said} if said else {})}
    if model.source is not None:
        own[ORIGINAL] = dict(model.source.config)
    names = tuple(rename(name, name) for name in model.weights)
    return own, {**stored_tensors(model.weights), **cache_tensors(model.cache, names)}


def _family_layout(model: Model) -> tuple[dict[str, Any], dict[str, Weight]] | str:
    """Config and tensors in the family's own layout, or why there are none."""
    if model.source is None:
        return "no family describes the model"
    config = dict(model.source.config)
    family = find_family(config.get("model_type"))
    if family.spec(config) != model.spec:
        return f"family {family.name} does not describe what the model has become"
    tensor_map = family.tensors(model.spec, config)
    tensors = apply_map(inverse(tensor_map), model.weights)
    if _meant(tensors) > _meant(model.weights):
        return f"family {family.name} stores together what is stored here in several formats"
    if unsaid := [name for name, weight in tensors.items() if not can_say(name, weight)]:
        return f"compressed-tensors cannot say {stored_as(tensors[unsaid[0]])}, as {unsaid[0]} has it"
    table = isinstance(model.weights["embedding.weight"], QuantizedWeight)  # which is no Linear
    said = quantization_config(tensors, family.tied_head if model.spec.head.tied else None, by_name=table)
    said = with_cache_scheme(said, model.cache)
    stored = {**stored_tensors(tensors), **cache_tensors(model.cache, tensor_map)}
    return {**config, **({"quantization_config": said} if said else {})}, stored


def _meant(weights: Mapping[str, Weight]) -> int:
    """Elements of weights that were stored quantized and are had by their meaning alone."""
    return sum(weight.size for weight in weights.values() if isinstance(weight, DequantizedWeight))


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
