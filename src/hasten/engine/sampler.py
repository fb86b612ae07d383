"""Sampler: the next token of every running sequence, drawn in one native call (``native/src/sampling.hpp`` says how)."""

import dataclasses
from collections.abc import Collection, Hashable, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten import _native
from hasten.engine.draw import Draw, TokenLogprob
from hasten.engine.sampling import Purpose, SamplingParams, biases, token_masks
from hasten.program import Logits


class Sequenced(Protocol):
    """What is drawn for: one output of one request."""

    @property
    def key(self) -> Hashable:
        """Its name among those drawn for; a name that comes again with the next call is the same output, grown by what was drawn."""
        ...

    @property
    def params(self) -> SamplingParams:
        """What was asked."""
        ...

    @property
    def prompt(self) -> Sequence[int]:
        """Its first tokens."""
        ...

    @property
    def output(self) -> Sequence[int]:
        """The tokens drawn so far, as far as they are known."""
        ...

    @property
    def due(self) -> int:
        """How many are drawn beyond ``output``; 0 wherever the host draws."""
        ...

    @property
    def seed(self) -> int:
        """Key of the noise."""
        ...

    @property
    def choice(self) -> int:
        """Which of the request's outputs: the noise's second key."""
        ...

    @property
    def forbidden(self) -> Collection[int]:
        """Ids that may not come next unless ``mask`` leaves no other."""
        ...

    @property
    def mask(self) -> NDArray[np.uint32] | None:
        """Ids that may come next, uint32 [⌈vocab / 32⌉] (`hasten.engine.constraint`); None allows all."""
        ...


class Due(Protocol):
    """Tokens that come by themselves: the next step may take them before they are known."""

    def draws(self) -> list[Draw]:
        """One Draw a sequence, waited for, however far the session has gone on."""
        ...


class Sampling(Protocol):
    """Tokens under way."""

    @property
    def due(self) -> Due | None:
        """All of them, where none needs the host."""
        ...

    def draws(self) -> list[Draw]:
        """One Draw a sequence, waited for. Not when the session has gone on to its next step."""
        ...


