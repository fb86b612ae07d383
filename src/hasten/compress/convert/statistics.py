"""What the keys, values and queries of one layer are like over a text: their second moments."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from hasten.compress.blocks import Played
from hasten.compress.convert.mixers import Read
from hasten.spec import Attention

UNSEEN = 1e-4
"""How much of the weights' own moments is added to those of a text, as a share: what a short text never shows is not nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """Moments a token, float64. ``kv`` [K·(key + value), K·(key + value)]: of all heads' keys, then all heads' values, second moments;
    ``mean`` their means; ``queries`` [heads, key, key]: second moments of each head's queries."""

    kv: Tensor
    mean: Tensor
    queries: Tensor


def statistics(played: Played, weights: Mapping[str, Tensor], mixer: Attention, read: Read, path: str) -> Statistics:
    """Over the text of ``played``, before any rotation."""
    keys, values = mixer.kv_heads * mixer.head_dim, mixer.kv_heads * mixer.value_dim
    kv = torch.zeros(keys + values, keys + values, dtype=torch.float64)
    mean = torch.zeros(keys + values, dtype=torch.float64)
    queries = torch.zeros(mixer.heads, mixer.head_dim, mixer.head_dim, dtype=torch.float64)
    tokens = 0
    for made in played.outputs(weights, list(dict.fromkeys((read.q, read.k, read.v)))):
        both = torch.cat([made[read.k], made[read.v]], dim=1)
        q = made[read.q].reshape(-1, mixer.heads, mixer.head_dim).transpose(0, 1)
        kv += (both.T @ both).double()
        mean += both.sum(0, dtype=torch.float64)
        queries += (q.transpose(1, 2) @ q).double()
        tokens += len(both)
    rows = torch.cat([weights[f"{path}.k.weight"], weights[f"{path}.v.weight"]]).double()
    gram, kv = rows @ rows.T, kv / tokens
    kv += UNSEEN * kv.trace() / gram.trace().clamp_min(torch.finfo(torch.float64).tiny) * gram
    return Statistics(kv, mean / tokens, queries / tokens)


def influence(seen: Statistics, mixer: Attention, out: Tensor) -> tuple[Tensor, Tensor]:
    """What an error of a layer's keys and values does to its output, to first order and for errors that are independent from token to
    token: metrics float64 of each head's keys [K, key, key] and values [K, value, value].

    An error e of a key changes scores by q·e·scale, and so the output by that much of how a head's values spread in it; an error of a
    value changes it through the output projection ``out`` [width, heads·value]."""
    shared, kv_heads, keys = mixer.heads // mixer.kv_heads, mixer.kv_heads, mixer.kv_heads * mixer.head_dim
    o = out.double().reshape(-1, mixer.heads, mixer.value_dim).permute(1, 2, 0)  # [heads, value, width]
    reach = o @ o.transpose(1, 2)  # [heads, value, value]
    spread = (seen.kv - torch.outer(seen.mean, seen.mean))[keys:, keys:].reshape(kv_heads, mixer.value_dim, kv_heads, mixer.value_dim)
    own = torch.stack([spread[head, :, head] for head in range(kv_heads)]).repeat_interleave(shared, 0)
    size = (reach * own).sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    of_keys = seen.queries * (size * mixer.scale**2)[:, None, None]
    return (
        of_keys.reshape(kv_heads, shared, mixer.head_dim, mixer.head_dim).sum(1),
        reach.reshape(kv_heads, shared, mixer.value_dim, mixer.value_dim).sum(1),
    )


def lowest(moments: Tensor, metrics: list[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Of features with ``moments`` [N, N], ``rank`` combinations that say the most of them: encode [rank, N] and decode [N, rank], so
    that decode·encode·x is near x, errors measured block by block along N by ``metrics``. Combinations are of one size on average."""
    roots = [_root(metric) for metric in metrics]
    root, back = torch.block_diag(*[root for root, _ in roots]), torch.block_diag(*[back for _, back in roots])
    energy, vectors = torch.linalg.eigh(root @ moments @ root)
    best = vectors[:, -rank:].flip(1)
    encode, decode = best.T @ root, back @ best
    size = ((encode @ moments * encode).sum() / rank / (moments.trace() / len(moments))).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return encode / size, decode * size


def _root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a metric and its inverse; directions that hardly matter count a little."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-6 * values.max().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
