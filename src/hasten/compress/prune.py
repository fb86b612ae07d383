"""Which weights of a linear layer to take away, and what the others become: magnitude, Wanda, SparseGPT."""

import dataclasses
import re
from typing import Literal

import torch
from torch import Tensor

from hasten.base.errors import ConfigError, one_line
from hasten.compress.gptq import LAZY, damped, inverse_factor


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """``share`` of the weights go, wherever they lie."""

    share: float

    def keep(self, scores: Tensor) -> Tensor:
        """Of ``scores`` [out, in], row by row, True for the highest; of equal ones the first stay."""
        return _highest(scores, scores.shape[1] - round(self.share * scores.shape[1]))


@dataclasses.dataclass(frozen=True, slots=True)
class OfEvery:
    """Of every ``of`` weights side by side in a row, ``kept`` stay: 2 of 4 is what kernels know."""

    kept: int
    of: int

    def keep(self, scores: Tensor) -> Tensor:
        """Of ``scores`` [out, in], group by group, True for the highest; of equal ones the first stay. A last group that is not whole
        keeps as many as it would have."""
        out, size = scores.shape
        padded = torch.nn.functional.pad(scores, (0, -size % self.of), value=-1.0)
        return _highest(padded.reshape(-1, self.of), self.kept).reshape(out, -1)[:, :size]


Pattern = Share | OfEvery


def parse_pattern(text: str) -> Pattern:
    """``50%`` or ``2:4``. Raises ConfigError for what is neither, or takes everything or nothing."""
    if found := re.fullmatch(r"(\d{1,2}(?:\.\d{1,3})?)%", text):
        share = float(found[1]) / 100
        if 0 < share < 1:
            return Share(share)
    elif found := re.fullmatch(r"(\d{1,2}):(\d{1,2})", text):
        kept, of = int(found[1]), int(found[2])
        if 0 < kept < of:
            return OfEvery(kept, of)
    raise ConfigError(f"sparsity is {one_line(text)}; accepted are a share that goes, as 50%, or how many of how many stay, as 2:4")


Among = Literal["rows", "matrix"]
"""Whether a share goes of each row or of the whole matrix."""


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """True [out, in] for what stays: the largest. A share is taken of the whole matrix, not of each row."""
    return _kept(weight.abs(), pattern, "matrix")


def wanda(weight: Tensor, moments: Tensor, pattern: Pattern, among: Among = "rows") -> Tensor:
    """True [out, in] for what stays: the largest |w|·‖x‖, of each row as its paper has it (Sun et al. 2023, arXiv:2306.11695), or of the
    whole matrix.

    ``moments`` [in, in] are Σ x·xᵀ."""
    return _kept(weight.abs() * moments.diagonal().sqrt().to(weight.dtype), pattern, among)


def sparsegpt(weight: Tensor, moments: Tensor, pattern: Pattern, *, damp: float = 0.01) -> Tensor:
    """``weight`` [out, in] with zeros where weights went, and what stays changed so that ‖(W − S)·X‖² is small (Frantar and Alistarh 2023,
    arXiv:2301.00774): columns in order, each one's error made good by those behind it; which go is chosen LAZY columns at a time, by
    w² over the inverse's diagonal, or, in a pattern, as its groups are reached. Raises ConfigError for moments that stay singular."""
    size = weight.shape[1]
    factor = inverse_factor(damped(moments, damp)).to(weight.dtype)
    left = weight.clone()
    diagonal = factor.diagonal()
    groups = pattern.of if isinstance(pattern, OfEvery) else 0
    lazy = -(-LAZY // groups) * groups if groups else LAZY
    for start in range(0, size, lazy):
        stop = min(start + lazy, size)
        part, errors = left[:, start:stop], torch.empty(weight.shape[0], stop - start, dtype=weight.dtype)
        if not groups:
            keep = _kept((part / diagonal[start:stop]) ** 2, pattern, "matrix")  # of a block of columns, over all its rows
        else:
            keep = torch.ones_like(part, dtype=torch.bool)
        for j in range(stop - start):
            if groups and j % groups == 0:
                inside = slice(j, min(j + groups, stop - start))
                keep[:, inside] = pattern.keep((part[:, inside] / diagonal[start + inside.start : start + inside.stop]) ** 2)
            made = torch.where(keep[:, j], part[:, j], 0.0)
            error = (part[:, j] - made) / diagonal[start + j]
            part[:, j] = made
            part[:, j + 1 :] -= torch.outer(error, factor[start + j, start + j + 1 : stop])
            errors[:, j] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left


def _kept(scores: Tensor, pattern: Pattern, among: Among) -> Tensor:
    if isinstance(pattern, Share) and among == "matrix":
        return pattern.keep(scores.reshape(1, -1)).reshape(scores.shape)
    return pattern.keep(scores)


def _highest(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :count], True)
