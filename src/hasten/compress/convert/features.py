"""Hedgehog's features (Zhang et al. 2024, arXiv:2402.04347) of one layer, learned so that linear attention looks where softmax attention
does: by the divergence of its weights from softmax's, query by query over a text, as there.

Matrices begin at the identity, as there, times what brings a head's queries or keys to the size START: the softmax of larger ones knows
their largest feature only, that of smaller ones nothing but their number."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hasten.backends.reference.scans import features
from hasten.compress.convert.layerwise import Layer
from hasten.compress.convert.mixers import attention_ops
from hasten.compress.threads import in_order
from hasten.spec import Attention

START = 2.0
"""Root mean square of what goes into the softmax of a feature as learning begins."""

TOGETHER = 2
"""Windows of a step."""

BLOCK = 128
"""Queries that are looked at together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """Matrices of queries [heads, head_dim, head_dim] and of keys [kv_heads, head_dim, head_dim], and how far linear attention's weights
    are from softmax's, nats a query: with what learning began with, and with these."""

    q: Tensor
    k: Tensor
    before: float
    after: float


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """Of one window, rotated where they are: queries ``q`` [heads, L, head_dim] and keys ``k`` [kv_heads, L, head_dim] as linear attention
    has them, and ``softmax_q`` and ``softmax_k``, those of the softmax that is to be imitated."""

    q: Tensor
    k: Tensor
    softmax_q: Tensor
    softmax_k: Tensor


def learn_features(layer: Layer, steps: int, rate: float) -> Features:
    """The features of ``layer``, by ``steps`` of Adam at ``rate`` (of what a matrix begins as), going round the text TOGETHER windows a
    step. They are fed what the converted layers before make, and softmax what those made before. Threads change no bit."""
    mixer, threads, text = layer.mixer, layer.plain.threads, functools.partial(_windows, layer)
    first = list(itertools.islice(text(), TOGETHER))
    begun = [_begin(torch.cat(rows, 1)) for rows in ([seen.q for seen in first], [seen.k for seen in first])]
    size = [each.diagonal(dim1=1, dim2=2)[:, :1, None] for each in begun]
    masters = [torch.eye(mixer.head_dim).repeat(len(each), 1, 1) for each in begun]
    optimizer = torch.optim.Adam(masters, betas=(0.9, 0.95))
    round_and_round = itertools.chain.from_iterable(text() for _ in itertools.count())
    for step in range(steps):
        together = list(itertools.islice(round_and_round, TOGETHER))
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        slopes = in_order(functools.partial(_slope, mixer=mixer, masters=masters, size=size), together, threads)
        for master, parts in zip(masters, zip(*slopes)):
            master.grad = torch.stack(parts).sum(0) / sum(seen.q.shape[1] for seen in together)
        optimizer.step()
    made = [master * by for master, by in zip(masters, size)]
    before, after = (_measured(text(), mixer, each, threads) for each in (begun, made))
    q, k = made if after < before else begun
    return Features(q, k, before, min(before, after))


def divergence(seen: Seen, mixer: Attention, q: Tensor, k: Tensor) -> Tensor:
    """KL(softmax ‖ linear) of the weights of one window with feature matrices ``q`` and ``k``: nats, summed over queries, mean of heads."""
    asked, told = _by_group(features(seen.q @ q.mT), mixer), features(seen.k @ k.mT)[:, None]  # [kv_heads, heads a group, L, 2·head_dim]
    whole = (asked * told.cumsum(2)).sum(-1)  # what the weights of all that a query sees are divided by
    queries, keys, near = _by_group(seen.softmax_q, mixer), seen.softmax_k[:, None], -whole.log().sum()
    for begin in range(0, seen.q.shape[1], BLOCK):
        rows, known = slice(begin, begin + BLOCK), slice(begin + BLOCK)
        scores = queries[:, :, rows] @ keys[:, :, known].mT * mixer.scale
        later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(begin + 1)
        wanted = scores.masked_fill(later, -math.inf).softmax(-1)
        near = near + torch.special.entr(wanted).sum() + (wanted * (asked[:, :, rows] @ told[:, :, known].mT).log()).sum()
    return -near / mixer.heads


def _by_group(rows: Tensor, mixer: Attention) -> Tensor:
    by_group: Tensor = rows.unflatten(0, (mixer.kv_heads, -1))
    return by_group


def _begin(rows: Tensor) -> Tensor:
    """The identity for every head, times what brings its rows [heads, L, head_dim] to START."""
    size: Tensor = rows.square().mean((1, 2)).sqrt().clamp_min(1e-6)
    return torch.eye(rows.shape[-1]) * (START / size)[:, None, None]


def _slope(seen: Seen, mixer: Attention, masters: Sequence[Tensor], size: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [master.clone().requires_grad_() for master in masters]
        q, k = (leaf * by for leaf, by in zip(leaves, size))
        return torch.autograd.grad(divergence(seen, mixer, q, k), leaves)


def _measured(text: Iterator[Seen], mixer: Attention, made: Sequence[Tensor], threads: int) -> float:
    """Nats a query over the whole text."""

    def one(seen: Seen) -> tuple[float, int]:
        with torch.no_grad():
            return float(divergence(seen, mixer, *made)), seen.q.shape[1]

    found = list(in_order(one, text, threads))
    return sum(apart for apart, _ in found) / sum(queries for _, queries in found)


def _windows(layer: Layer) -> Iterator[Seen]:
    """The text, window by window."""
    append, attend = attention_ops(layer.plain.piece, layer.index)
    names = [attend.q, append.k]
    both = zip(layer.live.outputs(layer.weights, names), layer.plain.outputs(layer.weights, names))
    for (batch, _, _), found in zip(layer.plain.chunks, both):
        rows = [made[name].clone().unflatten(1, (-1, layer.mixer.head_dim)).transpose(0, 1) for made in found for name in names]
        offsets = batch.offsets.tolist()
        for begin, end in zip(offsets, offsets[1:]):
            yield Seen(*(each[:, begin:end] for each in rows))
