"""Reading a model: config → Spec, mapped tensors → canonical weights. Nothing is copied, nothing of the checkpoint is run."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from hasten.base.errors import CheckpointError, ConfigError, UnsupportedError, UserError, one_line
from hasten.checkpoint.gguf import SUFFIX, gguf_tensors
from hasten.checkpoint.gguf_tokenizer import gguf_tokenizer
from hasten.checkpoint.locate import locate
from hasten.checkpoint.quantized import is_empty_bias, read_quantized
from hasten.checkpoint.quantized.cache import read_cache
from hasten.checkpoint.random import PREFIX, random_model
from hasten.families import Config, Family, find_family, model_types
from hasten.formats.gguf import GgufFile
from hasten.formats.safetensors import SafetensorsFile
from hasten.formats.tensor_map import TensorMap, apply_map, rename
from hasten.formats.weights import DTYPES, Origin, Weight, Weights
from hasten.model import Model, Provenance, Source, find_tokenizer
from hasten.program import lower
from hasten.spec import Spec, parse_json

JSON_LIMIT = 16 << 20
"""Longest JSON file of a checkpoint that is read, in bytes; the index of a very large model has about a tenth of it."""

HASTEN_TYPE = "hasten"
"""The `model_type` of what only a Spec can describe."""

ORIGINAL = "original_config"
"""Under which such a config has the config of what the model was made from, so that it can become one of that family again."""


class Sidecar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`hasten.json`: what no other file of the directory can say."""

    schema_version: int = 1
    spec: Spec | None = None
    provenance: tuple[Provenance, ...] = ()


def load(model: str | Path) -> Model:
    """The model that ``model`` names: a directory, a .gguf, a bundled name, a Hub id, or ``random:SHAPE``. Weights are mapped, not read.

    Raises a UserError in one line for everything that can be wrong with it."""
    if isinstance(model, str) and model.startswith(PREFIX):
        return random_model(model.removeprefix(PREFIX))
    if str(model).endswith(SUFFIX) and Path(model).expanduser().is_file():
        return load_gguf(Path(model).expanduser(), str(model))
    directory = locate(str(model))
    try:
        if directory == Path(model).expanduser():  # what the Hub client fetched has no code
            _refuse_code(directory)
        return load_directory(directory, str(model))
    except OSError as error:  # a folder nobody may enter, a disk that fails
        raise CheckpointError(f"{error.filename or directory}: {error.strerror or error}") from None


def load_directory(directory: Path, name: str) -> Model:
    """The model in a directory of Hugging Face layout."""
    whole = _read_config(directory)
    config = {key: value for key, value in whole.items() if key != "quantization_config"}
    quantization = _quantization(directory, whole)
    sidecar = _read_sidecar(directory)
    if config.get("model_type") == HASTEN_TYPE:
        if sidecar.spec is None:
            raise ConfigError(f"{directory}: model_type 'hasten' needs a spec in hasten.json, which has none")
        family, spec = None, sidecar.spec
        tensor_map: TensorMap = tuple(rename(target, target) for target in lower(spec).params)
    else:
        family = _family(config)
        spec = family.spec(config)
        tensor_map = family.tensors(spec, config)
    files = [SafetensorsFile.open(path) for path in _weight_files(directory)]
    stored = _tensors(files)
    weights = apply_map(tensor_map, _sources(stored, tensor_map, family, spec, quantization))
    tokenizer, tokenizer_error = find_tokenizer(directory)
    return Model(
        name=name,
        spec=spec,
        weights=_checked(spec, weights, Origin(_recipe(tensor_map, quantization), tuple(file.stamp for file in files))),
        tokenizer=tokenizer,
        tokenizer_error=tokenizer_error,
        generation=_read_optional(directory / "generation_config.json"),
        provenance=sidecar.provenance,
        source=_original(directory, config) if family is None else Source(family.name, config),
        cache=read_cache(quantization, stored, tensor_map),
    )


