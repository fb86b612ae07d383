"""Models next to the one they came from: loss, divergence and agreement over text, each played as it is stored."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UserError
from hasten.engine.backends import Scorer, choose_judge, open_scorer
from hasten.measure.evaluate import Windows, cut_windows
from hasten.measure.text import Corpus
from hasten.model import Model
from hasten.program import Batch

LOGITS_BYTES = 16 << 20  # of one model's logits held at a time
BEYOND = 2.0
"""Standard errors by which a loss must have risen for the rise to be more than which documents happened to be taken."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Of a mean over documents: its standard error, each document a cluster of tokens (the ratio estimator's, Cochran 1977, 6.4), and
    the 10th and 90th percentile of the documents' own means."""

    error: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True)
class OverDocuments:
    """The spreads of a Comparison over ``documents`` documents. A document's own increase is a share of the base's loss over all."""

    documents: int
    base_loss: Spread
    loss: Spread
    increase: Spread
    kl: Spread
    agreement: Spread


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Means over ``tokens`` predicted tokens: both losses and KL(base ‖ model) in nats, and how often both put the same token first.
    ``over_documents`` is how they vary, None where there is one document only."""

    base_loss: float
    loss: float
    kl: float
    agreement: float
    tokens: int
    over_documents: OverDocuments | None = None

    @property
    def increase(self) -> float:
        """Of the loss, as a share of the original's."""
        return self.loss / self.base_loss - 1

    @property
    def worse(self) -> bool:
        """Has the loss risen beyond its spread over documents? With one document, has it risen at all?"""
        error = 0.0 if self.over_documents is None else self.over_documents.increase.error
        return self.increase > BEYOND * error

    @classmethod
    def of(cls, sums: NDArray[np.float64], tokens: NDArray[np.int64]) -> "Comparison":
        """From sums over the ``tokens`` [D] of each document: ``sums`` [D, 4] of both negative log-likelihoods, divergence and agreements.
        Raises UserError where no token was predicted."""
        found = tokens > 0
        sums, tokens = sums[found], tokens[found]
        count = int(tokens.sum())
        if not count:
            raise UserError("the text to compare on is too short: no token is left to predict")
        base_loss, loss, kl, agreement = (float(each) for each in sums.sum(axis=0) / count)
        spreads = None
        if len(tokens) > 1:
            of_base, of_model, of_kl, of_agreement = (_spread(sums[:, column], tokens, tokens) for column in range(4))
            rise = _spread(sums[:, 1] - sums[:, 0], sums[:, 0], tokens * base_loss)
            spreads = OverDocuments(len(tokens), of_base, of_model, rise, of_kl, of_agreement)
        return cls(base_loss, loss, kl, agreement, count, spreads)


def _spread(sums: NDArray[np.float64], over: NDArray[Any], each: NDArray[Any]) -> Spread:
    """Of sum(sums) / sum(over), a document a row; ``each`` is what a document's own sum is divided by."""
    left = sums - sums.sum() / over.sum() * over
    error = np.sqrt(len(sums) / (len(sums) - 1) * (left**2).sum()) / abs(over.sum())
    low, high = np.percentile(sums / each, [10, 90])
    return Spread(float(error), float(low), float(high))


