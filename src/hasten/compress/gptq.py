"""GPTQ: rounding column by column, each column's error made good by those not yet rounded (Frantar et al. 2022, arXiv:2210.17323)."""

from typing import Literal

import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.grid import Clip, Grid
from hasten.formats.linear import LinearFormat, QuantizedLinear

Order = Literal["given", "activation"]
"""Columns as they lie, or those whose inputs are largest first."""

LAZY = 128  # columns whose errors are handed on together


def gptq(
    weight: Tensor,
    moments: Tensor,
    form: LinearFormat,
    *,
    damp: float = 0.01,
    order: Order = "activation",
    static_groups: bool = True,
    clip: Clip = "none",
    keep: Tensor | None = None,
) -> QuantizedLinear:
    """``weight`` [out, in] rounded so that ‖(W − Q)·X‖² stays small, where ``moments`` [in, in] are X·Xᵀ over the inputs seen.

    ``damp`` times the mean of the moments' diagonal is added to it. Groups' scales are chosen before anything is rounded, or, without
    ``static_groups``, when their first column is reached, from what the columns have become. Where ``keep`` [out, in] is False, as in a
    weight that was pruned, the code is 0: what errors before would have made of it is made good by those behind (SparseGPT's joint
    rounding, arXiv:2301.00774). Computes in the weight's dtype, factors moments in float64. Raises ConfigError for activation order
    without static groups, whose groups would not lie together, and for damping that leaves the moments singular."""
    out, size = weight.shape
    group = form.group or size
    if order == "activation" and not static_groups and group < size:
        raise ConfigError(
            "activation order without static groups would spread a group over the inputs, which no stored format here can say; turn one off"
        )
    columns = torch.arange(size) if order == "given" else torch.argsort(moments.diagonal(), descending=True, stable=True)
    grid = Grid.fit(_kept(weight, keep), form, clip=clip, moments=moments)
    scales, zeros = grid.scales.clone(), None if grid.zeros is None else grid.zeros.clone()
    left = weight[:, columns].clone()
    factor = inverse_factor(damped(moments, damp)[columns][:, columns]).to(weight.dtype)
    codes = torch.empty_like(left)
    lazy = LAZY if static_groups or group >= size else -(-LAZY // group) * group
    for start in range(0, size, lazy):
        stop = min(start + lazy, size)
        part, errors = left[:, start:stop].clone(), torch.empty(out, stop - start, dtype=weight.dtype)
        for j in range(stop - start):
            column = columns[start + j : start + j + 1]
            if not static_groups and (start + j) % group == 0 and group < size:
                inside = slice(start + j, min(start + j + group, size))
                its = _kept(part[:, j : j + group], None if keep is None else keep[:, inside])
                own = Grid.fit(its, form, clip=clip, moments=moments[inside, inside])
                index = (start + j) // group
                scales[:, index] = own.scales[:, 0]
                if zeros is not None and own.zeros is not None:
                    zeros[:, index] = own.zeros[:, 0]
                grid = Grid(form, scales, zeros, group)
            codes[:, start + j : start + j + 1] = code = _kept(
                grid.codes(part[:, j : j + 1], column), None if keep is None else keep[:, column]
            )
            error = (part[:, j] - grid.dense(code, column)[:, 0]) / factor[start + j, start + j]
            part[:, j + 1 :] -= torch.outer(error, factor[start + j, start + j + 1 : stop])
            errors[:, j] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    result = torch.empty_like(codes)
    result[:, columns] = codes
    return grid.quantized(result)


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else torch.where(keep, values, 0.0)


def damped(moments: Tensor, damp: float) -> Tensor:
    """``moments`` in float64 with ``damp`` of their mean diagonal added to it; inputs that were never anything but 0 stand alone."""
    hessian = moments.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    dead = diagonal == 0
    diagonal[dead] = mean if mean > 0 else 1.0
    diagonal += damp * mean
    return hessian


def aimed(weight: Tensor, moments: Tensor, cross: Tensor, damp: float) -> Tensor:
    """The weight [out, in] whose outputs on the inputs x that there are come nearest to those of ``weight`` on the inputs u that were
    meant: weight · (Σ u·xᵀ + d) · (Σ x·xᵀ + d)⁻¹, with ``moments`` Σ x·xᵀ, ``cross`` Σ u·xᵀ, and d what ``damped`` adds."""
    hessian = damped(moments, damp)
    wanted = cross + (hessian - moments.double())
    solved: Tensor = torch.linalg.solve(hessian, (weight.double() @ wanted).T).T
    return solved.to(weight.dtype).contiguous()


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with UᵀU = hessian⁻¹, so that its rows from i on factor the inverse of hessian[i:, i:].

    Raises ConfigError where the matrix is not positive definite."""
    size = len(hessian)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    del hessian  # matrices of this size are what a layer's rounding needs most of its memory for
    if not failed:
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return upper
    raise ConfigError(f"the second moments of {size} inputs are singular; raise the damping, or calibrate on more text")
