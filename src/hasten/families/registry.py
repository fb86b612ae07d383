"""Which family reads a `model_type`: the built-in ones, then entry points of the group ``hasten.families``."""

import importlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hasten.base.errors import UnsupportedError, one_line
from hasten.families.family import Family

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# model_type → module of hasten.families that exports FAMILY
BUILT_IN = {
    "bloom": "bloom",
    "deepseek_v3": "deepseek_v3",
    "falcon": "falcon",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "llama": "llama",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "mpt": "mpt",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "transfo-xl": "transformer_xl",
}

ENTRY_POINTS = "hasten.families"


def find_family(model_type: object) -> Family:
    """The family of a config's ``model_type``. Raises UnsupportedError listing the known ones."""
    if isinstance(model_type, str):
        if model_type in BUILT_IN:
            return _built_in(BUILT_IN[model_type])
        for entry in _entry_points():
            if entry.name == model_type:
                return _from_entry_point(entry)
    raise UnsupportedError(f"model_type {one_line(model_type)} is not a known family; known are {', '.join(model_types())}")


def model_types() -> list[str]:
    """Every `model_type` that can be read, third-party ones included."""
    return sorted({*BUILT_IN, *(entry.name for entry in _entry_points())})


def all_families() -> Iterator[Family]:
    """Every family once, built-in ones first."""
    for module in dict.fromkeys(BUILT_IN.values()):
        yield _built_in(module)
    for entry in _entry_points():
        if entry.name not in BUILT_IN:
            yield _from_entry_point(entry)


def _entry_points() -> "Iterable[EntryPoint]":
    from importlib import metadata  # late: it takes longer than all of what a built-in family needs

    return metadata.entry_points(group=ENTRY_POINTS)


def _built_in(module: str) -> Family:
    family: Family = importlib.import_module(f"hasten.families.{module}").FAMILY
    return family


def _from_entry_point(entry: "EntryPoint") -> Family:
    what = f"entry point {entry.name!r} of group {ENTRY_POINTS} ({entry.value})"
    try:
        family = entry.load()
    except Exception as error:  # somebody else's module may fail in any way
        raise UnsupportedError(
            f"{what} cannot be loaded: {type(error).__name__}: {one_line(str(error))}; mend or uninstall its package"
        ) from None
    if not isinstance(family, Family):
        raise UnsupportedError(f"{what} is {one_line(family)}; a hasten.families.Family is needed")
    if entry.name not in family.model_types:
        raise UnsupportedError(f"{what} is the family of {', '.join(family.model_types)}; name it after one of them")
    return family
