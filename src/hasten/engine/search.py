"""Search: a beam search over logits, one step at a time. Whoever runs it forks and drops sequences as it says."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UserError
from hasten.engine.beam import BeamSearcher, Hypothesis
from hasten.engine.constraint import ConstraintState
from hasten.engine.sampling import BeamSearch, SamplingParams, biases, token_masks


class Search:
    """The best ``params.n`` outputs of at most ``max_tokens`` tokens; ``end_ids`` end one, and ``constraint`` follows the grammar."""

    def __init__(
        self, params: SamplingParams, search: BeamSearch, *, max_tokens: int, end_ids: Collection[int],
        constraint: ConstraintState | None = None,
    ) -> None:  # fmt: skip
        self._params, self._end_ids = params, end_ids
        self._searcher = BeamSearcher(search, max_tokens=max_tokens, end_ids=end_ids)
        self.followed = [] if constraint is None else [constraint]
        """Where each beam stands in the grammar, in the order of the beams; none without one."""

    def advance(self, logits: NDArray[np.float32]) -> list[tuple[int, int]]:
        """Go on by a token, given logits [W, vocab] of what follows each beam, at first one.

        Returns for each of the new beams which of the old ones it continues, and by which token; none where the search is over. All of
        ``followed`` must be ready. Raises `UserError` for a grammar that fails or leaves nothing, and for logits that hold NaN."""
        searcher = self._searcher
        masks = self._masks(logits.shape[1])
        try:
            parents = searcher.advance(scores(logits, self._params, self._end_ids, len(searcher.beams[0].tokens), masks))
        except ValueError as error:
            raise UserError(f"beam search cannot go on: {error}") from None
        if searcher.done:
            return []
        tokens = [beam.tokens[-1] for beam in searcher.beams]
        if self.followed:
            forks = [self.followed[parent].fork() for parent in parents]
            self.close()
            self.followed = forks
            for one, token in zip(forks, tokens):
                one.advance(token)
        return list(zip(parents, tokens))

    def best(self) -> list[Hypothesis]:
        """The best outputs that were found, best first; fewer than asked for if there are not so many."""
        return self._searcher.best(self._params.n)

    def close(self) -> None:
        """Forget what follows the grammar."""
        for one in self.followed:
            one.close()

    def _masks(self, vocab: int) -> list[NDArray[np.uint32] | None]:
        """One a beam, none without a grammar; a complete one may only end."""
        if not self.followed:
            return []
        for one in self.followed:
            if one.error is not None:
                raise UserError(one.error)
        only_ends = ~token_masks([self._end_ids], vocab)[0]
        return [only_ends if one.complete else one.mask for one in self.followed]


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
