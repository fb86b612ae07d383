"""What a compressed model is next to the original: loss, divergence and agreement over text, each played as it is stored."""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UserError
from hasten.engine.backends import choose_backend, open_scorer
from hasten.measure import Windows
from hasten.model import Model
from hasten.program import Batch

LOGITS_BYTES = 64 << 20  # of one model's logits held at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Means over ``tokens`` predicted tokens: both losses and KL(base ‖ model) in nats, and how often both put the same token first."""

    base_loss: float
    loss: float
    kl: float
    agreement: float
    tokens: int

    @property
    def increase(self) -> float:
        """Of the loss, as a share of the original's."""
        return self.loss / self.base_loss - 1


def compare(base: Model, model: Model, windows: Windows, window: int, report: Callable[[int, int], None] | None = None) -> Comparison:
    """Both models over ``windows`` of up to ``window`` predicted tokens, on the native backend where it plays them.

    Raises UserError where the text is empty or a model's logits are not finite."""
    players = [open_scorer(each, choose_backend(each)[0], window) for each in (base, model)]
    together = max(1, LOGITS_BYTES // (4 * model.spec.vocab * window))
    ordered = sorted(windows.windows, key=len, reverse=True)
    sums = np.zeros(4)
    tokens = 0
    for begin in range(0, len(ordered), together):
        batch = ordered[begin : begin + together]
        targets = np.concatenate([np.asarray(ids[1:]) for ids in batch])
        asked = Batch.of([ids[:-1] for ids in batch])
        first, second = (_log_probabilities(player.score(asked), each.name) for player, each in zip(players, (base, model)))
        rows = np.arange(len(targets))
        sums += [
            -first[rows, targets].sum(dtype=np.float64),
            -second[rows, targets].sum(dtype=np.float64),
            (np.exp(first) * (first - second)).sum(dtype=np.float64),
            (first.argmax(-1) == second.argmax(-1)).sum(),
        ]
        tokens += len(targets)
        if report is not None:
            report(tokens, windows.tokens)
    if not tokens:
        raise UserError("the text to compare on is too short: no token is left to predict")
    base_loss, loss, kl, agreement = (float(each) for each in sums / tokens)
    return Comparison(base_loss, loss, kl, agreement, tokens)


def _log_probabilities(logits: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if not np.isfinite(logits.max(axis=-1)).all():
        raise UserError(f"{name}: the model's logits are not finite, so there is nothing to compare; check its weights")
    shifted: NDArray[np.float32] = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64, keepdims=True)).astype(np.float32)
    return shifted
