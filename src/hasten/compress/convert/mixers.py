"""What the conversions share: which layers' attention is meant, what it reads and makes, and the model with other mixers."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from hasten.base.errors import ConfigError, UserError
from hasten.families import find_family
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight
from hasten.formats.weights import Weight, Weights
from hasten.model import Model, Provenance, Source
from hasten.program import Program, lower, ops
from hasten.program.pages import sequence_bytes
from hasten.spec import Attention, CrossLayerAttention, Mixer, Spec

PAGE = 16
"""Tokens of a page in what is said of the cache's bytes."""


def chosen_layers(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers that are meant, ascending: every one with softmax attention over keys and values where none are named.

    Raises ConfigError for a layer the model does not have or that has no such attention, and where none is left."""
    blocks = model.spec.blocks
    have = tuple(index for index, block in enumerate(blocks) if isinstance(block.mixer, Attention))
    if not have:
        raise ConfigError(f"{model.name} has no layer with keys and values, so there is no attention to convert")
    if layers is None:
        return have
    for index in layers:
        if not 0 <= index < len(blocks):
            raise ConfigError(f"layers: {index} is none of {model.name}, whose layers are 0 to {len(blocks) - 1}")
        if index not in have:
            raise ConfigError(f"layers: {index} is a {type(blocks[index].mixer).__name__}, which has no keys and values to convert")
    if not layers:
        raise ConfigError("layers: none is named; name some, or leave 'layers' out for all")
    return tuple(sorted(set(layers)))


def attention_of(spec: Spec, index: int) -> Attention:
    """The attention of a layer that ``chosen_layers`` gave."""
    mixer = spec.blocks[index].mixer
    if not isinstance(mixer, Attention):
        raise ConfigError(f"layer {index} has no keys and values to convert")
    return mixer


def refuse_shared(model: Model) -> None:
    """Raise ConfigError where layers read other layers' keys and values: they would have to change together."""
    for index, block in enumerate(model.spec.blocks):
        if isinstance(block.mixer, CrossLayerAttention):
            raise ConfigError(f"layer {index} reads keys and values of layer {block.mixer.source}; put share_kv after other conversions")


def require_own_weights(model: Model, layers: Sequence[int]) -> None:
    """Raise ConfigError where a weight of these layers' mixers cannot be mixed with others: it is stored quantized, as a product of two,
    or another layer's too."""
    if model.cache is not None and model.cache.scales:
        raise ConfigError(f"{model.name} has scales for its cached keys and values as they are now; convert before they are made")
    meant = tuple(f"blocks.{index}.mixer." for index in layers)
    for name, weight in model.weights.items():
        if name.startswith(meant) and isinstance(weight, QuantizedWeight | DequantizedWeight):
            raise ConfigError(f"{name} is quantized already, so it cannot be converted; put this transform before those that round")
    for index, block in enumerate(model.spec.blocks):
        if block.shares is not None and {index, block.shares} & set(layers):
            raise ConfigError(f"layer {index} shares the weights of layer {block.shares}; put share after what converts attention")
        if index in layers and any(low.layer.startswith("mixer.") for low in block.low_rank):
            raise ConfigError(f"layer {index} has matrices of low rank in its attention; put rank after what converts attention")


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """Names of values in one attention: queries, keys and values as they are before they are rotated, and what the output projection
    reads."""

    q: str
    k: str
    v: str
    out: str


def values_of(piece: Program, index: int) -> Read:
    """The values of layer ``index`` in its piece of a Program."""
    append, attend = attention_ops(piece, index)
    last = next(op for op in piece.ops if isinstance(op, ops.Linear) and op.weight == f"blocks.{index}.mixer.o.weight")
    return Read(_unrotated(piece, attend.q), _unrotated(piece, append.k), append.v or append.k, last.x)


def attention_ops(piece: Program, index: int) -> tuple[ops.AppendKv, ops.Attend]:
    """What keeps keys and values, and what reads them, of layer ``index`` in its piece of a Program."""
    attend = next(op for op in piece.ops if isinstance(op, ops.Attend) and op.y.startswith(f"blocks.{index}.mixer."))
    return next(op for op in piece.ops if isinstance(op, ops.AppendKv) and op.state == attend.state), attend


def _unrotated(piece: Program, name: str) -> str:
    return next((op.x for op in piece.ops if isinstance(op, ops.Rotate) and op.y == name), name)


def with_mixers(spec: Spec, mixers: Mapping[int, Mixer]) -> Spec:
    """``spec`` with other mixers in some layers."""
    blocks = (msgspec.structs.replace(block, mixer=mixers[index]) if index in mixers else block for index, block in enumerate(spec.blocks))
    return msgspec.structs.replace(spec, blocks=tuple(blocks)).checked()


def converted(
    model: Model, spec: Spec, changed: Mapping[str, Weight], said: Provenance, candidates: Iterable[Mapping[str, Any]] = ()
) -> Model:
    """``model`` as ``spec`` with the weights of ``changed``; the others are as they were. Of ``candidates``, what changes in the source's
    config, the first that describes ``spec`` is taken."""
    weights = {name: changed.get(name) or model.weights[name] for name in lower(spec).params}
    source = _source(model, spec, candidates)
    return dataclasses.replace(model, spec=spec, weights=Weights(weights), provenance=(*model.provenance, said), source=source)


def _source(model: Model, spec: Spec, candidates: Iterable[Mapping[str, Any]]) -> Source | None:
    if model.source is None:
        return None
    for candidate in candidates:
        config = {**model.source.config, **candidate}
        try:
            family = find_family(config.get("model_type"))
            if family.spec(config) == spec:
                return Source(family.name, config)
        except UserError:
            continue
    return model.source


def record(transform: str, settings: msgspec.Struct, evidence: Mapping[str, Any]) -> Provenance:
    """A step of a model's history as it is read back from JSON."""
    return Provenance(transform, msgspec.json.decode(msgspec.json.encode(settings)), dict(evidence))


def cache_bytes(spec: Spec) -> int:
    """Bytes of the cache a token, kept in bf16, once the text is longer than every window."""
    groups = lower(spec, cache="bfloat16").states
    return sum(group.bytes_per_token() for group in groups)


def sequence_cache_bytes(spec: Spec) -> int:
    """Bytes of cache that are planned for a sequence as long as the context, kept in bf16, in pages of PAGE tokens: recurrent states
    twice, once for a snapshot."""
    return sequence_bytes(lower(spec, cache="bfloat16"), PAGE)
