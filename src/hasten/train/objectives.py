"""What is to become small: the loss of labels, or the distance from a teacher."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.backends.reference import play
from hasten.program import Batch, Program
from hasten.train.batches import Example

Divergence = Literal["forward", "reverse", "jensen-shannon"]
"""KL(teacher ‖ student), KL(student ‖ teacher), or the mean of both against their mixture."""


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """Sums over learned tokens: ``total``, which is differentiated, and ``parts``, for the log."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Objective(Protocol):
    """``taps`` are the values it looks at; ``key`` is one string for everything it depends on."""

    @property
    def taps(self) -> tuple[str, ...]: ...

    @property
    def key(self) -> str: ...

    def __call__(self, values: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Loss:
        """The loss of ``examples``, of which ``batch`` holds all tokens but each one's last, given the taps' ``values``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Labels:
    """The negative log-likelihood, in nats, of the text itself."""

    taps: tuple[str, ...] = ("logits",)
    key: str = "labels"

    def __call__(self, values: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Loss:
        """See Objective."""
        rows, targets = learned_rows(examples)
        loss = F.cross_entropy(values["logits"][rows].float(), targets, reduction="sum")
        return Loss(loss, {"labels": loss.detach()})


@dataclasses.dataclass(frozen=True, slots=True)
class SoftLabels:
    """Distillation (Hinton et al. 2015, arXiv:1503.02531): ``labels`` of the loss is the text's, the rest T² times the divergence of the
    student's distribution from the teacher's at ``temperature`` T. The teacher is played here, with ``weights``, and learns nothing."""

    program: Program
    weights: Mapping[str, Tensor]
    temperature: float = 1.0
    divergence: Divergence = "forward"
    labels: float = 0.0
    taps: tuple[str, ...] = ("logits",)

    @property
    def key(self) -> str:
        """Of the teacher and how it teaches."""
        digest = hashlib.sha256(self.program.text().encode())
        for name, tensor in sorted(self.weights.items()):
            digest.update(name.encode() + tensor.detach().float().contiguous().numpy().data)
        return f"soft {self.temperature} {self.divergence} {self.labels} {digest.hexdigest()}"

    def __call__(self, values: Mapping[str, Tensor], batch: Batch, examples: Sequence[Example]) -> Loss:
        """See Objective."""
        rows, targets = learned_rows(examples)
        with torch.no_grad():
            teacher = play(self.program, self.weights, batch)[0]["logits"][rows].float()
        student = values["logits"][rows].float()
        soft = divergence(student / self.temperature, teacher / self.temperature, self.divergence) * self.temperature**2
        hard = F.cross_entropy(student, targets, reduction="sum")
        return Loss(self.labels * hard + (1 - self.labels) * soft, {"labels": hard.detach(), "soft": soft.detach()})


def divergence(student: Tensor, teacher: Tensor, kind: Divergence) -> Tensor:
    """The sum over rows of a divergence between two distributions given by logits [rows, vocabulary], in nats."""
    q, p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    match kind:
        case "forward":
            return F.kl_div(q, p, reduction="sum", log_target=True)
        case "reverse":
            return F.kl_div(p, q, reduction="sum", log_target=True)
        case "jensen-shannon":
            middle = torch.logaddexp(p, q) - math.log(2)
            return (F.kl_div(middle, p, reduction="sum", log_target=True) + F.kl_div(middle, q, reduction="sum", log_target=True)) / 2


def learned_rows(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Of examples laid end to end without their last tokens: the rows that are learned from, and the tokens they are to predict."""
    rows, targets, begin = [], [], 0
    for example in examples:
        rows.append(torch.arange(begin + example.learned_from - 1, begin + len(example.ids) - 1))
        targets.append(torch.tensor(example.ids[example.learned_from :]))
        begin += len(example.ids) - 1
    return torch.cat(rows), torch.cat(targets)
