"""Device sampler: tokens drawn where the logits lie; what the device leaves is drawn by the engine's own sampler, from rows it fetches."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.engine.draw import Draw
from hasten.engine.sampler import Due, Sampler, Sampling, Sequenced, step_masks
from hasten.engine.sampling import Purpose, biases
from hasten.program import Drawer, Drawn, Logits, Wanted

WRONG = Draw(-1, error="logits hold NaN or +inf, or leave no id to choose; check the weights, or allow at least one id")
"""Of a row whose logits are gone."""


class DeviceSampler:
    """Draws with a session's ``drawer``, and on the ``host`` what that leaves: the same tokens."""

    def __init__(self, drawer: Drawer, host: Sampler) -> None:
        self._drawer, self._host = drawer, host

    def begin(self, logits: Logits, rows: Sequence[int], sequences: Sequence[Sequenced]) -> Sampling:
        """Begin to draw for ``sequences`` from their ``rows`` of a step's logits. The last call's other sequences are forgotten."""
        masks = step_masks(sequences, logits.shape[1])
        wanted = [wanted_of(sequence, None if masks is None else masks[place]) for place, sequence in enumerate(sequences)]
        return _OnDevice(self._host, self._drawer.draw(logits, rows, wanted), logits, rows, sequences)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _OnDevice:
    host: Sampler
    drawn: Drawn
    logits: Logits
    rows: Sequence[int]
    sequences: Sequence[Sequenced]

    @property
    def due(self) -> Due | None:
        return None if self.drawn.left else _Late(self.drawn)

    def draws(self) -> list[Draw]:
        draws = [Draw(token) for token in self.drawn.tokens()]
        if left := [place for place, draw in enumerate(draws) if draw.token < 0]:  # or wrong, of which the host knows what to say
            fetched = self.logits.numpy([self.rows[place] for place in left])
            for place, draw in zip(left, self.host.draw(fetched, [self.sequences[place] for place in left])):
                draws[place] = draw
        return draws


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Late:
    drawn: Drawn

    def draws(self) -> list[Draw]:
        return [Draw(token) if token >= 0 else WRONG for token in self.drawn.tokens()]


def wanted_of(sequence: Sequenced, mask: NDArray[np.uint32] | None) -> Wanted:
    """What a device is told of ``sequence``, of which ``mask`` says which ids may come."""
    params, masked = sequence.params, sequence.mask is not None or sequence.forbidden
    return Wanted(
        key=sequence.key, seed=sequence.seed, choice=sequence.choice,
        position=len(sequence.prompt) + len(sequence.output) + sequence.due, purpose=Purpose.TOKEN, temperature=params.temperature,
        top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty, frequency_penalty=params.frequency_penalty, bias=biases(params),
        prompt=sequence.prompt, output=sequence.output, logprobs=params.reported, mask=mask if masked else None,
    )  # fmt: skip
