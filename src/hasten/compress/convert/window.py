"""Layers that see only the last tokens: a sliding window in place of all that came before, so that older pages of the cache are freed."""

from collections.abc import Iterator
from typing import Any

import msgspec

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.convert.mixers import (
    attention_of,
    chosen_layers,
    converted,
    record,
    refuse_shared,
    sequence_cache_bytes,
    with_mixers,
)
from hasten.compress.data import Text
from hasten.compress.walk import Run
from hasten.model import Model
from hasten.spec import Attention, Causal, RelativeSinusoid, SlidingWindow, Spec


class Window(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A query sees the last ``size`` tokens, its own among them, in ``layers`` (all with attention unless given)."""

    size: int
    layers: tuple[int, ...] | None = None


def check_window(model: Model, settings: Window) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    if not 1 <= settings.size < model.spec.context:
        raise ConfigError(f"size is {settings.size}; {model.name} accepts 1 to {model.spec.context - 1}, less than its context")
    refuse_shared(model)
    for index in chosen_layers(model, settings.layers):
        mixer = attention_of(model.spec, index)
        if isinstance(mixer.position, RelativeSinusoid) or not isinstance(mixer.visible, Causal | SlidingWindow):
            raise UnsupportedError(f"layer {index} has a memory of segments, which is a window of its own; leave it out of 'layers'")
        if isinstance(mixer.visible, SlidingWindow) and mixer.visible.size <= settings.size:
            raise ConfigError(
                f"size is {settings.size}; layer {index} sees {mixer.visible.size} tokens already; take a smaller size, or leave it out "
                f"of 'layers'"
            )


def window(model: Model, settings: Window, text: Text | None, run: Run) -> Model:
    """``model`` with windows; its weights are as they were."""
    check_window(model, settings)  # again: an earlier step may have changed it
    layers, size = chosen_layers(model, settings.layers), settings.size
    mixers = {index: msgspec.structs.replace(attention_of(model.spec, index), visible=SlidingWindow(size=size)) for index in layers}
    spec = with_mixers(model.spec, mixers)
    evidence = {"layers": list(layers), "cache_bytes_per_sequence": [sequence_cache_bytes(model.spec), sequence_cache_bytes(spec)]}
    said = record("window", settings, evidence)
    return converted(model, spec, {}, said, _candidates(model, spec, size))


def _candidates(model: Model, spec: Spec, size: int) -> Iterator[dict[str, Any]]:
    """What families' configs call it."""
    slides = [isinstance(block.mixer, Attention) and isinstance(block.mixer.visible, SlidingWindow) for block in spec.blocks]
    kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    yield {"sliding_window": size}
    yield {"sliding_window": size, "use_sliding_window": True, "layer_types": kinds}
    yield {"sliding_window": size, "layer_types": kinds}
    if model.source is not None and model.source.family == "llama" and all(slides):
        yield {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": size}  # the same tensors
