"""Beam search over a session: sequences are forked as the search says. One request at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UserError
from hasten.engine.beam import BeamSearcher, Hypothesis
from hasten.engine.constraint import Constraints, ConstraintState
from hasten.engine.sampling import BeamSearch, SamplingParams, biases, token_masks
from hasten.program import Batch

MASK_SECONDS = 10.0
"""Longest wait for masks of a step; the constraints' own limits come first."""


def beam_decode(
    session: Any, prompt: Sequence[int], params: SamplingParams, search: BeamSearch, *, max_tokens: int, end_ids: Collection[int],
    constraints: Constraints | None = None,
) -> list[Hypothesis]:  # fmt: skip
    """The best ``params.n`` outputs of at most ``max_tokens`` tokens, best first; ``end_ids`` end one.

    ``session`` is a backend's (`hasten.engine.llm.Session`). Raises `UserError` for a grammar that fails or leaves nothing."""
    searcher = BeamSearcher(search, max_tokens=max_tokens, end_ids=end_ids)
    followed: list[ConstraintState] = []
    if params.grammar is not None and constraints is not None:
        followed = [constraints.start(params.grammar)]
    state, pending, computed = session.start(1), [tuple(prompt)], 0
    try:
        while not searcher.done:
            logits, state = session.step(Batch.of(pending, [computed] * len(pending), rows="last"), state)
            masks = _masks(followed, constraints, logits.shape[1], end_ids)
            try:
                parents = searcher.advance(scores(logits, params, end_ids, len(searcher.beams[0].tokens), masks))
            except ValueError as error:
                raise UserError(f"beam search cannot go on: {error}") from None
            if searcher.done:
                break
            computed += len(pending[0])
            state, pending = state.select(parents), [beam.tokens[-1:] for beam in searcher.beams]
            if followed:
                forks = [followed[parent].fork() for parent in parents]
                for old in followed:
                    old.close()
                followed = forks
                for one, (token,) in zip(followed, pending):
                    one.advance(token)
    finally:
        for one in followed:
            one.close()
    return searcher.best(params.n)


def scores(
    logits: NDArray[np.float32], params: SamplingParams, end_ids: Collection[int], length: int, masks: Sequence[NDArray[np.uint32] | None]
) -> NDArray[np.float32]:
    """What a search ranks by, float32 [W, vocab]: ln softmax, then logit bias, then what may not come is -inf, as transformers has it.

    Outputs have ``length`` tokens so far; ``masks`` are one a beam, or none at all."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    ranked: NDArray[np.float32] = (wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))).astype(np.float32)
    for token, bias in biases(params):
        ranked[:, token] += np.float32(bias)
    for row, mask in zip(ranked, masks):
        if mask is not None:
            row[np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(row)] == 0] = -np.inf
    if length < params.min_tokens and end_ids:
        ends = list(end_ids)
        others = np.delete(ranked, ends, axis=1).max(axis=1, initial=-np.inf) > -np.inf
        ranked[np.ix_(others, ends)] = -np.inf
    return ranked


def _masks(
    followed: Sequence[ConstraintState], constraints: Constraints | None, vocab: int, end_ids: Collection[int]
) -> list[NDArray[np.uint32] | None]:
    """One a beam; a complete one may only end."""
    if not followed or constraints is None:
        return []
    constraints.wait(MASK_SECONDS, followed)
    for one in followed:
        if one.error is not None:
            raise UserError(one.error)
        if not one.ready:
            raise UserError(f"no mask of the grammar within {MASK_SECONDS:g} seconds")
    only_ends = ~token_masks([end_ids], vocab)[0]
    return [only_ends if one.complete else one.mask for one in followed]
