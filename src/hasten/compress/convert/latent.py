"""Keys and values as up-projections of one cached row a token: multi-head latent attention (DeepSeek-V2, 2024), made of an attention that
has heads of its own for them. As in TransMLA (Meng et al. 2025, arXiv:2502.07864) pairs of one frequency are first mixed across heads,
which commutes with their rotation, so that few of them hold most; those whose rotation matters most stay rotated, in a part that all heads
share, and the others become free of position and share the latent row with the values (MHA2MLA, Ji et al. 2025, arXiv:2502.14837).

Two things are other than there. Which pairs stay rotated is chosen by what would be lost, pair by pair and layer by layer, for a Spec can
say any frequencies. And errors of keys and values are measured by what they do to the layer's output, which weighs one against the other.

A pair that is rotated no more keeps the mean of its rotations over the distances that attention looks at, taken to fall as 1 / (1 + d)."""

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
from hasten.program.rotary import rotary_frequencies
from hasten.spec import Attention, Causal, LatentAttention, LongRope, PerPair, Rotary

DISTANCES = 512
"""Tokens back that a pair's mean rotation is taken over."""


class Latent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of ``rank`` features for keys and values and ``rope_dim`` rotated ones (half a head's unless given) a token and layer, in
    ``layers`` (all with attention unless given). ``fit`` says whether the output projection is fitted afterwards."""

    rank: int
    rope_dim: int | None = None
    layers: tuple[int, ...] | None = None
    fit: bool = True

    def turned(self, mixer: Attention) -> int:
        """Rotated features in ``mixer``'s row."""
        dims = mixer.position.dims if isinstance(mixer.position, Rotary) else 0
        return max(2, dims // 4 * 2) if self.rope_dim is None else self.rope_dim


def check_latent(model: Model, settings: Latent) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    layers = chosen_layers(model, settings.layers)
    refuse_shared(model)
    require_own_weights(model, layers)
    for index in layers:
        mixer = attention_of(model.spec, index)
        _refuse_kind(mixer, index)
        rope, keys, values = settings.turned(mixer), mixer.kv_heads * mixer.head_dim, mixer.kv_heads * mixer.value_dim
        most = mixer.kv_heads * (mixer.position.dims if isinstance(mixer.position, Rotary) else 0)
        if rope % 2 or not 2 <= rope <= most:
            raise ConfigError(f"rope_dim is {rope}; layer {index} can keep an even number of rotated features, from 2 to {most}")
        if not 1 <= settings.rank <= keys + values - 1:
            raise ConfigError(f"rank is {settings.rank}; layer {index} has {keys + values} features of keys and values to factor")
        if settings.rank + rope >= keys + values:
            raise ConfigError(
                f"rank {settings.rank} and rope_dim {rope} make a row of {settings.rank + rope} features, and layer {index} keeps "
                f"{keys + values} now: no smaller; take less of one"
            )


def _refuse_kind(mixer: Attention, index: int) -> None:
    reasons = (
        (not isinstance(mixer.position, Rotary), "no rotary positions, of which a latent row keeps a part"),
        (isinstance(mixer.position, Rotary) and isinstance(mixer.position.scaling, LongRope), "frequencies that depend on the context"),
        (not isinstance(mixer.visible, Causal), "a window, and latent attention sees everything before it"),
        (mixer.q_norm is not None or mixer.k_norm is not None, "norms over its queries or keys, which no projection takes over"),
        (mixer.clip is not None, "projections that are clipped"),
        (mixer.bias, "biases on its queries, keys and values, which latent attention has not"),
        (mixer.out_bias, "a bias on its output, which latent attention has not"),
        (mixer.softcap is not None, "capped scores, which latent attention has not"),
        (mixer.sinks, "sinks, which latent attention has not"),
        (mixer.gate, "a gate, which latent attention has not"),
    )
    for applies, reason in reasons:
        if applies:
            raise UnsupportedError(f"layer {index} cannot become latent attention: it has {reason}; leave it out of 'layers'")


def latent(model: Model, settings: Latent, text: Text | None, run: Run) -> Model:
    """``model`` with latent attention. No family describes it: the row has no norm, and each layer its own frequencies."""
    check_latent(model, settings)  # again: an earlier step may have changed it
    layers = chosen_layers(model, settings.layers)
    context = model.spec.context

    def change(layer: Layer) -> Changed:
        return factored(layer, settings.rank, settings.turned(layer.mixer), context)

    done = convert_layers(model, layers, text, run, change, settings.fit)
    evidence = {
        "layers": list(layers),
        "cache_bytes_per_token": [cache_bytes(model.spec), cache_bytes(done.spec)],
        "output_error": {name: [round(share, 5) for share in shares] for name, shares in done.errors.items()},
    }
    return converted(model, done.spec, done.weights, record("latent", settings, evidence))


def factored(layer: Layer, rank: int, rope: int, context: int) -> Changed:
    """A layer whose keys and values are a row of ``rank`` latent features and ``rope`` rotated ones."""
    mixer, pairs, path = layer.mixer, Pairs.of(layer.mixer), layer.path
    if not isinstance(rotary := mixer.position, Rotary):
        raise ConfigError(f"layer {layer.index} has no rotary positions")
    frequencies, magnitude = rotary_frequencies(rotary, context)
    heads, dim, shared = mixer.kv_heads, mixer.head_dim, mixer.heads // mixer.kv_heads
    keys, values = heads * dim, heads * mixer.value_dim
    of_keys, of_values = influence(layer.seen, mixer, layer.weight("o.weight"))
    louder = torch.ones(dim, dtype=torch.float64)  # what both rotations multiply a score's part by
    louder[pairs.first] = louder[pairs.second] = magnitude**2
    of_keys = of_keys * torch.outer(louder, louder)

    columns, energy = principal(pairs.moments(layer.seen.kv[:keys, :keys]), pairs.energy(of_keys))
    still = _mean_rotation(torch.tensor(frequencies, dtype=torch.float64), context)
    lost = energy * (1 - still.abs().square())[:, None]
    chosen = sorted(torch.argsort(lost.flatten(), descending=True, stable=True)[: rope // 2].tolist())  # by frequency
    turned = torch.zeros(lost.numel(), dtype=torch.bool)
    turned[chosen] = True
    turned = turned.reshape(lost.shape)

    # What is left of the keys, free of position: k → Σ over the other combinations, times the mean rotation.
    inverse = torch.linalg.inv(columns)
    left = still[:, None, None] * columns @ (~turned[:, :, None] * inverse)  # [pairs, heads, heads]
    rest = _by_feature(left, pairs, heads)
    kept = torch.cat([pairs.first[~turned.all(1)], pairs.second[~turned.all(1)], pairs.free]).sort().values
    kept = kept if len(kept) else torch.arange(1)
    both = torch.block_diag(rest, torch.eye(values, dtype=torch.float64))
    at = torch.cat([head * dim + kept for head in range(heads)])
    within = torch.cat([at, keys + torch.arange(values)])
    moments = (both @ layer.seen.kv @ both.T)[within][:, within]
    rank = min(rank, len(within))
    encode, decode = lowest(moments, [metric[kept][:, kept] for metric in of_keys] + list(of_values), rank)

    rows = torch.cat([layer.weight("k.weight"), layer.weight("v.weight")])
    k = pairs.complex(layer.weight("k.weight").reshape(heads, dim, -1))
    combined = torch.einsum("pch,hpn->pcn", inverse, k).flatten(0, 1)[chosen]  # [rope / 2, width]
    q = layer.weight("q.weight").reshape(mixer.heads, dim, -1) * louder[:, None]
    asked = torch.einsum("phc,hgpn->hgpcn", columns.conj(), pairs.complex(q).unflatten(0, (heads, shared)))
    asked = asked.flatten(0, 1).flatten(1, 2)[:, chosen]  # [heads, rope / 2, width]
    up = decode[: len(at)].reshape(heads, len(kept), rank).repeat_interleave(shared, 0)
    out = decode[len(at) :].reshape(heads, mixer.value_dim, rank).repeat_interleave(shared, 0)
    places = [index // heads for index in chosen]
    base = rotary.base
    divisors = tuple(base ** (-2.0 * slot / rope) / frequencies[place] for slot, place in enumerate(places))
    new = {
        "q.weight": torch.cat([q[:, kept], asked.real, asked.imag], 1).flatten(0, 1),
        "kv_a.weight": torch.cat([encode @ (both @ rows)[within], combined.real, combined.imag]),
        "k_up.weight": up.transpose(1, 2),
        "v_up.weight": out,
        "o.weight": layer.weight("o.weight"),
    }
    become = LatentAttention(
        heads=mixer.heads, q_rank=None, kv_rank=rank, nope_dim=len(kept), rope_dim=rope, value_dim=mixer.value_dim, scale=mixer.scale,
        rotary=Rotary(base=base, dims=rope, scaling=PerPair(divisors=divisors)), norm=None,
    )  # fmt: skip
    return Changed(become, {f"{path}.{name}": tensor.float().contiguous() for name, tensor in new.items()})


def _mean_rotation(frequencies: Tensor, context: int) -> Tensor:
    """exp(−i·frequency·d) averaged over distances d by 1 / (1 + d): complex [pairs]."""
    distance = torch.arange(min(DISTANCES, context), dtype=torch.float64)
    weight = 1 / (1 + distance)
    angles = -torch.outer(frequencies, distance)
    return (torch.polar(torch.ones_like(angles), angles) * weight).sum(1) / weight.sum()


def _by_feature(mixing: Tensor, pairs: Pairs, heads: int) -> Tensor:
    """Complex factors across heads [pairs, heads, heads] as one matrix over features [heads·size, heads·size]; the free ones stay."""
    made = torch.zeros(heads, pairs.size, heads, pairs.size, dtype=torch.float64)
    a, b = pairs.first, pairs.second
    made[:, a, :, a], made[:, b, :, b] = mixing.real, mixing.real
    made[:, b, :, a], made[:, a, :, b] = mixing.imag, -mixing.imag
    for head in range(heads):
        made[head, pairs.free, head, pairs.free] = 1.0
    return made.reshape(heads * pairs.size, heads * pairs.size)
