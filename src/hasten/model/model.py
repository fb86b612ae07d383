"""Model: a Spec, named weights, perhaps a tokenizer, and the record of what made it."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, TokenizerError, UnsupportedError, one_line
from hasten.formats.cache import MeantCache
from hasten.formats.weights import Weights
from hasten.model.tokenizer import Tokenizer
from hasten.spec import Spec


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step of a model's history: the transform, its settings, and the evidence that it paid."""

    transform: str
    settings: dict[str, Any] = {}
    evidence: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The foreign checkpoint a Model was read from: its family's name and its config, kept so that it can be written back."""

    family: str
    config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """Everything needed to run one decoder. Frozen: a transform makes a new one.

    ``generation`` is `generation_config.json`; ``tokenizer_error`` says why there is no tokenizer, for when text is asked for. ``cache``
    says how keys and values are kept where nobody asks for another way (None: as the backend likes)."""

    name: str
    spec: Spec
    weights: Weights
    tokenizer: Tokenizer | None = None
    tokenizer_error: str = ""
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: tuple[Provenance, ...] = ()
    source: Source | None = None
    cache: MeantCache | None = None

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises TokenizerError saying what is missing and how to get it."""
        if self.tokenizer is None:
            raise TokenizerError(self.tokenizer_error or f"model {self.name!r} has no tokenizer; give token ids instead of text")
        return self.tokenizer

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a text, from `generation_config.json`, else `config.json`, else none. Raises ConfigError for what is no id."""
        config = self.source.config if self.source is not None else {}
        for settings in (self.generation, config):
            value = settings.get("eos_token_id")
            tokens = value if isinstance(value, list) else [] if value is None else [value]
            if any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in tokens):
                raise ConfigError(f"{self.name}: 'eos_token_id' is {one_line(value)}; a token id or a list of them is needed")
            if tokens:
                return tuple(tokens)
        return ()

    def logits(self, token_ids: Sequence[int], backend: str = "reference") -> NDArray[np.float32]:
        """Logits float32 [T, vocab] of one sequence of T token ids, row t predicting token t + 1.

        Raises ConfigError for ids outside the vocabulary or a sequence longer than the context."""
        player: LogitsBackend = load_backend(backend)
        return player.logits(self, token_ids)


class LogitsBackend(Protocol):
    """The least a backend must offer to Model.logits."""

    def logits(self, model: Model, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 [T, vocab] of one sequence."""
        ...


BACKENDS = "hasten.backends"
"""The group of entry points that names backends of others."""

_BUILT_IN = {
    "cpu": "hasten.backends.cpu:CpuBackend", "cuda": "hasten.backends.cuda.backend:CudaBackend",
    "reference": "hasten.backends.reference:ReferenceBackend",
}  # fmt: skip
"""Found without a search."""


def load_backend(name: str) -> Any:
    """The backend called ``name``, made with its defaults. Backends stand above models, so they are found by name rather than imported."""
    module, _, attribute = find_backend(name).partition(":")
    return getattr(importlib.import_module(module), attribute)()


def find_backend(name: str) -> str:
    """Where the backend of that name is, as module:class, without importing it. Raises UnsupportedError listing the names there are."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    from importlib import metadata  # late: it takes longer than all of what a model needs

    others = {entry.name: entry.value for entry in metadata.entry_points(group=BACKENDS)}
    if name not in others:
        raise UnsupportedError(f"no backend {name!r}; there are {', '.join(sorted({*_BUILT_IN, *others}))}")
    return others[name]