def compare(
    base: Model, models: Sequence[Model], windows: Windows, window: int, report: Callable[[int, int], None] | None = None
) -> list[Comparison]:
    """Every one of ``models`` with ``base`` over ``windows`` of up to ``window`` predicted tokens, on the native backend where it plays
    them. All are open at once, and the base is played once for all.

    Raises UserError where the text is empty or a model's logits are not finite."""
    first, *others = (_Player(each.name, open_scorer(each, choose_judge(each), window)) for each in (base, *models))
    together = max(1, LOGITS_BYTES // (4 * base.spec.vocab * window))
    order = sorted(range(len(windows.windows)), key=lambda index: -len(windows.windows[index]))  # equal lengths run together
    documents = max(windows.documents, default=0) + 1
    sums, tokens = np.zeros((len(models), documents, 4)), np.zeros(documents, np.int64)
    for begin in range(0, len(order), together):
        batch = [windows.windows[index] for index in order[begin : begin + together]]
        lengths = [len(ids) - 1 for ids in batch]
        of = np.repeat([windows.documents[index] for index in order[begin : begin + together]], lengths)
        targets = np.concatenate([np.asarray(ids[1:]) for ids in batch])
        rows, asked = np.arange(len(targets)), Batch.of([ids[:-1] for ids in batch])
        its = first.log_probabilities(asked)
        weights, top = np.exp(its), its.argmax(-1)
        tokens += np.bincount(of, minlength=documents)
        for total, player in zip(sums, others):
            other = player.log_probabilities(asked)
            columns = (-its[rows, targets], -other[rows, targets], _divergence(weights, its, other), top == other.argmax(-1))
            for column, values in enumerate(columns):
                total[:, column] += np.bincount(of, weights=values, minlength=documents)
        if report is not None:
            report(int(tokens.sum()), windows.tokens)
    return [Comparison.of(each, tokens) for each in sums]


def even_windows(windows: Windows, limit: int | None = None) -> Windows:
    """Up to ``limit`` predicted tokens of ``windows``, the first of each document, then the second of each, and so on: as many documents as
    there is room for, for what is measured is to hold beyond one of them."""
    seen: dict[int, int] = {}
    turns = []
    for place, document in enumerate(windows.documents):
        turns.append((seen.setdefault(document, 0), place))
        seen[document] += 1
    kept, left = list[tuple[int, tuple[int, ...]]](), math.inf if limit is None else limit
    for _, place in sorted(turns):
        if left <= 0:
            break
        piece = windows.windows[place][: 1 + int(min(left, len(windows.windows[place]) - 1))]
        kept.append((windows.documents[place], piece))
        left -= len(piece) - 1
    return Windows(tuple(piece for _, piece in kept), tuple(document for document, _ in kept))


def shared_windows(base: Model, models: Sequence[Model], corpus: Corpus, window: int, limit: int | None = None) -> Windows:
    """``corpus`` cut for ``base``, evenly over its documents.

    Raises UserError where one of ``models`` has another vocabulary, or makes other token ids of it: what they say of tokens does not
    compare then."""
    windows = even_windows(cut_windows(base, corpus, window), limit)
    for model in models:
        if model.spec.vocab != base.spec.vocab:
            raise UserError(
                f"{model.name} has a vocabulary of {model.spec.vocab:,} tokens and {base.name} one of {base.spec.vocab:,}: their losses do "
                "not compare; compare models of one tokenizer"
            )
        if even_windows(cut_windows(model, corpus, window), limit) != windows:
            raise UserError(
                f"{model.name} and {base.name} make other tokens of the same text ({corpus.name}): their losses do not compare; "
                "compare models of one tokenizer"
            )
    return windows


class _Player(NamedTuple):
    name: str
    scorer: Scorer

    def log_probabilities(self, asked: Batch) -> NDArray[np.float32]:
        """float32 [T, vocab]. Raises UserError for logits that are not finite."""
        logits = self.scorer.score(asked)
        top = logits.max(axis=-1, keepdims=True)
        if not np.isfinite(top).all():
            raise UserError(f"{self.name}: the model's logits are not finite, so there is nothing to compare; check its weights")
        logits -= top
        logits -= np.log(np.exp(logits).sum(axis=-1, dtype=np.float64, keepdims=True)).astype(np.float32)
        return logits


def _divergence(weights: NDArray[np.float32], its: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each row, float64 [T]: weights = exp(its)."""
    rows: NDArray[np.float64] = np.einsum("tv,tv->t", weights, its - other, dtype=np.float64)
    return rows
