"""GPTQ: rounding column by column, each column's error made good by those not yet rounded (Frantar et al. 2022, arXiv:2210.17323)."""

from collections.abc import Callable
from typing import Literal, Protocol

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
    size = weight.shape[1]
    group = form.group or size
    if order == "activation" and not static_groups and group < size:
        raise ConfigError(
            "activation order without static groups would spread a group over the inputs, which no stored format here can say; turn one off"
        )
    columns = torch.arange(size) if order == "given" else torch.argsort(moments.diagonal(), descending=True, stable=True)
    grid = Grid.fit(_kept(weight, keep), form, clip=clip, moments=moments)
    if static_groups or group >= size:
        return in_turn(weight, moments, grid, columns, damp=damp, keep=keep)
    scales, zeros = grid.scales.clone(), None if grid.zeros is None else grid.zeros.clone()

    def anew(at: int, left: Tensor) -> Grid:
        if at % group == 0:
            inside = slice(at, min(at + group, size))
            its = _kept(left[:, :group], None if keep is None else keep[:, inside])
            own = Grid.fit(its, form, clip=clip, moments=moments[inside, inside])
            scales[:, at // group] = own.scales[:, 0]
            if zeros is not None and own.zeros is not None:
                zeros[:, at // group] = own.zeros[:, 0]
        return Grid(form, scales, zeros, group)

    return in_turn(weight, moments, grid, columns, damp=damp, keep=keep, anew=anew, lazy=-(-LAZY // group) * group)


class Numbers(Protocol):
    """What a weight may be rounded to."""

    def codes(self, columns: Tensor, inputs: Tensor) -> Tensor:
        """Stored numbers of ``columns`` [out, n], the weights of ``inputs`` [n]: the nearest."""
        ...

    def dense(self, codes: Tensor, inputs: Tensor) -> Tensor:
        """What stored numbers [out, n] of ``inputs`` [n] stand for."""
        ...

    def quantized(self, codes: Tensor) -> QuantizedLinear:
        """All stored numbers [out, in] with what they go with."""
        ...


def in_turn(
    weight: Tensor,
    moments: Tensor,
    numbers: Numbers,
    columns: Tensor,
    *,
    damp: float = 0.01,
    keep: Tensor | None = None,
    anew: Callable[[int, Tensor], Numbers] | None = None,
    lazy: int = LAZY,
) -> QuantizedLinear:
    """GPTQ's inner part: ``weight`` [out, in] rounded to ``numbers``, the inputs in the order of ``columns``, ``lazy`` at a time. ``anew``
    gives other numbers from a place in that order on, given what the columns left of its part have become. See `gptq` for the rest."""
    out, size = weight.shape
    left = weight[:, columns].clone()
    factor = inverse_factor(damped(moments, damp)[columns][:, columns]).to(weight.dtype)
    codes = torch.empty_like(left)
    for start in range(0, size, lazy):
        stop = min(start + lazy, size)
        part, errors = left[:, start:stop].clone(), torch.empty(out, stop - start, dtype=weight.dtype)
        for j in range(stop - start):
            column = columns[start + j : start + j + 1]
            if anew is not None:
                numbers = anew(start + j, part[:, j:])
            codes[:, start + j : start + j + 1] = code = _kept(
                numbers.codes(part[:, j : j + 1], column), None if keep is None else keep[:, column]
            )
            error = (part[:, j] - numbers.dense(code, column)[:, 0]) / factor[start + j, start + j]
            part[:, j + 1 :] -= torch.outer(error, factor[start + j, start + j + 1 : stop])
            errors[:, j] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    result = torch.empty_like(codes)
    result[:, columns] = codes
    return numbers.quantized(result)


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
