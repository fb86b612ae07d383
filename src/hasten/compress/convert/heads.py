"""Fewer key/value heads, or one: the heads of a group become one that its query heads share (Ainslie et al. 2023, arXiv:2305.13245).

The paper takes their mean. Heads say the same things in other words, though, and words can be changed where both sides know: of what is
rotated, by a complex factor per pair, which commutes with the rotation, and whose conjugate the queries take; of values, by any map, which
the output projection takes back. So a group's head is made of those combinations of its heads that say most about all of them, with what
queries ask and the output projection reads as the measure; and the output projection is then fitted to what the layer gave before."""

from collections.abc import Sequence
from typing import Literal

import msgspec
import torch
from torch import Tensor

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.convert.layerwise import Changed, Layer, convert_layers
from hasten.compress.convert.mixers import attention_of, cache_bytes, chosen_layers, converted, record, refuse_shared, require_own_weights
from hasten.compress.convert.pairs import Pairs, principal
from hasten.compress.convert.statistics import influence, lowest
from hasten.compress.data import Text
from hasten.compress.walk import Run
from hasten.model import Model
from hasten.spec import RelativeSinusoid


class KvHeads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``count`` key/value heads a layer, in ``layers`` (all with attention unless given). ``pool`` says how heads become one; ``fit``
    whether the output projection is fitted afterwards."""

    count: int
    layers: tuple[int, ...] | None = None
    pool: Literal["aligned", "mean"] = "aligned"
    fit: bool = True


def check_kv_heads(model: Model, settings: KvHeads) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    layers = chosen_layers(model, settings.layers)
    refuse_shared(model)
    require_own_weights(model, layers)
    for index in layers:
        mixer = attention_of(model.spec, index)
        if settings.count < 1 or mixer.kv_heads % settings.count or settings.count == mixer.kv_heads:
            fewer = [str(count) for count in range(1, mixer.kv_heads) if mixer.kv_heads % count == 0]
            raise ConfigError(
                f"count is {settings.count}; layer {index} has {mixer.kv_heads} key/value heads, which can become "
                f"{' or '.join(fewer) or 'no fewer'}"
            )
        if isinstance(mixer.position, RelativeSinusoid):
            raise UnsupportedError(f"layer {index} has relative sinusoids, where every head has keys of its own; leave it out of 'layers'")


def kv_heads(model: Model, settings: KvHeads, text: Text | None, run: Run) -> Model:
    """``model`` with fewer key/value heads."""
    check_kv_heads(model, settings)  # again: an earlier step may have changed it
    layers = chosen_layers(model, settings.layers)
    done = convert_layers(model, layers, text, run, lambda layer: pooled(layer, settings.count, settings.pool), settings.fit)
    evidence = {
        "layers": list(layers),
        "cache_bytes_per_token": [cache_bytes(model.spec), cache_bytes(done.spec)],
        "output_error": {name: [round(share, 5) for share in shares] for name, shares in done.errors.items()},
    }
    said = record("kv_heads", settings, evidence)
    return converted(model, done.spec, done.weights, said, [{"num_key_value_heads": settings.count}])


def pooled(layer: Layer, count: int, pool: Literal["aligned", "mean"]) -> Changed:
    """A layer with ``count`` key/value heads, each of a run of those that were."""
    mixer, new = layer.mixer, dict[str, Tensor]()
    become = msgspec.structs.replace(mixer, kv_heads=count)
    of_keys, of_values = influence(layer.seen, mixer, layer.weight("o.weight"))
    aligned = pool == "aligned"
    if aligned and mixer.k_norm is None and mixer.q_norm is None and mixer.clip is None:
        _align_keys(layer, count, of_keys, new)
    else:  # what is normalized or clipped feature by feature is in no other words
        _mean(layer, "k", count, new)
        if mixer.k_norm is not None and mixer.norm_span == "row":
            _mean(layer, "k_norm", count, new)
    if aligned and not mixer.gate and mixer.clip is None:
        _align_values(layer, count, of_values, new)
    else:
        _mean(layer, "v", count, new)
    return Changed(become, {name: tensor.float() for name, tensor in new.items()})


def _columns(layer: Layer, name: str, heads: int) -> Tensor:
    """Rows of a product and its bias side by side, head by head: [heads, size, in (+ 1)]."""
    columns = [layer.weight(f"{name}.weight")]
    if layer.mixer.bias:
        columns.append(layer.weight(f"{name}.bias")[:, None])
    return torch.cat(columns, 1).reshape(heads, -1, sum(part.shape[1] for part in columns))


def _put(layer: Layer, name: str, rows: Tensor, new: dict[str, Tensor]) -> None:
    """The inverse of ``_columns``."""
    rows = rows.reshape(-1, rows.shape[-1])
    if layer.mixer.bias:
        new[f"{layer.path}.{name}.bias"], rows = rows[:, -1], rows[:, :-1]
    new[f"{layer.path}.{name}.weight"] = rows


def _mean(layer: Layer, name: str, count: int, new: dict[str, Tensor]) -> None:
    for part in ("weight", "bias"):
        if (full := f"{layer.path}.{name}.{part}") in layer.weights:
            rows = layer.weights[full].double()
            by_head = rows.reshape(count, layer.mixer.kv_heads // count, -1, *rows.shape[1:])
            new[full] = by_head.mean(1).reshape(-1, *rows.shape[1:])


def _align_keys(layer: Layer, count: int, metrics: Tensor, new: dict[str, Tensor]) -> None:
    mixer, pairs = layer.mixer, Pairs.of(layer.mixer)
    joined, shared = mixer.kv_heads // count, mixer.heads // mixer.kv_heads
    keys = mixer.kv_heads * mixer.head_dim
    across, weight = pairs.moments(layer.seen.kv[:keys, :keys]), pairs.energy(metrics)
    k, q = _columns(layer, "k", mixer.kv_heads), _columns(layer, "q", mixer.heads)
    turned_k, turned_q = pairs.complex(k), pairs.complex(q)
    rows, asked = [], []
    for group in range(count):
        of = slice(group * joined, (group + 1) * joined)
        columns, _ = principal(across[:, of, of], weight[:, of])
        encode = torch.linalg.inv(columns)[:, 0]  # [pairs, joined]
        made = torch.einsum("ph,hpn->pn", encode, turned_k[of])
        free_k, free_q = _align_free(layer, pairs, of, metrics)
        rows.append(pairs.real(made, free_k @ k[of][:, pairs.free].reshape(-1, k.shape[-1])))
        for head in range(group * joined, (group + 1) * joined):
            for query in range(head * shared, (head + 1) * shared):
                turned = columns[:, head - of.start, 0].conj()[:, None] * turned_q[query]
                asked.append(pairs.real(turned, free_q[head - of.start].T @ q[query][pairs.free]))
    _put(layer, "k", torch.stack(rows), new)
    _put(layer, "q", torch.stack(asked), new)


def _align_free(layer: Layer, pairs: Pairs, of: slice, metrics: Tensor) -> tuple[Tensor, Tensor]:
    """Of the features that are not rotated, in the heads ``of``: encode [free, heads·free] and decode [heads, free, free]."""
    free, heads, dim = pairs.free, of.stop - of.start, layer.mixer.head_dim
    if not len(free):
        return metrics.new_empty(0, 0), metrics.new_empty(heads, 0, 0)
    at = torch.cat([head * dim + free for head in range(of.start, of.stop)])
    encode, decode = lowest(layer.seen.kv[at][:, at], [metrics[head][free][:, free] for head in range(of.start, of.stop)], len(free))
    return encode, decode.reshape(heads, len(free), len(free))


def _align_values(layer: Layer, count: int, metrics: Tensor, new: dict[str, Tensor]) -> None:
    mixer, size = layer.mixer, layer.mixer.value_dim
    joined, shared, keys = mixer.kv_heads // count, mixer.heads // mixer.kv_heads, mixer.kv_heads * mixer.head_dim
    v, o = _columns(layer, "v", mixer.kv_heads), layer.weight("o.weight").reshape(-1, mixer.heads, size)
    rows, out = [], o.clone()
    for group in range(count):
        heads: Sequence[int] = range(group * joined, (group + 1) * joined)
        at = slice(keys + heads[0] * size, keys + (heads[-1] + 1) * size)
        encode, decode = lowest(layer.seen.kv[at, at], [metrics[head] for head in heads], size)
        rows.append(encode @ v[heads[0] : heads[-1] + 1].reshape(joined * size, -1))
        for number, head in enumerate(heads):
            queries = slice(head * shared, (head + 1) * shared)
            out[:, queries] = o[:, queries] @ decode[number * size : (number + 1) * size]
    _put(layer, "v", torch.stack(rows), new)
    new[f"{layer.path}.o.weight"] = out.reshape(len(out), -1)
