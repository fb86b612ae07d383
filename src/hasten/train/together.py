"""Learning from others: a teacher that stays as it is, one that learns too, or peers that learn from one another.

All of them are members of one joined Program (`hasten.train.joint`), so a teacher that stays is one whose weights are fixed, and every
kind is trained, killed and gone on with as a single model is."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.program import Batch
from hasten.train.batches import Example
from hasten.train.distances import Distance
from hasten.train.joint import of_member
from hasten.train.objectives import Loss, in_pieces, learned_rows


@dataclasses.dataclass(frozen=True, slots=True)
class Follows:
    """``weight`` times the mean distance from ``others``, which are called by their names; ``name`` is what the log calls it."""

    name: str
    weight: float
    distance: Distance
    others: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Learner:
    """A member that learns: ``labels`` times the text's loss, and what it follows. Those it follows learn nothing by it."""

    name: str
    labels: float = 0.0
    follows: tuple[Follows, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Together:
    """The sum of what ``learners`` each lose. A teacher that learns nothing is followed by them and is no learner; peers follow each other
    (Deep Mutual Learning, Zhang et al. 2017, arXiv:1706.00384)."""

    learners: tuple[Learner, ...]

    def __post_init__(self) -> None:
        for learner in self.learners:
            if learner.labels < 0 or any(each.weight < 0 for each in learner.follows):
                raise ConfigError(f"{learner.name} learns with a weight below 0; accepted is 0 or more")
            if learner.labels == 0 and not any(each.weight and each.others for each in learner.follows):
                raise ConfigError(f"{learner.name} learns from nothing: every weight is 0; give labels, soft, hidden or attention one")

    @property
    def taps(self) -> tuple[str, ...]:
        """Those of all learners, and of those they follow."""
        found = []
        for learner in self.learners:
            found.append(f"{learner.name}.logits")
            for each in learner.follows:
                found += [f"{learner.name}.{tap}" for tap in each.distance.own]
                found += [f"{other}.{tap}" for other in each.others for tap in each.distance.others]
        return tuple(dict.fromkeys(found))

    @property
    def key(self) -> str:
        """Of everything but the members themselves."""
        said = [
            (learner.name, learner.labels, [(each.name, each.weight, each.distance.key, each.others) for each in learner.follows])
            for learner in self.learners
        ]
        return f"together {said}"

    def __call__(self, values: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Loss:
        """See Objective."""
        rows, targets = learned_rows(examples)
        total, parts = torch.zeros(()), {}
        for learner in self.learners:
            own = of_member(learner.name, values)
            with torch.set_grad_enabled(learner.labels > 0):  # for the log it is computed all the same
                labels, _ = in_pieces(
                    own["logits"][rows].float(), lambda piece, at: (F.cross_entropy(piece, targets[at], reduction="sum"), {})
                )
            parts[f"{learner.name}.labels"] = labels.detach()
            total = total + learner.labels * labels
            for each in learner.follows:
                apart = [
                    each.distance(own, {name: value.detach() for name, value in of_member(other, values).items()}, batch, examples)
                    for other in each.others
                ]
                distance = torch.stack(apart).mean()
                parts[f"{learner.name}.{each.name}"] = distance.detach()
                total = total + each.weight * distance
        return Loss(total, parts)


def taps_of(together: Together, member: str) -> tuple[str, ...]:
    """Of its taps, those of ``member``, under its own names: what must be played of it."""
    return tuple(tap.removeprefix(f"{member}.") for tap in together.taps if tap.startswith(f"{member}."))
