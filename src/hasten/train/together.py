"""Learning from others: a teacher that stays as it is, one that learns too, or peers that learn from one another.

Those that learn, and those that are looked into, are members of one joined Program (`hasten.train.joint`): a teacher that stays is one
whose weights are fixed, or, where only what it says counts, is played outside. Every kind is trained, killed and gone on with as a single
model is."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.program import Batch
from hasten.train.batches import Example
from hasten.train.distances import Distance, Soft
from hasten.train.joint import of_member
from hasten.train.objectives import Loss, PieceLoss, at_rows, in_pieces, learned_rows, log_probabilities
from hasten.train.teachers import Teacher


@dataclasses.dataclass(frozen=True, slots=True)
class SoftLabels:
    """Distillation (Hinton et al. 2015, arXiv:1503.02531) of one model alone: ``labels`` of the loss is the text's, the rest its distance
    from what ``teacher`` says."""

    teacher: Teacher
    soft: Soft = Soft()
    labels: float = 0.0
    taps: tuple[str, ...] = ("logits",)

    @property
    def key(self) -> str:
        """Of the teacher and how it teaches."""
        return f"{self.soft.key} {self.labels} {self.teacher.key}"

    def __call__(self, values: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Loss:
        """See Objective."""
        rows, targets = learned_rows(examples)
        heard = Heard("soft", 1 - self.labels, self.soft, [at_rows(self.teacher.logits(batch), rows)])
        return Loss(*in_pieces(at_rows(values["logits"], rows).float(), _said(self.labels, [heard], targets)))


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
    """The sum of what ``learners`` each lose. A teacher that learns nothing is followed by them and is no learner, and where only what it
    says counts it stands in ``outside``, by its name, rather than in the Program; peers follow each other (Deep Mutual Learning, Zhang et
    al. 2017, arXiv:1706.00384)."""

    learners: tuple[Learner, ...]
    outside: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in (each for learner in self.learners for each in learner.follows):
            if each.distance.others != ("logits",) and (strangers := self.outside.keys() & set(each.others)):
                raise ConfigError(f"{each.name} looks into {min(strangers)}, of whom only logits are there; play it beside its learners")
        for learner in self.learners:
            if learner.labels < 0 or any(each.weight < 0 for each in learner.follows):
                raise ConfigError(f"{learner.name} learns with a weight below 0; accepted is 0 or more")
            if learner.labels == 0 and not any(each.weight and each.others for each in learner.follows):
                raise ConfigError(f"{learner.name} learns from nothing: every weight is 0; give labels, soft, hidden or attention one")

    @property
    def taps(self) -> tuple[str, ...]:
        """Those of all learners, and of those in the Program that they follow."""
        found = []
        for learner in self.learners:
            found.append(f"{learner.name}.logits")
            for each in learner.follows:
                found += [f"{learner.name}.{tap}" for tap in each.distance.own]
                inside = (other for other in each.others if other not in self.outside)
                found += [f"{other}.{tap}" for other in inside for tap in each.distance.others]
        return tuple(dict.fromkeys(found))

    def taps_of(self, member: str) -> tuple[str, ...]:
        """Of its taps, those of ``member``, under its own names: what must be played of it."""
        return tuple(tap.removeprefix(f"{member}.") for tap in self.taps if tap.startswith(f"{member}."))

    @property
    def key(self) -> str:
        """Of everything but the members themselves."""
        said = [
            (learner.name, learner.labels, [(each.name, each.weight, each.distance.key, each.others) for each in learner.follows])
            for learner in self.learners
        ]
        return f"together {said} {[(name, teacher.key) for name, teacher in self.outside.items()]}"

    def __call__(self, values: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Loss:
        """See Objective."""
        rows, targets = learned_rows(examples)
        values = {**values, **{f"{name}.logits": teacher.logits(batch) for name, teacher in self.outside.items()}}
        total, parts = torch.zeros(()), dict[str, Tensor]()
        for learner in self.learners:
            own = of_member(learner.name, values)
            found = dict[str, Tensor]()
            heard = list[Heard]()
            for each in learner.follows:
                others = [{name: value.detach() for name, value in of_member(other, values).items()} for other in each.others]
                if isinstance(each.distance, Soft):
                    heard.append(Heard(each.name, each.weight, each.distance, [at_rows(other["logits"], rows).float() for other in others]))
                    continue
                distance = torch.stack([each.distance(own, other, batch, examples) for other in others]).mean()
                found[each.name] = distance.detach()
                total = total + each.weight * distance
            with torch.set_grad_enabled(torch.is_grad_enabled() and (learner.labels > 0 or bool(heard))):
                said, parts_said = in_pieces(at_rows(own["logits"], rows).float(), _said(learner.labels, heard, targets))
            total = total + said
            parts |= {f"{learner.name}.{name}": part for name, part in {**parts_said, **found}.items()}
        return Loss(total, parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Heard:
    """What a learner listens to: ``weight`` times the mean distance from ``logits`` [R, vocabulary], each another's."""

    name: str
    weight: float
    distance: Soft
    logits: Sequence[Tensor]


def _said(labels: float, heard: Sequence[Heard], targets: Tensor) -> PieceLoss:
    """What a learner says against ``targets`` [R] and what it hears: one pass over its own logits."""

    def of_piece(piece: Tensor, at: slice) -> tuple[Tensor, dict[str, Tensor]]:
        own = log_probabilities(piece, 1.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and labels > 0):  # for the log it is computed all the same
            hard = F.nll_loss(own, targets[at], reduction="sum")
        total, parts = labels * hard, {"labels": hard}
        for each in heard:
            parts[each.name] = torch.stack([each.distance.apart(own, logits[at]) for logits in each.logits]).mean()
            total = total + each.weight * parts[each.name]
        return total, parts

    return of_piece
