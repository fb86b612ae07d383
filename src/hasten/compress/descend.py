"""Coordinate descent on rounded weights: codes one by one, then scales, each to where the output's error is least."""

import torch
from torch import Tensor

from hasten.compress.gptq import damped
from hasten.compress.grid import Grid
from hasten.formats.linear import LinearFormat, QuantizedLinear

LAZY = 128


def output_loss(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    """‖(weight − other)·X‖², where ``moments`` [in, in] are X·Xᵀ."""
    error = (weight - other).double()
    return float(((error @ moments.double()) * error).sum())


def descend(
    weight: Tensor, start: QuantizedLinear, moments: Tensor, form: LinearFormat, *, damp: float = 0.01, rounds: int = 4,
    keep: Tensor | None = None,
) -> QuantizedLinear:  # fmt: skip
    """``start`` moved closer to ``weight`` [out, in] in the norm of ``moments`` [in, in], damped as in gptq; its loss never rises.

    A round solves each row for its scales with codes fixed (normal equations), then sweeps the inputs, each code moved to the nearest
    of its best value with all others fixed (Behdin et al. 2023, arXiv:2309.01885). Codes stay 0 where ``keep`` [out, in] is False. Only
    for integers."""
    hessian = damped(moments, damp)
    codes, best = torch.from_numpy(start.q).double(), start
    scales = torch.empty(0) if start.scales is None else torch.from_numpy(start.scales).double()
    zeros = None if start.zeros is None else torch.from_numpy(start.zeros).double()
    target, inputs = weight.double(), torch.arange(weight.shape[1])
    least = output_loss(target, torch.from_numpy(start.dense()), hessian)
    for _ in range(rounds):
        steps = codes if zeros is None else codes - zeros[:, torch.div(inputs, start.group, rounding_mode="floor")]
        scales = _solve_scales(target, steps, hessian, start.group, scales)
        grid = Grid(form, scales.float().double(), zeros, start.group)
        codes = _sweep(target, codes, grid, hessian, keep)
        made = grid.quantized(codes)
        loss = output_loss(target, torch.from_numpy(made.dense()), hessian)
        if loss >= least:
            break
        least, best = loss, made
    return best


def _solve_scales(target: Tensor, steps: Tensor, hessian: Tensor, group: int, scales: Tensor) -> Tensor:
    """Scales [out, groups] that make Σ scale·steps nearest to ``target``; those that come out 0 or less stay as they were."""
    out, size = steps.shape
    count = scales.shape[1]
    products = torch.empty(out, count, count, dtype=torch.float64)
    wanted = torch.empty(out, count, dtype=torch.float64)
    reached = target @ hessian
    for index in range(count):
        own = slice(index * group, min((index + 1) * group, size))
        row = steps[:, own] @ hessian[own]  # [out, in]
        lacking = -size % group
        products[:, index] = torch.nn.functional.pad(row * steps, (0, lacking)).reshape(out, count, group).sum(-1)
        wanted[:, index] = (reached[:, own] * steps[:, own]).sum(-1)
    diagonal = products.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    diagonal[empty] = 1.0
    solved = torch.linalg.solve(products, wanted[..., None])[..., 0]
    return torch.where((solved > 0) & ~empty, solved, scales)


def _sweep(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, keep: Tensor | None) -> Tensor:
    """Every input once, in order."""
    size = codes.shape[1]
    codes, inputs = codes.clone(), torch.arange(size)
    dense = grid.dense(codes, inputs)
    gradient = (target - dense) @ hessian
    for start in range(0, size, LAZY):
        stop = min(start + LAZY, size)
        moved = torch.zeros(codes.shape[0], stop - start, dtype=torch.float64)
        part = gradient[:, start:stop].clone()
        for j in range(start, stop):
            column = inputs[j : j + 1]
            wanted = dense[:, j] + part[:, j - start] / hessian[j, j]
            code = grid.codes(wanted[:, None], column)
            codes[:, j : j + 1] = code = code if keep is None else torch.where(keep[:, column], code, 0.0)
            new = grid.dense(code, column)[:, 0]
            moved[:, j - start] = change = new - dense[:, j]
            dense[:, j] = new
            part -= torch.outer(change, hessian[j, start:stop])
        gradient -= moved @ hessian[start:stop]
    return codes
