"""Features that a rotation turns in pairs, as complex numbers: a pair at position p is multiplied by exp(i·frequency·p), so complex factors
before it and after it are the same, and complex sums of pairs of one frequency turn as one."""

import dataclasses

import torch
from torch import Tensor

from hasten.spec import Attention, Rotary


@dataclasses.dataclass(frozen=True, slots=True)
class Pairs:
    """Where the two halves of each pair lie in a head of ``size`` features; the ``free`` ones are not turned."""

    first: Tensor
    second: Tensor
    free: Tensor
    size: int

    @classmethod
    def of(cls, mixer: Attention) -> "Pairs":
        """Those of the queries and keys of ``mixer``; without rotary positions every feature is free."""
        rotary = mixer.position if isinstance(mixer.position, Rotary) else None
        half = 0 if rotary is None else rotary.dims // 2
        every = torch.arange(half)
        interleaved = rotary is not None and rotary.interleaved
        first, second = (2 * every, 2 * every + 1) if interleaved else (every, every + half)
        return cls(first, second, torch.arange(2 * half, mixer.head_dim), mixer.head_dim)

    def complex(self, rows: Tensor) -> Tensor:
        """``rows`` [..., size, N] as [..., pairs, N] complex."""
        return torch.complex(rows[..., self.first, :], rows[..., self.second, :])

    def real(self, pairs: Tensor, free: Tensor) -> Tensor:
        """The inverse: pairs [..., pairs, N] complex and the free features [..., free, N]."""
        made = free.new_empty((*free.shape[:-2], self.size, free.shape[-1]))
        made[..., self.first, :], made[..., self.second, :], made[..., self.free, :] = pairs.real, pairs.imag, free
        return made

    def moments(self, square: Tensor) -> Tensor:
        """Of second moments [heads·size, heads·size], those of each pair across heads: Σ k·k̄ [pairs, heads, heads] complex."""
        heads = len(square) // self.size
        by_head = square.reshape(heads, self.size, heads, self.size)
        a, b = self.first, self.second
        same = by_head[:, a, :, a] + by_head[:, b, :, b]
        return torch.complex(same, by_head[:, b, :, a] - by_head[:, a, :, b])

    def energy(self, metrics: Tensor) -> Tensor:
        """The trace of metrics [heads, size, size] over each pair: [pairs, heads]."""
        diagonal = metrics.diagonal(dim1=-2, dim2=-1)
        return (diagonal[:, self.first] + diagonal[:, self.second]).T


def principal(moments: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of pairs with ``moments`` [pairs, heads, heads] across heads, whose errors count by ``weight`` [pairs, heads]: the columns w
    [pairs, heads, heads] complex of combinations in falling order, k = Σ w·z, and the energy [pairs, heads] that each holds.

    A combination's column has mean square 1, and its sum is real and positive where it has one."""
    floor = 1e-6 * weight.amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    scale = torch.maximum(weight, floor).sqrt()
    energy, vectors = torch.linalg.eigh(scale[:, :, None] * moments * scale[:, None, :])
    energy, vectors = energy.flip(1), vectors.flip(2)
    columns = vectors / scale[:, :, None]
    columns = columns / columns.abs().square().mean(1, keepdim=True).sqrt()
    total = columns.sum(1, keepdim=True)
    turn = torch.where(total.abs() > 1e-9, total.conj() / total.abs().clamp_min(1e-30), torch.ones_like(total))
    return columns * turn, energy.clamp_min(0)
