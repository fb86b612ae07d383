"""Loss, perplexity and top-1 accuracy of a model over text."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from hasten.base.errors import ConfigError, UserError
from hasten.engine.backends import open_scorer
from hasten.measure.text import Corpus
from hasten.model import Model
from hasten.program import Batch, Formats

_LOGITS_BYTES = 16 << 20  # of float32 logits that one batch of windows may take: more are fresh pages from the system for every batch


@dataclasses.dataclass(frozen=True, slots=True)
class Windows:
    """Token windows to score: each predicts all of its tokens but the first, with no context from outside. ``documents`` says which
    document each is of."""

    windows: tuple[tuple[int, ...], ...]
    documents: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens predicted over all windows."""
        return sum(len(window) - 1 for window in self.windows)


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Sums over ``tokens`` predicted tokens: negative log-likelihood in nats, and how often the likeliest token was the next one."""

    tokens: int
    nll: float
    correct: int


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over ``tokens`` predicted tokens: ``loss`` in nats, ``perplexity`` = exp(loss), infinite where that is beyond float64,
    ``top1`` between 0 and 1."""

    loss: float
    perplexity: float
    top1: float
    tokens: int

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Evaluation":
        """The means of these sums. Raises UserError where nothing was predicted."""
        tokens = sum(score.tokens for score in scores)
        if tokens == 0:
            raise UserError("the text is too short: no token is left to predict")
        loss = sum(score.nll for score in scores) / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return cls(loss, perplexity, sum(score.correct for score in scores) / tokens, tokens)


def cut_windows(model: Model, corpus: Corpus, window: int = 512, limit: int | None = None) -> Windows:
    """Cut every document, begun with the model's start token, into windows that predict up to ``window`` tokens each.

    ``limit`` stops after that many predicted tokens. Raises ConfigError for a window the model's context cannot hold."""
    if not 1 <= window <= model.spec.context:
        raise ConfigError(f"window is {window}; {model.name} accepts 1 to {model.spec.context}")
    tokenizer = model.text_tokenizer()
    start = tokenizer.start_id
    windows: list[tuple[int, ...]] = []
    documents: list[int] = []
    left = math.inf if limit is None else limit
    for number, document in enumerate(corpus.documents):
        if left <= 0:
            break
        ids = tokenizer.encode(document, add_special_tokens=False)
        if start is not None:
            ids = [start, *ids]
        for begin in range(0, len(ids) - 1, window):
            if left <= 0:
                break
            piece = ids[begin : begin + 1 + int(min(window, left))]
            windows.append(tuple(piece))
            documents.append(number)
            left -= len(piece) - 1
    return Windows(tuple(windows), tuple(documents))


def score_windows(
    model: Model, windows: Windows, *, window: int = 512, backend: str = "reference", formats: Formats | None = None
) -> Iterator[Score]:
    """Score the windows, a batch at a time; a batch takes as many windows as fit a fixed budget of logits.

    Raises UserError naming the model where its logits are not finite."""
    scorer = open_scorer(model, backend, window, formats)
    together = max(1, _LOGITS_BYTES // (4 * model.spec.vocab * window))
    ordered = sorted(windows.windows, key=len, reverse=True)  # equal lengths run together
    for begin in range(0, len(ordered), together):
        batch = ordered[begin : begin + together]
        logits = scorer.score(Batch.of([ids[:-1] for ids in batch]))
        targets = np.concatenate([np.asarray(ids[1:]) for ids in batch])
        top = logits.max(axis=-1)
        picked = logits[np.arange(len(targets)), targets]
        if not (np.isfinite(top).all() and np.isfinite(picked).all()):
            raise UserError(
                f"{model.name}: the model's logits are not finite, so there is no loss; check its weights, or run it in wider activations"
            )
        correct = int((logits.argmax(axis=-1) == targets).sum())
        logits -= top[:, None]
        np.exp(logits, out=logits)
        nll = np.log(logits.sum(axis=-1, dtype=np.float64)) + top - picked
        yield Score(len(targets), float(nll.sum()), correct)
