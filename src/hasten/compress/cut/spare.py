"""Which inputs of a product can best be spared, and what the weights of the others become, so that its outputs stay as they were.

Both are the optimal brain surgeon's answers for whole columns (Hassibi and Stork 1993; for structured pruning Kurtić et al. 2023, ZipLM,
arXiv:2302.04089): with H = Σ x·xᵀ, taking away the columns S and letting the others make it good costs tr(W_S · ([H⁻¹]_SS)⁻¹ · W_Sᵀ)."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.gptq import damped

ROUNDS = 64
"""Most times that costs are computed anew; where more units go, several go at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spared:
    """What is left of a weight: the ``units`` that stay, rising, the weight [out, kept] that reads them, and the share of its outputs'
    energy that is error now."""

    units: Tensor
    weight: Tensor
    error: float


def spared(
    weight: Tensor, moments: Tensor, spare: int, *, damp: float, compensate: bool, size: int = 1, teams: Sequence[int] | None = None
) -> Spared:
    """``weight`` [out, in] without the ``spare`` least needed units of each team (``needed``), the others, where asked, making it good.

    ``moments`` float64 [in, in] are Σ x·xᵀ; ``damp`` times the mean of their diagonal is added to it."""
    hessian = damped(moments, damp)
    alive = moments.diagonal() > 0
    needing = weight * alive if bool(alive.any()) else weight  # nobody needs an input that was always 0, but where none was ever seen
    units = needed(needing, hessian, spare, size=size, teams=teams)
    kept = inputs_of(units, size)
    made = fitted(weight, hessian, kept) if compensate else weight[:, kept].contiguous()
    return Spared(units, made, lost(weight, made, kept, moments))


def needed(weight: Tensor, hessian: Tensor, spare: int, *, size: int = 1, teams: Sequence[int] | None = None) -> Tensor:
    """The units that stay, rising, of ``weight`` [out, in], whose inputs come in units of ``size`` side by side, when ``spare`` units of
    each team go, the least needed first. ``teams`` [units] names each unit's team; without, all are of one.

    ``hessian`` float64 [in, in] is Σ x·xᵀ, damped. Raises ConfigError where it is singular, or a team has too few."""
    units = len(hessian) // size
    team = torch.zeros(units, dtype=torch.long) if teams is None else torch.tensor(teams)
    to_go = torch.full((int(team.max()) + 1,), spare)
    if bool((torch.bincount(team) <= spare).any()):
        raise ConfigError(f"{spare} of {units // len(to_go)} are to go, so none would be left; take a smaller share")
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise ConfigError(f"the second moments of {len(hessian)} inputs are singular; raise the damping, or calibrate on more text")
    inverse, left = torch.cholesky_inverse(lower), weight.double()
    together = max(1, -(-spare // ROUNDS)) if len(to_go) == 1 else 1
    stays = torch.ones(units, dtype=torch.bool)
    while bool(to_go.any()):
        costs = _costs(left, inverse, size)
        costs[~stays | (to_go[team] == 0)] = torch.inf
        gone = torch.argsort(costs, stable=True)[: min(together, int(to_go.max()))]
        stays[gone] = False
        to_go -= torch.bincount(team[gone], minlength=len(to_go))
        left = _take_away(left, inverse, inputs_of(gone, size))
    return stays.nonzero()[:, 0]


def fitted(weight: Tensor, hessian: Tensor, kept: Tensor, wanted: Tensor | None = None) -> Tensor:
    """The weight [out, kept] that makes of the inputs ``kept`` what ``weight`` [out, in] made of all: the least squares' solution.
    ``wanted`` [out, in], where given, is Σ y·xᵀ of outputs y that are to be made instead, damped as ``hessian`` [in, in] is."""
    aim = weight.double() @ hessian if wanted is None else wanted
    solved: Tensor = torch.linalg.solve(hessian[kept][:, kept], aim[:, kept].T).T
    return solved.to(weight.dtype).contiguous()


def inputs_of(units: Tensor, size: int) -> Tensor:
    """The inputs that make up ``units`` of ``size`` each."""
    return (units[:, None] * size + torch.arange(size)).reshape(-1)


def lost(weight: Tensor, made: Tensor, kept: Tensor, moments: Tensor) -> float:
    """How much of the energy of what ``weight`` [out, in] gives is error, when ``made`` [out, kept] stands in its place; ``moments`` are
    Σ x·xᵀ."""
    error = weight.double()
    whole = float(((error @ moments) * error).sum())
    error = error.index_add(1, kept, made.double(), alpha=-1)
    return float(((error @ moments) * error).sum()) / whole if whole else 0.0


def _costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """What each unit costs: tr(W_S · ([H⁻¹]_SS)⁻¹ · W_Sᵀ)."""
    if size == 1:
        return weight.square().sum(0).div(inverse.diagonal())
    units = len(inverse) // size
    own = torch.stack([inverse[begin : begin + size, begin : begin + size] for begin in range(0, len(inverse), size)])
    columns = weight.reshape(len(weight), units, size).permute(1, 2, 0)  # [units, size, out]
    of_each: Tensor = (columns * torch.linalg.solve(own, columns)).sum((1, 2))
    return of_each


def _take_away(weight: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """The weight when the inputs ``gone`` are taken away and the others made it good. ``inverse`` becomes that of the others, in place, for
    it may be large; what is gone stands alone in it from then on."""
    beside = inverse[:, gone]
    moved = torch.linalg.solve(inverse[gone][:, gone], beside.T)
    weight = weight - weight[:, gone] @ moved
    weight[:, gone] = 0
    inverse.addmm_(beside, moved, alpha=-1)
    inverse[gone], inverse[:, gone] = 0, 0
    inverse[gone, gone] = 1
    return weight
