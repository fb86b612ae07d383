"""What is to become small: the loss of labels, and what losses over a vocabulary are made of."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.program import Batch
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
        logits = at_rows(values["logits"], rows).float()

        def one(piece: Tensor, at: slice) -> tuple[Tensor, dict[str, Tensor]]:
            hard = F.cross_entropy(piece, targets[at], reduction="sum")
            return hard, {"labels": hard}

        return Loss(*in_pieces(logits, one))


PIECE = 1 << 20
"""Logits that are compared at once: what is in between stays in the processor's caches, where all rows' would go to memory and back."""

PieceLoss = Callable[[Tensor, slice], tuple[Tensor, Mapping[str, Tensor]]]
"""Of some rows of logits, and which they are: what is differentiated, and parts by name, for the log."""


def in_pieces(logits: Tensor, loss: PieceLoss) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The sums of what ``loss`` gives for each piece of ``logits`` [rows, vocabulary], differentiable once, in them alone: the gradient is
    computed with each piece, and kept."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return _InPieces.apply(logits, loss)  # type: ignore[no-any-return, no-untyped-call]
    return _summed(loss(logits[at], at) for at in _pieces(logits))


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // max(1, logits.shape[-1]))
    return (slice(begin, begin + step) for begin in range(0, max(1, len(logits)), step))


def _summed(found: Iterable[tuple[Tensor, Mapping[str, Tensor]]]) -> tuple[Tensor, Mapping[str, Tensor]]:
    totals, parts = zip(*found, strict=True)
    return torch.stack(totals).sum(), {name: torch.stack([each[name] for each in parts]).sum().detach() for name in parts[0]}


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: PieceLoss) -> tuple[Tensor, Mapping[str, Tensor]]:
        gradient = torch.empty_like(logits)

        def one(at: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
            with torch.enable_grad():
                piece = logits[at].detach().requires_grad_()
                own, parts = loss(piece, at)
                (gradient[at],) = torch.autograd.grad(own, piece)
            return own.detach(), parts

        found = _summed(one(at) for at in _pieces(logits))
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer[0]), None


def divergence(student: Tensor, teacher: Tensor, kind: Divergence) -> Tensor:
    """The sum over rows of a divergence between two distributions given by log-probabilities [rows, vocabulary], in nats."""
    match kind:
        case "forward":  # the teacher's entropy apart, so that one product is all that is differentiated
            likely = teacher.exp()
            return torch.dot(likely.flatten(), teacher.flatten()) - torch.dot(likely.flatten(), student.flatten())
        case "reverse":
            return F.kl_div(teacher, student, reduction="sum", log_target=True)
        case "jensen-shannon":
            middle = torch.logaddexp(teacher, student) - math.log(2)
            return (
                F.kl_div(middle, teacher, reduction="sum", log_target=True) + F.kl_div(middle, student, reduction="sum", log_target=True)
            ) / 2


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Of logits, or of log-probabilities at another temperature, [rows, vocabulary]."""
    return F.log_softmax(logits / temperature if temperature != 1 else logits, -1)


def learned_rows(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Of examples laid end to end without their last tokens: the rows that are learned from, and the tokens they are to predict."""
    rows, targets, begin = [], [], 0
    for example in examples:
        rows.append(torch.arange(begin + example.learned_from - 1, begin + len(example.ids) - 1))
        targets.append(torch.tensor(example.ids[example.learned_from :]))
        begin += len(example.ids) - 1
    return torch.cat(rows), torch.cat(targets)


def at_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values`` [T, …] at ``rows``, which are distinct and rise: all of them as they are, for gradients of rows that are picked take a
    pass over memory more."""
    return values if len(rows) == len(values) else values[rows]
