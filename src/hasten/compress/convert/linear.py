"""Linear attention in place of softmax attention: a state of fixed size a sequence, where keys and values grew with every token (Hedgehog,
Zhang et al. 2024, arXiv:2402.04347).

Queries, keys, values and positions stay as they are; each head gets two matrices of features, learned so that its weights are near those
of softmax, and the output projection is fitted to what the layer gave before. What is left is for training to mend."""

import math

import msgspec

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.convert.features import learn_features
from hasten.compress.convert.layerwise import Changed, Layer, convert_layers
from hasten.compress.convert.mixers import (
    attention_of,
    cache_bytes,
    chosen_layers,
    converted,
    record,
    refuse_shared,
    require_own_weights,
    sequence_cache_bytes,
)
from hasten.compress.data import Text
from hasten.compress.walk import Run
from hasten.model import Model
from hasten.spec import Alibi, Attention, Causal, LinearAttention, RelativeSinusoid, Rotary

MOST_STEPS = 100_000
"""Steps that features may learn for."""


class LinearLayers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``layers`` get linear attention (the later half of those with softmax attention unless given: the first ones bear it least).
    Features learn in ``steps`` of Adam at ``rate``; ``fit`` says whether the output projection is fitted afterwards."""

    layers: tuple[int, ...] | None = None
    steps: int = 256
    rate: float = 0.02
    fit: bool = True

    def meant(self, model: Model) -> tuple[int, ...]:
        """The layers to convert."""
        if self.layers is not None:
            return chosen_layers(model, self.layers)
        every = chosen_layers(model, None)
        return every[(len(every) + 1) // 2 :]


def check_linear_attention(model: Model, settings: LinearLayers) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    layers = settings.meant(model)
    if not layers:
        raise ConfigError(f"{model.name} has one layer with keys and values, which keeps them unless it is named in 'layers'")
    if not 0 <= settings.steps <= MOST_STEPS or not 0 < settings.rate < math.inf:
        raise ConfigError(f"steps is {settings.steps} and rate {settings.rate}; accepted are 0 to {MOST_STEPS:,}, and more than 0")
    refuse_shared(model)
    require_own_weights(model, layers)
    for index in layers:
        linear_form(attention_of(model.spec, index), index)


def linear_attention(model: Model, settings: LinearLayers, text: Text | None, run: Run) -> Model:
    """``model`` with linear attention in some layers. No family describes it."""
    check_linear_attention(model, settings)  # again: an earlier step may have changed it
    layers, apart = settings.meant(model), dict[str, list[float]]()

    def change(layer: Layer) -> Changed:
        made = learn_features(layer, settings.steps, settings.rate)
        apart[f"layer {layer.index}"] = [round(made.before, 4), round(made.after, 4)]
        weights = {f"{layer.path}.q_feature.weight": made.q, f"{layer.path}.k_feature.weight": made.k}
        return Changed(linear_form(layer.mixer, layer.index), weights)

    done = convert_layers(model, layers, text, run, change, settings.fit)
    evidence = {
        "layers": list(layers),
        "cache_bytes_per_token": [cache_bytes(model.spec), cache_bytes(done.spec)],
        "cache_bytes_per_sequence": [sequence_cache_bytes(model.spec), sequence_cache_bytes(done.spec)],
        "weights_divergence": apart,
        "output_error": {name: [round(share, 5) for share in shares] for name, shares in done.errors.items()},
    }
    return converted(model, done.spec, done.weights, record("linear_attention", settings, evidence))


def linear_form(mixer: Attention, index: int) -> LinearAttention:
    """What the attention of layer ``index`` becomes. Raises UnsupportedError, with the reason, for what linear attention cannot carry."""
    position = mixer.position
    by_row = mixer.norm_span == "row" and (mixer.q_norm is not None or mixer.k_norm is not None)
    reasons = (
        (isinstance(position, Alibi), "ALiBi, a bias by distance, which a sum over all that came before does not know"),
        (isinstance(position, RelativeSinusoid), "relative sinusoids, which are no rotation of queries and keys"),
        (not isinstance(mixer.visible, Causal), "a window, whose cache is bounded already; linear attention forgets nothing"),
        (by_row, "norms over all heads' queries or keys together, which linear attention has not"),
        (mixer.softcap is not None, "capped scores, which linear attention has not"),
        (mixer.clip is not None, "projections that are clipped, which linear attention has not"),
        (mixer.sinks, "sinks, which take weight and give no value; linear attention has none"),
        (mixer.gate, "a gate, which linear attention has not"),
    )
    for applies, reason in reasons:
        if applies:
            raise UnsupportedError(f"layer {index} cannot become linear attention: it has {reason}; leave it out of 'layers'")
    return LinearAttention(
        heads=mixer.heads, kv_heads=mixer.kv_heads, head_dim=mixer.head_dim, value_dim=mixer.value_dim,
        position=position if isinstance(position, Rotary) else None, bias=mixer.bias, out_bias=mixer.out_bias, q_norm=mixer.q_norm,
        k_norm=mixer.k_norm,
    )  # fmt: skip
