"""Batch: what one step of a Program is asked to do, as plain arrays."""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, one_line

Int32 = NDArray[np.int32]

_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Sequences laid end to end.

    tokens, positions [T]; offsets [S + 1], where sequence s owns rows offsets[s] to offsets[s + 1]; rows [R], rising, the rows whose
    logits are wanted. Positions of one sequence are consecutive, and continue what its state already holds."""

    tokens: Int32
    positions: Int32
    offsets: Int32
    rows: Int32

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None, rows: str = "all") -> "Batch":
        """A batch of token lists, sequence s beginning at position ``starts[s]`` (0 unless given).

        ``rows`` is 'all', 'last' (of each sequence) or 'none'."""
        lengths = [len(sequence) for sequence in sequences]
        if not lengths or 0 in lengths:
            raise ConfigError("a batch needs at least one sequence, and every sequence at least one token")
        begin = [0] * len(lengths) if starts is None else list(starts)
        if len(begin) != len(lengths) or min(begin) < 0 or max(begin) > _LARGEST - max(lengths):
            raise ConfigError(f"{len(lengths)} sequences need as many starts of 0 or more, not {one_line(begin)}")
        stops = list(accumulate(lengths))
        wanted = {"all": range(stops[-1]), "last": [stop - 1 for stop in stops], "none": ()}
        if rows not in wanted:
            raise ConfigError(f"rows={rows!r}; accepted are {', '.join(wanted)}")
        positions = begin if len(begin) == stops[-1] else [start + i for start, length in zip(begin, lengths) for i in range(length)]
        tokens, offsets = _flat(sequences), np.array([0, *stops], np.int32)
        return cls(tokens, np.array(positions, np.int32), offsets, np.array(wanted[rows], np.int32))


def _flat(sequences: Sequence[Sequence[int]]) -> Int32:
    """Token ids of all sequences, int32 [T]. Lists of small whole numbers, which is what a step is made of, take the short way."""
    if all(type(sequence) is list for sequence in sequences):
        flat = [token for sequence in sequences for token in sequence]
        if set(map(type, flat)) == {int} and min(flat) >= 0 and max(flat) <= _LARGEST:
            return np.array(flat, np.int32)
    return np.concatenate([token_array(sequence) for sequence in sequences])


def token_array(tokens: Sequence[int]) -> Int32:
    """Token ids as int32 [T]. Raises ConfigError for anything that is not a flat list of whole numbers."""
    try:
        array = np.asarray(tokens)
    except ValueError:  # lists of unequal lengths inside
        array = np.empty((0, 0))
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"token ids must be a flat, non-empty list of whole numbers, not {one_line(tokens)}")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise ConfigError(f"token ids must be between 0 and the vocabulary size, not {int(array.min())} to {int(array.max())}")
    return array.astype(np.int32)
