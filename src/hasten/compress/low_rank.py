"""Low rank: a matrix becomes a product of two, cut where it matters least to what it gives."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.data import Text
from hasten.compress.gptq import damped
from hasten.compress.heal import in_dtype
from hasten.compress.sites import Layers, Site, sites_of
from hasten.compress.threads import in_order
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import lower
from hasten.spec import LowRank


class Rank(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each weight that ``layers`` mean as a product of two that have ``share`` fewer numbers together."""

    share: float = 0.3
    damp: float = 0.01
    layers: tuple[str, ...] = ("blocks.*",)
    skip: tuple[str, ...] = ()

    def rank(self, shape: Sequence[int]) -> int:
        """Of a weight [out, in]."""
        out, size = shape
        return int((1 - self.share) * out * size / (out + size))


def check_rank(model: Model, settings: Rank) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    if not 0 < settings.share < 1 or not 0 < settings.damp < 1:
        raise ConfigError(f"share is {settings.share} and damp {settings.damp}; accepted is more than 0 and less than 1, as 0.3 and 0.01")
    layers, program = Layers(settings.layers, settings.skip), lower(model.spec)
    layers.check(program)
    for site in sites_of(program, layers):
        shape = program.params[site.weight]
        if site.experts is not None:
            raise ConfigError(f"{site.weight} are weights of experts, which have no form of low rank; skip them")
        if isinstance(model.weights[site.weight], QuantizedWeight):
            raise ConfigError(f"{site.weight} is stored in {model.weights[site.weight].dtype} codes or without zeros; put rank before")
        if not settings.rank(shape) >= 1:
            raise ConfigError(f"{site.weight} of shape {list(shape)} has nothing left at share {settings.share}; take less, or skip it")


def rank(model: Model, settings: Rank, text: Text, run: Run) -> Model:
    """``model`` with a smaller Spec, whose factors give what the weights gave of ``text``, as nearly as their rank allows: the singular
    values of W·L, where L·Lᵀ are the moments of what W reads, so that what is cut is what the output lacks least (Wang et al. 2024,
    SVD-LLM, arXiv:2403.07378)."""
    layers = Layers(settings.layers, settings.skip)

    def treat(block: Block) -> Treated:
        sites = sites_of(block.piece, layers)
        weights, arrays, facts = dict(block.weights), dict[str, Array](), dict[str, Any]()
        moments = block.text().moments(weights, sites) if sites else {}

        def one(site: Site) -> tuple[Tensor, Tensor, float]:
            return factors(weights[site.weight], moments[site][0].square, settings.rank(weights[site.weight].shape), settings.damp)

        for site, (a, b, lost) in zip(sites, in_order(one, sites, block.threads)):
            stem = site.weight.removesuffix(".weight")
            arrays |= {f"{stem}.a.weight": a.numpy(), f"{stem}.b.weight": b.numpy()}
            facts[site.weight] = {"rank": len(a), "error": lost}
            weights[site.weight] = b @ a
        return Treated(arrays, facts, weights)

    walked = walk(model, settings, text, run, treat)
    kept: dict[str, Weight] = {name: weight for name, weight in model.weights.items() if name not in walked.facts}
    dtypes = {name.removesuffix(".weight"): model.weights[name].dtype for name in walked.facts}
    for file in walked.files:
        kept |= {name: in_dtype(file.read(name), dtypes[name.rsplit(".", 2)[0]]) for name in file.entries}
    blocks = list(model.spec.blocks)
    for name, fact in walked.facts.items():
        _, index, layer = name.removesuffix(".weight").split(".", 2)
        block = blocks[int(index)]
        blocks[int(index)] = msgspec.structs.replace(block, low_rank=(*block.low_rank, LowRank(layer=layer, rank=fact["rank"])))
    errors = {name: fact["error"] for name, fact in walked.facts.items()}
    worst = max(errors, key=errors.__getitem__)
    evidence = {
        "layers": len(errors), "mean_error": float(np.mean(list(errors.values()))), "worst_layer": worst, "worst_error": errors[worst],
        "text": text.name, "windows": len(text.windows), "tokens": text.tokens, "sha256": text.sha256,
    }  # fmt: skip
    return dataclasses.replace(
        model, spec=msgspec.structs.replace(model.spec, blocks=tuple(blocks)), weights=Weights(kept),
        provenance=(*model.provenance, Provenance("rank", msgspec.to_builtins(settings), evidence)),
    )  # fmt: skip


def factors(weight: Tensor, moments: Tensor, rank: int, damp: float) -> tuple[Tensor, Tensor, float]:
    """a [rank, in] and b [out, rank] for ``weight`` [out, in], so that ‖(W − b·a)·X‖² is least, where ``moments`` [in, in] are X·Xᵀ
    with ``damp`` times their mean diagonal added; and which share of ‖W·X‖² that is. Computes in float64."""
    lower_factor = torch.linalg.cholesky(damped(moments, damp).double())
    left, values, right = torch.linalg.svd(weight.double() @ lower_factor, full_matrices=False)
    root = values[:rank].sqrt()
    b = left[:, :rank] * root
    a = torch.linalg.solve_triangular(lower_factor, root[:, None] * right[:rank], upper=False, left=False)
    energy = values.square()
    lost = float(energy[rank:].sum() / energy.sum()) if float(energy.sum()) else 0.0
    return a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous(), lost
