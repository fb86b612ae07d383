"""Pages of recurrent state, and which rows and which page a sequence of a step has. What all kernels of recurrences begin with."""

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor


@dataclasses.dataclass(frozen=True, slots=True)
class StatePool:
    """A recurrent group's pages, one a sequence: ``pages`` float32 [layers, pages, size]; a page has the group's shape, laid end to end."""

    pages: Tensor

    @staticmethod
    def of(layers: int, pages: int, shape: tuple[int, ...], device: torch.device) -> "StatePool":
        """Zeros for a group of that shape."""
        return StatePool(torch.zeros((layers, pages, math.prod(shape)), dtype=torch.float32, device=device))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one there is, as ``cache.move_pages`` wants it."""
        return (self.pages,)

    def layer(self, slot: int) -> Tensor:
        """Layer ``slot`` [pages, size], over the same memory."""
        return self.pages[slot]


@dataclasses.dataclass(frozen=True, slots=True)
class Sequences:
    """Whose rows those of a step are: positions int32 [T] of the rows; offsets int32 [S + 1], rising from 0, where sequence s has rows
    offsets[s] to offsets[s + 1]; states int32 [S], the page that its state is in.

    A sequence whose first row is at position 0 begins from zeros, whatever its page held; one without rows is left alone. Rows that no
    sequence has, or one of page −1, are padding: what is made of them is zeros. Raises ValueError for lengths that do not go together."""

    positions: Tensor
    offsets: Tensor
    states: Tensor

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.states) + 1:
            raise ValueError(f"{len(self.states)} sequences have {len(self.states) + 1} offsets, not {len(self.offsets)}")

    @property
    def programs(self) -> int:
        """One a sequence, and one for the rows behind the last."""
        return len(self.offsets)


@triton.jit
def span(positions: tensor, offsets: tensor, states: tensor, rows: tensor) -> tuple[tensor, tensor, tensor, tensor]:
    """First row, the row behind the last, page (−1: the rows become zeros) and the first row's position, of this program's sequence."""
    sequence = tl.program_id(0)
    real = sequence < tl.num_programs(0) - 1
    begin = tl.load(offsets + sequence)
    end = tl.load(offsets + sequence + 1, mask=real, other=0)
    end = tl.where(real, end, rows)
    held = real & (begin < end)
    page = tl.load(states + sequence, mask=held, other=-1)
    position = tl.load(positions + begin, mask=held, other=0)
    return begin, end, page.to(tl.int64), position


@triton.jit
def clear(y: tensor, stride: tensor, begin: tensor, end: tensor, feature: tensor, inside: tensor, ROWS: constexpr) -> None:
    """Zeros to features [N] of rows ``begin`` to ``end`` of y, where ``inside`` [N]."""
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride + feature[None, :]
        zeros = tl.zeros((ROWS, feature.shape[0]), y.dtype.element_ty)
        tl.store(y + at, zeros, mask=(row < end)[:, None] & inside[None, :])
