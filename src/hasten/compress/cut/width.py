"""The residual width cut: every part of the model reads and writes the directions that the stream has most energy in.

After SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024), with one rotation for the whole model in the place of one for each block, so that
what is left is an ordinary model: principal components of what all norms hand on, their scales folded into what reads them. What reads
them makes good what is lost, as far as it can be told from what is kept: the least squares' answer, each for what reaches it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import UnsupportedError
from hasten.compress.cut.described import described
from hasten.compress.cut.slices import check_damp, check_matrices, check_plain, check_share, kept_of, remade, text_facts
from hasten.compress.data import Text
from hasten.compress.rotate import Turns, turns_of
from hasten.compress.sites import Site
from hasten.compress.threads import one_torch_thread
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import Precision, lower, ops
from hasten.spec import Attention, Mamba, RMSNorm, Spec

FINAL = "norm"
"""Stands for what the last norm hands to the head."""


class CutWidth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``share`` of the residual width goes. Without ``compensate`` what reads it only scales what is kept."""

    share: float = 0.25
    compensate: bool = True
    damp: float = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class Basis:
    """``kept`` [width, left]: orthonormal directions that stay. ``seen`` are, by what is read, the mean of x·xᵀ [width, width]."""

    kept: Tensor
    seen: Mapping[str, Tensor]

    def energy(self, x: str) -> float:
        """Which share of the energy of ``x`` is kept."""
        square = self.seen[x]
        return float((self.kept * (square @ self.kept)).sum() / square.diagonal().sum())

    def scale(self, x: str) -> float:
        """What a norm over the directions that stay makes of them, next to what one over all did."""
        width, left = self.kept.shape
        return math.sqrt(left / width / max(self.energy(x), 1e-12))


def check_cut_width(model: Model, settings: CutWidth) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    check_share(settings.share)
    check_matrices(model.spec, low_rank=True)
    kept_of(model.spec.width, settings.share, "features of the residual stream")
    check_damp(settings.damp)
    if model.spec.exits:
        raise UnsupportedError("the model has early exits, whose heads would have to be cut for themselves; cut the width before")
    turns = _turns(model.spec)
    check_plain(model, sorted({*turns.tables, *turns.readers, *turns.writers}))