def _original(directory: Path, config: Config) -> Source | None:
    """What a model of hasten's own layout was made from, if a config says so; what no family that is there reads says nothing."""
    if (original := config.get(ORIGINAL)) is None:
        return None
    if not isinstance(original, dict):
        raise ConfigError(f"{directory / 'config.json'}: {ORIGINAL} is {one_line(original)}; an object is needed")
    try:
        family = find_family(original.get("model_type"))
        family.spec(original)
    except (ConfigError, UnsupportedError):
        return None
    return Source(family.name, original)


def load_gguf(path: Path, name: str) -> Model:
    """The model in a GGUF file, with the file's own tokenizer or the tokenizer.json beside it."""
    file = GgufFile.open(path)
    config, tensors = gguf_tensors(file)
    family = _family(config)
    spec = family.spec(config)
    tensor_map = family.tensors(spec, config)
    _refuse_extra(tensors, {source for mapping in tensor_map for source in mapping.sources}, (), family)
    tokenizer, tokenizer_error = gguf_tokenizer(file)
    return Model(
        name=name,
        spec=spec,
        weights=_checked(spec, apply_map(tensor_map, tensors), Origin(_recipe(tensor_map, "gguf"), (file.stamp,))),
        tokenizer=tokenizer,
        tokenizer_error=tokenizer_error,
        source=Source(family.name, config),
    )


# --- json files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Infinity is let through, for Mamba-2's step limits; NaN is not."""
    try:
        value = json.loads(_read_bytes(path).decode("utf-8"), parse_constant=lambda name: _constant(path, name))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {one_line(str(error))}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: an object is needed, not {one_line(value)}")
    return value


