"""What a step is asked to do, as its kernels read it: one array of int32 at a fixed address, filled on the host and copied over at once."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.backends.cuda.kernels.attention import most_tiles, tiles_of
from hasten.program import Batch, PageLists, RecurrentGroup, StateGroup

Int32 = NDArray[np.int32]
MOST_SEQUENCES = 256  # of one step
SCORED_TOKENS = 256  # most of one step that gives logits of every row: a vocabulary is wide


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """What a tape is made for: ``rows`` tokens of at most ``sequences`` sequences, and ``wanted`` rows of logits. A smaller batch is
    filled up with rows of nobody."""

    rows: int
    sequences: int
    wanted: int

    @classmethod
    def of(cls, batch: Batch) -> "Bucket":
        """The smallest that takes ``batch``. There are few of them, for each is compiled and captured once."""
        rows, sequences = _rounded(len(batch.tokens)), len(batch.offsets) - 1
        most = min(rows, MOST_SEQUENCES)
        if rows > 64 and sequences <= 8:  # a prompt or two: most programs of a wide grid would have nothing to do
            most = 8
        return cls(rows, most, next(each for each in (most, min(rows, SCORED_TOKENS), rows) if each >= len(batch.rows)))


def bucket_rows(most: int) -> tuple[int, ...]:
    """The numbers of rows that buckets of up to ``most`` have."""
    return tuple(sorted({_rounded(rows) for rows in range(1, most + 1)}))


def buckets(tokens: int) -> tuple[Bucket, ...]:
    """All that steps of up to ``tokens`` can meet, of which up to SCORED_TOKENS rows give logits, or one a sequence."""
    found = dict[Bucket, None]()
    for rows in bucket_rows(tokens):
        most, scored = min(rows, MOST_SEQUENCES), min(rows, SCORED_TOKENS)
        few = ((8, 8), (8, scored)) if rows > 64 else ()
        found.update(dict.fromkeys(Bucket(rows, *each) for each in ((most, scored), *few)))
    return tuple(found)


def _rounded(rows: int) -> int:
    """A power of two, or one and a half."""
    power = 1 << max(0, rows - 1).bit_length()
    return power * 3 // 4 if power >= 32 and rows <= power * 3 // 4 else power


class StepInputs:
    """The arrays of one bucket, on ``device`` and on the host. tokens, positions and sequence int32 [T] (which of the sequences a row is
    of; −1: nobody's, whose token is −1), rows [R] (−1: none), offsets [S + 1], ``pages`` by state group: [S, most], or [S] of a recurrent
    one; tiles [count, 2] by how many rows one holds (`tiles_of`)."""

    def __init__(
        self, bucket: Bucket, groups: Sequence[StateGroup], context: int, page: int, per_tile: Sequence[int], device: torch.device
    ) -> None:
        self.bucket, self.per_tile = bucket, tuple(dict.fromkeys(per_tile))
        self._groups = tuple(groups)
        counts = {each: most_tiles(bucket.rows, bucket.sequences, each) for each in self.per_tile}
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (bucket.rows,), "positions": (bucket.rows,), "sequence": (bucket.rows,), "rows": (bucket.wanted,),
            "offsets": (bucket.sequences + 1,),
            **{f"pages {group.name}": _table(group, bucket.sequences, -(-context // page)) for group in groups},
            **{f"tiles {each}": (count, 2) for each, count in counts.items()},
        }  # fmt: skip
        size = sum(-(-math.prod(shape) // 4) * 4 for shape in shapes.values())  # every array begins at 16 bytes
        whole = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._whole, self._there = whole, torch.zeros(size, dtype=torch.int32, device=device)
        self._copied: torch.cuda.Event | None = None
        self._here: dict[str, Int32] = {}
        there: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            self._here[name] = whole[start:stop].view(shape).numpy()
            there[name] = self._there[start:stop].view(shape)
            start = -(-stop // 4) * 4
        self.tokens, self.positions, self.sequence = there["tokens"], there["positions"], there["sequence"]
        self.rows, self.offsets = there["rows"], there["offsets"]
        self.pages: Mapping[str, Tensor] = {group.name: there[f"pages {group.name}"] for group in groups}
        self.tiles: Mapping[int, Tensor] = {each: there[f"tiles {each}"] for each in self.per_tile}

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._there.nbytes

    def fill(self, batch: Batch, pages: Sequence[PageLists]) -> None:
        """Say what ``batch`` asks for, with what each of its sequences keeps; what was said before has been copied over by then."""
        if self._copied is not None:
            self._copied.synchronize()
        here, count = self._here, len(batch.tokens)
        sequences = len(batch.offsets) - 1
        _put(here["tokens"], batch.tokens, -1)
        _put(here["positions"], batch.positions, 0)
        _put(here["sequence"], np.repeat(np.arange(sequences, dtype=np.int32), np.diff(batch.offsets)), -1)
        _put(here["rows"], batch.rows, -1)
        _put(here["offsets"], batch.offsets, count)
        for index, group in enumerate(self._groups):
            table = here[f"pages {group.name}"]
            table.fill(-1)
            if isinstance(group, RecurrentGroup):
                table[:sequences] = [lists[index][0] for lists in pages]
                continue
            for sequence, lists in enumerate(pages):
                table[sequence, : len(lists[index])] = lists[index]
        for each in self.per_tile:
            tiles = here[f"tiles {each}"]
            tiles[...] = tiles_of(here["sequence"], each, len(tiles))
        self._there.copy_(self._whole, non_blocking=True)
        if self._there.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()


def pieces(batch: Batch, pages: Sequence[PageLists], rows: int) -> list[tuple[Batch, list[PageLists]]]:
    """``batch`` in order, in steps of at most ``rows`` tokens and MOST_SEQUENCES sequences, each with the pages of its sequences."""
    if len(batch.tokens) <= rows and len(pages) <= MOST_SEQUENCES:
        return [(batch, list(pages))]
    made: list[tuple[Batch, list[PageLists]]] = []
    begin, offsets = 0, batch.offsets.tolist()
    while begin < offsets[-1]:
        first = int(np.searchsorted(batch.offsets, begin, side="right")) - 1
        end = min(begin + rows, offsets[min(first + MOST_SEQUENCES, len(offsets) - 1)])
        last = int(np.searchsorted(batch.offsets, end, side="left"))  # sequences first … last − 1 have rows in it
        wanted = batch.rows[(batch.rows >= begin) & (batch.rows < end)] - begin
        cuts = np.clip(batch.offsets[first : last + 1], begin, end) - begin
        made.append((Batch(batch.tokens[begin:end], batch.positions[begin:end], cuts, wanted), list(pages[first:last])))
        begin = end
    return made


def _table(group: StateGroup, sequences: int, most: int) -> tuple[int, ...]:
    return (sequences,) if isinstance(group, RecurrentGroup) else (sequences, most)


def _put(array: Int32, numbers: Int32, rest: int) -> None:
    array[: len(numbers)] = numbers
    array[len(numbers) :] = rest