def cut_width(model: Model, settings: CutWidth, text: Text, run: Run) -> Model:
    """``model`` with a narrower residual stream, its directions found on ``text``. A head that was tied stays so: it reads the same table,
    and the last norm's scales are what fits its logits best."""
    spec, turns = model.spec, _turns(model.spec)
    left = kept_of(spec.width, settings.share, "features of the residual stream")
    folded = _folded(model, turns)
    basis = _basis(folded, turns, left, settings, text, run)
    reads: dict[str, str] = {
        op.weight: op.x for op in lower(spec, precision=Precision()).ops if isinstance(op, ops.Linear | ops.ExpertLinear)
    }
    kept = basis.kept.float()
    made: dict[str, Weight] = {}
    for name, weight in folded.weights.items():
        if name in turns.tables:
            made[name] = _lazily(weight, (*weight.shape[:-1], left), functools.partial(torch.matmul, other=kept))
        elif name in turns.readers:
            x = FINAL if name == "head.weight" else reads[name]
            fit = reading(basis, x, normed=turns.readers[name] is not None, compensate=settings.compensate, damp=settings.damp)
            made[name] = _lazily(weight, (*weight.shape[:-1], left), functools.partial(torch.matmul, other=fit))
        elif name in turns.writers:
            made[name] = _lazily(weight, (*weight.shape[:-2], left, weight.shape[-1]), functools.partial(torch.matmul, kept.T))
        elif name in turns.biases:
            made[name] = _lazily(weight, (*weight.shape[:-1], left), functools.partial(torch.matmul, other=kept))
        elif name in turns.norms:
            made[name] = _full(weight.dtype, left, 1 - turns.norms[name])
        else:
            made[name] = weight
    norm = turns.readers.get("embedding.weight")
    if spec.head.tied and norm is not None:
        made[norm] = _final(model, norm, turns.norms[norm], basis, settings)
    narrow = msgspec.structs.replace(spec, width=left)
    energies = [basis.energy(x) for x in basis.seen]
    evidence = {
        "width": [spec.width, left],
        "kept_energy": sum(energies) / len(energies),
        "least": min(basis.seen, key=basis.energy),
        "least_kept_energy": min(energies),
        **text_facts(text),
    }
    result = remade(model, narrow, made, Provenance("cut_width", msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(result, source=described(model.source, narrow, _changes(narrow)))


def _turns(spec: Spec) -> Turns:
    """What reads and writes the stream. Raises UnsupportedError where it cannot be rotated."""
    try:
        return turns_of(lower(spec))
    except UnsupportedError as error:
        reason = str(error).replace("leave rotate out", "leave cut_width out").replace("cannot be rotated", "cannot be cut")
        raise UnsupportedError(reason) from None


def _folded(model: Model, turns: Turns) -> Model:
    """The same function with norms that scale nothing, but for the one before a tied head, who shares its weight."""
    made = dict(model.weights)
    tied = turns.readers.get("embedding.weight")
    for name, norm in turns.readers.items():
        if norm is not None and name not in turns.tables:
            scales = torch.from_numpy(model.weights.array(norm).astype(np.float32)) + turns.norms[norm]
            made[name] = _lazily(made[name], made[name].shape, functools.partial(torch.mul, other=scales))
    for norm, offset in turns.norms.items():
        if norm != tied:
            made[norm] = _full(model.weights[norm].dtype, len(model.weights.array(norm)), 1 - offset)
    return dataclasses.replace(model, weights=Weights(made))


def _basis(folded: Model, turns: Turns, left: int, settings: CutWidth, text: Text, run: Run) -> Basis:
    """Where the stream has most energy, over all that reads it, each weighing the same, but the head as much as one of each block: it lost
    code-8m least of 1, 4, 8 and 16 times."""

    def treat(block: Block) -> Treated:
        sites = {
            op.x: Site(op.weight, op.x)
            for op in block.piece.ops
            if isinstance(op, ops.Linear | ops.ExpertLinear) and op.weight in turns.readers
        }
        played = block.text()
        found = played.moments(block.weights, list(sites.values()))
        arrays: dict[str, Array] = {site.x: (each[0].square / max(1, each[0].rows)).numpy() for site, each in found.items()}
        if block.index == len(folded.spec.blocks) - 1:
            (out,) = block.piece.outputs
            total, rows = torch.zeros(folded.spec.width, folded.spec.width, dtype=torch.float64), 0
            for values in played.outputs(block.weights, [out]):
                x = _normed(values[out], folded.spec)
                total += x.T @ x
                rows += len(x)
            arrays[FINAL] = (total / max(1, rows)).numpy()
        return Treated(arrays, {}, block.weights)

    walked = walk(folded, settings, text, run, treat)
    seen = {x: torch.from_numpy(np.array(file.read(x))) for file in walked.files for x in file.entries}
    with one_torch_thread():
        total = torch.zeros(folded.spec.width, folded.spec.width, dtype=torch.float64)
        for x, square in seen.items():
            total += (len(folded.spec.blocks) if x == FINAL else 1) * square / square.diagonal().sum().clamp(min=1e-30)
        vectors = torch.linalg.eigh(total).eigenvectors
    return Basis(vectors.flip(1)[:, :left].contiguous(), seen)


def _normed(x: Tensor, spec: Spec) -> Tensor:
    """What the last norm makes of ``x`` before it scales features."""
    if not isinstance(spec.norm, RMSNorm):
        return x
    made: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm.eps)
    return made


def reading(basis: Basis, x: str, *, normed: bool, compensate: bool, damp: float) -> Tensor:
    """What a weight that reads ``x`` is multiplied by [width, left], float32: what is kept, scaled as its norm was, or, to ``compensate``,
    the least squares' guess of all of x from that."""
    kept, square = basis.kept, basis.seen[x]
    with one_torch_thread():
        guess = kept
        if compensate:
            inside = kept.T @ square @ kept
            added = damp * inside.diagonal().mean() + 1e-30
            inside.diagonal().add_(added)
            guess = torch.linalg.solve(inside, (square @ kept + added * kept).T).T
    return guess.div(basis.scale(x) if normed else 1.0).float().contiguous()


def final_scales(table: Tensor, old: Tensor, basis: Basis, damp: float) -> Tensor:
    """The scales [left], float64, with which a narrower tied table gives logits nearest to those of ``table`` [vocab, width] behind a norm
    that scales by ``old`` [width].

    With E the table, D its product with what is kept, x what the norm hands on and u what it will hand on of what is kept, this is
    the least squares' answer g to E·diag(old)·x ≈ D·diag(g)·u: (DᵀD ∘ Σ u·uᵀ)·g = diag(DᵀE·diag(old)·Σ x·uᵀ)."""
    kept, square, scale = basis.kept, basis.seen[FINAL], basis.scale(FINAL)
    table, old = table.double(), old.double()
    with one_torch_thread():
        gram = table.T @ table
        inner = (kept.T @ gram @ kept) * (kept.T @ square @ kept) * scale**2
        cross = (kept.T @ gram * old) @ square @ kept * scale
        likely = (kept.T * old @ kept).diagonal() / scale
        added = damp * inner.diagonal().mean() + 1e-30
        inner.diagonal().add_(added)
        found: Tensor = torch.linalg.solve(inner, cross.diagonal() + added * likely)
    return found


def _final(model: Model, norm: str, offset: float, basis: Basis, settings: CutWidth) -> Weight:
    """The last norm's weight [left] before a tied head."""
    table, old = (torch.from_numpy(model.weights.array(name).astype(np.float32)) for name in ("embedding.weight", norm))
    found = final_scales(table, old + offset, basis, settings.damp)
    array = (found - offset).float().numpy().astype(model.weights[norm].dtype)
    return Weight(array.shape, array.dtype, lambda: array)


def _full(dtype: np.dtype[Any], size: int, number: float) -> Weight:
    return Weight((size,), dtype, lambda: np.full(size, number, dtype))


def _lazily(weight: Weight, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> Weight:
    """What ``function`` makes of ``weight``, computed in float32 when it is asked for, and not rounded."""
    return Weight(shape, np.dtype(np.float32), functools.partial(_applied, weight, function))


def _applied(weight: Weight, function: Callable[[Tensor], Tensor]) -> Array:
    made: Array = function(torch.from_numpy(weight.load().astype(np.float32))).contiguous().numpy()
    return made


def _changes(spec: Spec) -> dict[str, int]:
    """What a config may have to say otherwise: the width, and sizes that follow from it where a config does not say them."""
    mixer = spec.blocks[0].mixer
    if isinstance(mixer, Attention):
        return {"width": spec.width, "head_dim": mixer.head_dim}
    return {"width": spec.width, **({"inner": mixer.inner, "dt_rank": mixer.dt_rank} if isinstance(mixer, Mamba) else {})}