def _read_bytes(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > JSON_LIMIT:
            raise ConfigError(f"{path}: {size:,} bytes are too many; at most {JSON_LIMIT:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _constant(path: Path, name: str) -> float:
    if name != "Infinity":
        raise ConfigError(f"{path}: {name} is not a number a model can have; write a finite one")
    return float("inf")


def _read_optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_config(directory: Path) -> Config:
    if not (directory / "config.json").is_file():
        found = ", ".join(sorted(one_line(entry.name, 60)[1:-1] for entry in directory.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json (it holds {found})")
    return read_json(directory / "config.json")


def _quantization(directory: Path, config: Config) -> object:
    """How the weights are quantized, if they are: from config.json, or the file that tools for GPTQ and AWQ once wrote."""
    if quantization := config.get("quantization_config"):
        return quantization
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if found := _read_optional(directory / name):
            return {"quant_method": method, **found}
    return None


def _read_sidecar(directory: Path) -> Sidecar:
    path = directory / "hasten.json"
    if not path.is_file():
        return Sidecar()
    data = parse_json(_read_bytes(path), str(path))
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ConfigError(f"{path}: 'schema_version' is {one_line(version)}; a whole number is needed")
    if version > Sidecar().schema_version:
        raise UnsupportedError(f"{path}: schema_version {one_line(version)} is newer than this hasten reads (1); upgrade hasten to load it")
    try:
        return msgspec.convert(data, Sidecar)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {one_line(str(error), 300)}") from None


def _family(config: Config) -> Family:
    model_type = config.get("model_type")
    if model_type not in model_types() and config.get("auto_map"):
        raise UnsupportedError(
            f"config.json: 'auto_map' asks for code from the checkpoint, which hasten never runs, and model_type {one_line(model_type)} "
            f"is no family it knows; known are {', '.join(model_types())}"
        )
    if model_type is None:
        raise ConfigError(f"config.json: 'model_type' is missing; it names the family, one of {', '.join(model_types())}")
    return find_family(model_type)


def _refuse_code(directory: Path) -> None:
    """A local checkpoint that ships the code its config asks for is refused: running it as something else may not be what was meant."""
    if not (directory / "config.json").is_file():
        return
    references = read_json(directory / "config.json").get("auto_map")
    for reference in references.values() if isinstance(references, dict) else ():
        for name in reference if isinstance(reference, list) else [reference]:
            module = f"{str(name).split('--')[-1].split('.')[0]}.py"
            if (directory / module).is_file():
                raise UnsupportedError(
                    f"config.json: 'auto_map' asks to run {module} from the checkpoint, which hasten never does; "
                    f"remove the key to load it as the built-in family of its model_type"
                )


# --- tensors


def _recipe(tensor_map: TensorMap, quantization: object = None) -> str:
    """A name of what the map does: config.json and the family decide it, and the same files can be read in two ways."""
    said = json.dumps(quantization, sort_keys=True) if quantization else ""
    return hashlib.blake2b(f"{tensor_map!r}{said}".encode(), digest_size=16).hexdigest()


def _tensors(files: Sequence[SafetensorsFile]) -> dict[str, Weight]:
    """The files' tensors, mapped."""
    found: dict[str, Weight] = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in found:
                raise CheckpointError(f"{file.path}: tensor {one_line(name)} is in another shard too; every tensor belongs in one")
            found[name] = Weight(entry.shape, entry.dtype, lambda file=file, name=name: file.read(name))  # type: ignore[misc]
    return found


def _sources(found: dict[str, Weight], tensor_map: TensorMap, family: Family | None, spec: Spec, quantization: object) -> dict[str, Weight]:
    """Tensors under the names the map expects; what the map does not expect is an error."""
    expected = {name for mapping in tensor_map for name in mapping.sources}
    if quantization:
        found = read_quantized(quantization, found)
        found = {name: weight for name, weight in found.items() if name in expected or not is_empty_bias(name, weight, found)}
    if family is not None and family.base_prefix and not any(name.startswith(family.base_prefix) for name in found):
        # The bare decoder was saved: the same names without the full model's prefix.
        found = {family.base_prefix + name if family.base_prefix + name in expected else name: weight for name, weight in found.items()}
    ignored = () if family is None else (*family.ignored, *((re.escape(family.tied_head),) if spec.head.tied else ()))
    _refuse_extra(found, expected, ignored, family)
    for name in expected & found.keys():
        if found[name].dtype not in DTYPES.values():
            raise CheckpointError(
                f"tensor {name} has dtype {found[name].dtype}; accepted are {', '.join(DTYPES)}, or what config.json says in "
                f"'quantization_config'"
            )
    return found


def _refuse_extra(found: Iterable[str], expected: set[str], ignored: tuple[str, ...], family: Family | None) -> None:
    prefix = "" if family is None else family.base_prefix
    patterns = [re.compile(pattern) for pattern in ignored]
    extra = [name for name in found if name not in expected and not any(p.fullmatch(name) or p.fullmatch(prefix + name) for p in patterns)]
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        shown = ", ".join(one_line(name, 60) for name in extra[:3])
        raise CheckpointError(f"tensor {shown}{more} is not part of this model; check that config.json belongs to these weights")


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(directory, index)
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(
            f"{directory} has {len(others)} *.safetensors files and no model.safetensors.index.json to say which make the model"
        )
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in sorted(directory.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickled weights ({pickles[0]}), which can run code and are never read; get or make *.safetensors"
        )
    raise CheckpointError(f"{directory} has no *.safetensors; download the weights beside config.json")


def _indexed_files(directory: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _bad_index(index, "it has no 'weight_map' object")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            _bad_index(index, f"{one_line(name)} is no file name of this directory")
    paths = []
    for name in dict.fromkeys(weight_map.values()):
        if not (directory / name).is_file():
            raise CheckpointError(f"{index}: shard {name} is missing; download it again")
        paths.append(directory / name)
    return paths


def _bad_index(index: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{index}: {why}; download it again")


def _checked(spec: Spec, weights: Mapping[str, Weight], origin: Origin) -> Weights:
    """The weights in the order the Program uses them, each of the shape it wants."""
    params = lower(spec).params
    for name, shape in params.items():
        if name not in weights:
            raise CheckpointError(f"weight {name} {list(shape)} is not in the checkpoint; config.json does not belong to it")
        if weights[name].shape != shape:
            raise CheckpointError(
                f"weight {name} has shape {list(weights[name].shape)}, config.json asks for {list(shape)}; they do not belong together"
            )
    unused = weights.keys() - params.keys()
    if unused:
        raise CheckpointError(f"weight {sorted(unused)[0]} is mapped by the family but used by no op")
    return Weights({name: weights[name] for name in params}, origin)