class Sampler:
    """Draws for sequences that come and go; ``threads`` share the rows of a step, the caller's alone if None."""

    def __init__(self, threads: _native.ThreadPool | None = None) -> None:
        self._native = _native.Sampler(threads)
        self._rows: dict[Hashable, tuple[_native.SamplingRow, int]] = {}  # each sequence's row, and how much of the output that has seen

    def begin(self, logits: Logits, rows: Sequence[int], sequences: Sequence[Sequenced]) -> Sampling:
        """What draws for ``sequences`` from their ``rows`` of a step's logits, when asked to."""
        return _OnHost(self, logits, rows, sequences)

    def draw(self, logits: NDArray[np.float32], sequences: Sequence[Sequenced]) -> list[Draw]:
        """One Draw a sequence, from logits [R, vocab]; the last call's other sequences are forgotten.

        A row that holds NaN or +inf, or in which nothing may come, is its own sequence's error; the others are drawn."""
        self._rows = {sequence.key: self._row(sequence) for sequence in sequences}
        return self._sampled(
            np.ascontiguousarray(logits),
            [row for row, _ in self._rows.values()],
            [len(sequence.prompt) + len(sequence.output) for sequence in sequences],
            step_masks(sequences, logits.shape[1]),
            [sequence.params.reported for sequence in sequences],
        )

    def score(self, logits: NDArray[np.float32], tokens: Sequence[int], top: int) -> list[TokenLogprob]:
        """The log-probability of each of ``tokens`` [R] by logits [R, vocab], row by row, and the ``top`` likeliest ids there.

        For prompts, in bits as for drawn tokens. Raises ValueError where logits hold NaN or +inf."""
        masks = np.zeros((len(tokens), -(-logits.shape[1] // 32)), np.uint32)
        for mask, token in zip(masks, tokens):
            mask[token // 32] = 1 << token % 32
        row = _native.SamplingRow(logprobs=top)
        draws = self._sampled(np.ascontiguousarray(logits), [row] * len(tokens), [0] * len(tokens), masks, [top] * len(tokens))
        for draw in draws:
            if draw.error is not None:
                raise ValueError(draw.error)
        return [draw.logprob for draw in draws if draw.logprob is not None]

    def _sampled(
        self, logits: NDArray[np.float32], rows: list[_native.SamplingRow], positions: Sequence[int], masks: NDArray[np.uint32] | None,
        asked: Sequence[int | None],
    ) -> list[Draw]:  # fmt: skip
        tokens = np.zeros(len(rows), np.int32)
        places = np.array(positions, np.int64)
        most = max((count for count in asked if count is not None), default=None)
        logprobs = None if most is None else np.empty(len(rows), np.float32)
        top_ids = None if most is None else np.empty((len(rows), most), np.int32)
        top_logprobs = None if most is None else np.empty((len(rows), most), np.float32)
        errors: dict[int, str] = {}
        try:
            self._native.sample(
                logits, rows, places, tokens, masks=masks, logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs,
                purpose=Purpose.TOKEN,
            )  # fmt: skip
        except ValueError:
            bad = np.flatnonzero(tokens < 0)
            if not len(bad):
                raise
            errors = {int(row): self._why(logits, rows, places, masks, int(row)) for row in bad}
        return [
            Draw(-1, error=errors[row]) if row in errors else Draw(token, _logprob(token, row, count, logprobs, top_ids, top_logprobs))
            for row, (token, count) in enumerate(zip(tokens.tolist(), asked))
        ]

    def _why(
        self, logits: NDArray[np.float32], rows: list[_native.SamplingRow], places: NDArray[np.int64], masks: NDArray[np.uint32] | None,
        row: int,
    ) -> str:  # fmt: skip
        """The error of one row, which was not drawn: a step names the first such row only."""
        one = slice(row, row + 1)
        try:
            self._native.sample(logits[one], rows[one], places[one], np.zeros(1, np.int32), masks=None if masks is None else masks[one])
        except ValueError as error:
            return str(error).partition(": ")[2]
        return "no token was drawn"

    def _row(self, sequence: Sequenced) -> tuple[_native.SamplingRow, int]:
        """The sequence's row, which has seen all of its output so far."""
        row, seen = self._rows.get(sequence.key) or (native_row(sequence.params, sequence.prompt, sequence.seed, sequence.choice), 0)
        for token in sequence.output[seen:]:
            row.append(token)
        return row, len(sequence.output)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _OnHost:
    sampler: Sampler
    logits: Logits
    rows: Sequence[int]
    sequences: Sequence[Sequenced]
    due: ClassVar[None] = None

    def draws(self) -> list[Draw]:
        return self.sampler.draw(self.logits.numpy(self.rows), self.sequences)


def native_row(params: SamplingParams, prompt: Sequence[int], seed: int, choice: int = 0) -> _native.SamplingRow:
    """What the native sampler keeps of one output."""
    return _native.SamplingRow(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
        repetition_penalty=params.repetition_penalty, presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty, seed=seed, choice=choice, prompt=np.asarray(prompt, np.int64),
        logprobs=-1 if params.reported is None else params.reported, logit_bias=list(biases(params)),
    )  # fmt: skip


def step_masks(sequences: Sequence[Sequenced], vocab: int) -> NDArray[np.uint32] | None:
    """Masks uint32 [R, ⌈vocab / 32⌉] of a step, or None where every sequence may have any id."""
    if not any(sequence.forbidden or sequence.mask is not None for sequence in sequences):
        return None
    masks = token_masks([sequence.forbidden for sequence in sequences], vocab)
    for mask, sequence in zip(masks, sequences):
        if (allowed := sequence.mask) is not None:
            mask &= allowed
            if not mask.any():
                mask[:] = allowed
    return masks


def _logprob(
    token: int, row: int, count: int | None, logprobs: NDArray[np.float32] | None, top_ids: NDArray[np.int32] | None,
    top_logprobs: NDArray[np.float32] | None,
) -> TokenLogprob | None:  # fmt: skip
    if count is None or logprobs is None or top_ids is None or top_logprobs is None:
        return None
    top = tuple((int(i), float(value)) for i, value in zip(top_ids[row, :count], top_logprobs[row, :count]) if i >= 0)
    return TokenLogprob(token, float(logprobs[row]), top)
