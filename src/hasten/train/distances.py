"""How far a learner is from another model, in what they say or in what they hold inside: sums over learned tokens, 0 for equals.

Shape legend: T tokens of the batch, H heads, C context positions, N features."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.program import Batch
from hasten.train.batches import Example
from hasten.train.objectives import Divergence, at_rows, divergence, in_pieces, learned_rows, log_probabilities

Measure = Literal["mse", "cosine"]
"""‖s − t‖² / ‖t‖², or 1 − cos(s, t), of each token's features."""

Relation = Literal["q", "k", "v"]

LEAST = 1e-9
"""A probability below is taken for this where a logarithm of it is: a learner may not see what the other does."""


class Distance(Protocol):
    """``own`` and ``others`` are the taps that it compares, by the names that each model has for them."""

    @property
    def own(self) -> tuple[str, ...]: ...

    @property
    def others(self) -> tuple[str, ...]: ...

    @property
    def key(self) -> str: ...

    def __call__(self, own: Mapping[str, Tensor], other: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Tensor:
        """The sum over the learned tokens of ``examples``, differentiable in the learner's values."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Soft:
    """T² times the divergence of the distributions at ``temperature`` T, in nats (Hinton et al. 2015, arXiv:1503.02531)."""

    temperature: float = 1.0
    kind: Divergence = "forward"
    own: tuple[str, ...] = ("logits",)
    others: tuple[str, ...] = ("logits",)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; accepted is more than 0")

    @property
    def key(self) -> str:
        """Of all its settings."""
        return f"soft {self.temperature} {self.kind}"

    def __call__(self, own: Mapping[str, Tensor], other: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Tensor:
        """See Distance."""
        rows, _ = learned_rows(examples)
        teacher = at_rows(other["logits"], rows).float().detach()
        return in_pieces(
            at_rows(own["logits"], rows).float(), lambda piece, at: (self.apart(log_probabilities(piece, 1.0), teacher[at]), {})
        )[0]

    def apart(self, own: Tensor, other: Tensor) -> Tensor:
        """Of the learner's log-probabilities of some rows from another's logits of them, [R, vocabulary] both."""
        if self.temperature != 1:
            own = log_probabilities(own, self.temperature)
        return divergence(own, log_probabilities(other, self.temperature), self.kind) * self.temperature**2


@dataclasses.dataclass(frozen=True, slots=True)
class Hidden:
    """The mean over ``pairs`` of values [T, N], of the learner and of the other, of how far they are apart: hidden states (Sun et al. 2019,
    arXiv:1908.09355; Jiao et al. 2019, arXiv:1909.10351), of which the learner's are projected where widths differ."""

    pairs: tuple[tuple[str, str], ...]
    measure: Measure = "mse"

    @property
    def own(self) -> tuple[str, ...]:
        """The learner's taps."""
        return tuple(own for own, _ in self.pairs)

    @property
    def others(self) -> tuple[str, ...]:
        """The other's taps."""
        return tuple(other for _, other in self.pairs)

    @property
    def key(self) -> str:
        """Of all its settings."""
        return f"hidden {self.pairs} {self.measure}"

    def __call__(self, own: Mapping[str, Tensor], other: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Tensor:
        """See Distance."""
        rows, _ = learned_rows(examples)
        sums = []
        for mine, theirs in self.pairs:
            s, t = at_rows(own[mine], rows).float(), at_rows(other[theirs], rows).float()
            if self.measure == "mse":
                sums.append(((s - t).square().sum(-1) / t.square().sum(-1).clamp(min=LEAST)).sum())
            else:
                sums.append((1 - F.cosine_similarity(s, t, dim=-1)).sum())
        return torch.stack(sums).mean()


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionMaps:
    """The mean over ``pairs`` of attention maps [T, H, C], and over their heads, of KL(other ‖ learner), in nats (MiniLM, Wang et al.
    2020, arXiv:2002.10957). Both have as many heads."""

    pairs: tuple[tuple[str, str], ...]

    @property
    def own(self) -> tuple[str, ...]:
        """The learner's taps."""
        return tuple(own for own, _ in self.pairs)

    @property
    def others(self) -> tuple[str, ...]:
        """The other's taps."""
        return tuple(other for _, other in self.pairs)

    @property
    def key(self) -> str:
        """Of all its settings."""
        return f"maps {self.pairs}"

    def __call__(self, own: Mapping[str, Tensor], other: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Tensor:
        """See Distance."""
        rows, _ = learned_rows(examples)
        sums = []
        for mine, theirs in self.pairs:
            q, p = at_rows(own[mine], rows).float(), at_rows(other[theirs], rows).float()
            sums.append((p * (p.clamp(min=LEAST).log() - q.clamp(min=LEAST).log())).sum() / q.shape[1])
        return torch.stack(sums).mean()


@dataclasses.dataclass(frozen=True, slots=True)
class Relations:
    """Self-attention relations (MiniLMv2, Wang et al. 2020, arXiv:2012.15828): queries, keys and values [T, N] are each cut into ``heads``
    relation heads of n features, whatever heads the models have, and KL(other ‖ learner) is taken of softmax(x·xᵀ/√n) over the positions
    up to a token's own. The mean over ``pairs`` of mixers' paths, over ``kinds`` and relation heads, in nats."""

    pairs: tuple[tuple[str, str], ...]
    heads: int
    kinds: tuple[Relation, ...] = ("q", "k", "v")

    @property
    def own(self) -> tuple[str, ...]:
        """The learner's taps."""
        return tuple(f"{own}.{kind}" for own, _ in self.pairs for kind in self.kinds)

    @property
    def others(self) -> tuple[str, ...]:
        """The other's taps."""
        return tuple(f"{other}.{kind}" for _, other in self.pairs for kind in self.kinds)

    @property
    def key(self) -> str:
        """Of all its settings."""
        return f"relations {self.pairs} {self.heads} {self.kinds}"

    def __call__(self, own: Mapping[str, Tensor], other: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Tensor:
        """See Distance."""
        sums = []
        for rows, learned in _of_one_length(examples):
            for mine, theirs in zip(self.own, self.others):
                q, p = (self._relations(values[name][rows]) for values, name in ((own, mine), (other, theirs)))
                apart = F.kl_div(q, p, reduction="none", log_target=True)
                sums.append((apart.sum(-1).mean(1) * learned).sum())
        return torch.stack(sums).sum() / (len(self.pairs) * len(self.kinds))

    def _relations(self, x: Tensor) -> Tensor:
        """[B, L, N] → log-probabilities [B, heads, L, L]; where a position is not seen 0, which in both is no difference."""
        heads = x.float().unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = heads @ heads.mT / math.sqrt(heads.shape[-1])
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return F.log_softmax(scores.masked_fill(hidden, -math.inf), dim=-1).masked_fill(hidden, 0.0)


def _of_one_length(examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of examples laid end to end without their last tokens, those of one length together: their rows [B, L], and 1 [B, L] where the next
    token is learned, else 0."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    begin = 0
    for example in examples:
        length = len(example.ids) - 1
        learned = (torch.arange(length) >= example.learned_from - 1).float()
        found.setdefault(length, []).append((torch.arange(begin, begin + length), learned))
        begin += length
    for together in found.values():
        yield torch.stack([rows for rows, _ in together]), torch.stack([learned for _, learned in together])
