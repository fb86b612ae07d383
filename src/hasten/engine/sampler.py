"""Sampler: the next token of every running request, drawn in one native call (``native/src/sampling.hpp`` says how)."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten import _native
from hasten.base.errors import UserError
from hasten.engine.request import Request
from hasten.engine.sampling import Purpose, SamplingParams


class Sampler:
    """Draws for requests that come and go; ``threads`` share the rows of a step, the caller's alone if None."""

    def __init__(self, threads: _native.ThreadPool | None = None) -> None:
        self._native = _native.Sampler(threads)
        self._rows: dict[
            tuple[int, int], tuple[_native.SamplingRow, int]
        ] = {}  # by request: its row, and how much of the output that has seen

    def draw(self, logits: NDArray[np.float32], requests: Sequence[Request]) -> list[int]:
        """One token id a request, from logits [R, vocab]; the last call's other requests are forgotten.

        Raises `UserError`, naming the prompt, where logits hold NaN or +inf or leave no id."""
        self._rows = {request.key: self._row(request) for request in requests}
        rows = [row for row, _ in self._rows.values()]
        positions = np.array([len(request.prompt) + len(request.output) for request in requests], np.int64)
        forbidden = [request.forbidden for request in requests]
        masks = token_masks(forbidden, logits.shape[1]) if any(forbidden) else None
        tokens = np.zeros(len(requests), np.int32)
        try:
            self._native.sample(np.ascontiguousarray(logits), rows, positions, tokens, masks=masks, purpose=Purpose.TOKEN)
        except ValueError as error:
            if not (tokens < 0).any():
                raise
            bad = requests[int(np.argmax(tokens < 0))]
            raise UserError(f"prompt {bad.index}: {str(error).partition(': ')[2]}") from None
        return tokens.tolist()

    def _row(self, request: Request) -> tuple[_native.SamplingRow, int]:
        """The request's row, which has seen all of its output so far."""
        row, seen = self._rows.get(request.key) or (native_row(request.params, request.prompt, request.seed, request.choice), 0)
        for token in request.output[seen:]:
            row.append(token)
        return row, len(request.output)


def native_row(params: SamplingParams, prompt: Sequence[int], seed: int, choice: int = 0) -> _native.SamplingRow:
    """What the native sampler keeps of one request."""
    return _native.SamplingRow(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
        repetition_penalty=params.repetition_penalty, presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty, seed=seed, choice=choice, prompt=np.asarray(prompt, np.int64),
    )  # fmt: skip


def token_masks(forbidden: Sequence[Collection[int]], vocab: int) -> NDArray[np.uint32]:
    """Masks uint32 [R, ⌈vocab / 32⌉] that allow each row all ids but those; bit i % 32 of word i / 32 is id i's."""
    masks = np.full((len(forbidden), -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
    for mask, ids in zip(masks, forbidden):
        for token in ids:
            if 0 <= token < vocab:
                mask[token // 32] &= np.uint32(0xFFFFFFFF ^ 1 << token % 32)
    return masks
