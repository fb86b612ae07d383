"""Weights that are rounded while they are learned: codes and scales that gradients reach as if rounding were not there."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.formats.weights import Array
from hasten.train.parameters import Parameters

SCALE = ":scale"
"""Behind a weight's name: the master of its scales, which is the logarithm of their share of what they began with."""

INSIDE = 0.49
"""How far from its code, in steps, a master begins at the most."""


class Codes(Protocol):
    """What a weight's codes are while its scales are learned, in steps of these."""

    @property
    def masters(self) -> Mapping[str, Tensor]: ...

    def steps(self, scales: Tensor) -> Tensor:
        """Codes less their zero points, given the scales of each number."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """Codes that stay as they are."""

    values: Tensor
    masters: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def steps(self, scales: Tensor) -> Tensor:
        """Those it has."""
        return self.values


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """Codes that follow a master: the nearest to it, with the gradient going straight through (Bengio et al. 2013, arXiv:1308.3432). Where
    the master lies beyond the last code it stops, as in LSQ (Esser et al. 2020, arXiv:1902.08153)."""

    masters: Mapping[str, Tensor]
    zeros: Tensor
    least: float
    most: float

    def steps(self, scales: Tensor) -> Tensor:
        """The nearest."""
        (master,) = self.masters.values()
        exact = torch.clamp(master / scales, self.least - self.zeros, self.most - self.zeros)
        return exact + (torch.round(exact) - exact).detach()


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """One rounded weight: its codes, ``began`` the scales it began with [..., groups], ``share`` the master of what became of them, and how
    many inputs have one scale."""

    codes: Codes
    began: Tensor
    share: Tensor
    group: int
    zeros: Tensor | None

    @classmethod
    def of(cls, name: str, made: QuantizedLinear, form: LinearFormat, near: Array | None) -> "Grid":
        """Codes and scales as ``made`` has them; ``near`` is what it was before, where codes are to be learned: masters begin as near to
        it as has these codes."""
        if made.scales is None:
            raise ValueError(f"{name} is in {form}, which has no scales to learn")
        size = made.q.shape[-1]
        began = torch.tensor(np.asarray(made.scales, np.float32))
        zeros = None if made.zeros is None else _spread(torch.tensor(made.zeros.astype(np.float32)), made.group, size)
        values = torch.tensor(made.q.astype(np.float32)) - (0.0 if zeros is None else zeros)
        share = torch.zeros_like(began).requires_grad_()
        codes: Codes = Kept(values)
        if near is not None:
            steps = torch.tensor(near.astype(np.float32)) / _spread(began, made.group, size)
            inside = torch.minimum(torch.maximum(steps, values - INSIDE), values + INSIDE)
            master = (inside * _spread(began, made.group, size)).requires_grad_()
            most = 2.0 ** (form.bits - 1) - 1
            codes = Learned({name: master}, torch.zeros(()) if zeros is None else zeros, -most - (made.zeros is not None), most)
        return cls(codes, began, share, made.group, zeros)

    @property
    def scales(self) -> Tensor:
        """As they are now, [..., groups]."""
        return self.began * torch.exp(self.share)

    def weight(self) -> Tensor:
        """What codes and scales stand for."""
        scales = _spread(self.scales, self.group, self._size)
        return self.codes.steps(scales) * scales

    @torch.no_grad()
    def made(self) -> QuantizedLinear:
        """The stored numbers as they are now."""
        scales = self.scales
        steps = torch.round(self.codes.steps(_spread(scales, self.group, self._size)))
        q = (steps if self.zeros is None else steps + self.zeros).to(torch.int8)
        zeros = None if self.zeros is None else self.zeros[..., :: self.group].to(torch.int32).numpy()
        return QuantizedLinear(q.numpy(), scales.numpy(), zeros, self.group)

    @property
    def _size(self) -> int:
        if isinstance(self.codes, Kept):
            return self.codes.values.shape[-1]
        (master,) = self.codes.masters.values()
        return master.shape[-1]


@dataclasses.dataclass(frozen=True, slots=True)
class Rounded:
    """Parameters of which those in ``grids``, by name, are rounded, and the ``inner`` ones are not."""

    inner: Parameters
    grids: Mapping[str, Grid]

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Those of what is not rounded, of scales, and of codes that are learned."""
        made = dict(self.inner.masters)
        for name, grid in self.grids.items():
            made |= {name + SCALE: grid.share, **grid.codes.masters}
        return made

    @property
    def matrices(self) -> frozenset[str]:
        """Matrices of linear layers, rounded ones among them, where they are learned."""
        return self.inner.matrices | {name for grid in self.grids.values() for name in grid.codes.masters}

    def weights(self) -> Mapping[str, Tensor]:
        """What codes and scales stand for, and the rest."""
        return {**self.inner.weights(), **{name: grid.weight() for name, grid in self.grids.items()}}


def _spread(scales: Tensor, group: int, size: int) -> Tensor:
    """[..., groups] → [..., size]: each scale for the inputs that share it."""
    return scales.repeat_interleave(group, -1)[..., :size]
