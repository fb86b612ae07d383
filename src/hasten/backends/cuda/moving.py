"""Pages on their way between places: those of a step together, group by group, and what leaves the device or comes back through one
buffer of pinned memory a group."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.backends.cuda.kernels.cache import GroupCache, move_pages
from hasten.backends.cuda.kernels.states import StatePool
from hasten.program import CopyPage, Move, SwapIn, SwapOut

Pool = GroupCache | StatePool
MOST_MOVES = 1024  # of one launch
BUFFER_BYTES = 64 << 20  # of a group's buffer; one page at least


@dataclasses.dataclass(frozen=True, slots=True)
class _Buffer:
    """As many pages of a pool as a launch moves in or out: ``tensors`` as the pool's, but for how many pages they hold."""

    tensors: tuple[Tensor, ...]

    @property
    def slots(self) -> int:
        return self.tensors[0].shape[1]

    @classmethod
    def of(cls, pool: Pool, pinned: bool) -> "_Buffer":
        page = sum(x[:, 0].nbytes for x in pool.tensors)
        slots = max(1, min(MOST_MOVES, BUFFER_BYTES // max(1, page)))
        made = (torch.zeros((x.shape[0], slots, *x.shape[2:]), dtype=x.dtype, pin_memory=pinned) for x in pool.tensors)
        return cls(tuple(made))


class Moving:
    """Carries out moves over ``pools``, a Program's groups in order, and keeps what is outside of them. On the device nothing is allocated.

    Whatever it raises, no page but the targets of those moves is written."""

    def __init__(self, pools: Sequence[Pool], device: torch.device) -> None:
        self._pools, self._device = tuple(pools), device
        self._moves = torch.zeros((MOST_MOVES, 2), dtype=torch.int32, device=device)
        self._buffers: dict[int, _Buffer] = {}
        self._outside: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # what was swapped out, by group and place

    def carry_out(self, moves: Sequence[Move]) -> None:
        """Copy pages, swap them out and in, in this order."""
        for group in dict.fromkeys(move.group for move in moves):
            left = [move for move in moves if move.group == group]
            while left:
                left = left[self._together(group, left) :]

    def _together(self, group: int, moves: Sequence[Move]) -> int:
        """Carry out as many of a group's moves, from the first on, as one launch takes; how many that is."""
        pool, listed, taken, out = self._pools[group], list[tuple[int, int]](), 0, dict[int, int]()
        pages = pool.tensors[0].shape[1]  # the buffer's are numbered behind them
        buffer = None if all(isinstance(move, CopyPage) for move in moves) else self._buffer(group)
        for move in moves:
            if len(listed) == MOST_MOVES or (buffer is not None and taken == buffer.slots):
                break
            match move:
                case CopyPage():
                    listed.append((move.source, move.target))
                case SwapOut():
                    out[move.place] = taken
                    listed.append((move.source, pages + taken))
                    taken += 1
                case SwapIn() if move.place in out:  # and has not left the buffer
                    listed.append((pages + out.pop(move.place), move.target))
                case SwapIn():
                    for x, kept in zip(self._buffer(group).tensors, self._outside.pop((group, move.place)), strict=True):
                        x[:, taken] = kept
                    listed.append((pages + taken, move.target))
                    taken += 1
        self._moves[: len(listed)].copy_(torch.tensor(listed, dtype=torch.int32))
        move_pages(pool, buffer, self._moves[: len(listed)])
        if buffer is not None:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # before the buffer is read, or filled again
            for place, slot in out.items():
                self._outside[group, place] = tuple(x[:, slot].clone() for x in buffer.tensors)
        return len(listed)

    def _buffer(self, group: int) -> _Buffer:
        if group not in self._buffers:
            self._buffers[group] = _Buffer.of(self._pools[group], self._device.type == "cuda")
        return self._buffers[group]
