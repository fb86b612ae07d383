"""hasten: load, run, compress, serve and measure language models.

``load(path)`` gives a Model, ``LLM(path).generate(prompts, SamplingParams())`` text. Names are looked up when first used, so that
importing the package costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.checkpoint import load, save
    from hasten.engine import LLM, SamplingParams
    from hasten.model import Model

__version__ = "0.1.0"

__all__ = ["LLM", "Model", "SamplingParams", "load", "save"]

_HOMES = {"LLM": "engine", "Model": "model", "SamplingParams": "engine", "load": "checkpoint", "save": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"hasten.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
