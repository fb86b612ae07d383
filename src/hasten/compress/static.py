"""Static activation scales: one for all tokens at every product that is fed int8, found on text, in place of each token's own.

They save the search for a row's largest number, and cost accuracy where tokens differ; engines without dynamic scales need them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.blocks import Played
from hasten.compress.data import Text
from hasten.compress.sites import Layers, by_value, sites_of
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.quantized import QuantizedWeight, static
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import lower

LIMIT = 127
SHARES = tuple(step / 50 for step in range(50, 9, -1))
"""Of the largest |x|: the ranges that are tried."""


class Static(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``range`` 'largest' covers the largest |x| that the text gives; 'error' what of it leaves the least squared error of x."""

    range: Literal["largest", "error"] = "error"
    layers: tuple[str, ...] = ("blocks.*",)
    skip: tuple[str, ...] = ()


def check_static(model: Model, settings: Static) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    Layers(settings.layers, settings.skip).check(lower(model.spec))


def fed_int8(model: Model) -> frozenset[str]:
    """The weights that are stored quantized, to be multiplied with int8 activations."""
    return frozenset(
        name for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight) and weight.activations.startswith("int8")
    )


def static_transform(model: Model, settings: Static, text: Text, run: Run) -> Model:
    """``model`` with one activation scale for each value that weights fed int8 read. No weight changes. Raises ConfigError where there are
    none."""
    layers, names = Layers(settings.layers, settings.skip), fed_int8(model)

    def treat(block: Block) -> Treated:
        sites = [site for site in sites_of(block.piece, layers) if site.weight in names]
        if not sites:
            return Treated({}, {}, block.weights)
        values = [x for x, _ in by_value(sites)]
        ranges = _ranges(block.text(), block.weights, values, settings.range == "error")
        steps = {site.weight: ranges[site.x][0] / LIMIT or 1.0 for site in sites}
        arrays: dict[str, Array] = {f"{name}:step": np.array([step], np.float32) for name, step in steps.items()}
        return Treated(arrays, {x: {"share": share} for x, (_, share) in ranges.items()}, block.weights)

    if not names:
        raise ConfigError("static finds no weights that are fed int8; put it behind a transform that rounds with activations: int8")
    walked = walk(model, settings, text, run, treat)
    made: dict[str, Weight] = dict(model.weights)
    for file in walked.files:
        for key in file.entries:
            weight = made[name := key.removesuffix(":step")]
            if isinstance(weight, QuantizedWeight):
                made[name] = static(weight, float(file.read(key)[0]))
    shares = [fact["share"] for fact in walked.facts.values()]
    evidence: dict[str, Any] = {
        "values": len(shares), "mean_share_of_largest": sum(shares) / max(1, len(shares)), "text": text.name, "windows": len(text.windows),
        "tokens": text.tokens, "sha256": text.sha256,
    }  # fmt: skip
    provenance = (*model.provenance, Provenance("static", msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(model, weights=Weights(made), provenance=provenance)


def _ranges(played: Played, weights: Mapping[str, Tensor], values: Sequence[str], search: bool) -> dict[str, tuple[float, float]]:
    """Of each value the range that int8 is to cover, and its share of the largest |x|."""
    largest = dict.fromkeys(values, 0.0)
    for chunk in played.outputs(weights, values):
        for x in values:
            largest[x] = max(largest[x], float(chunk[x].abs().max()))
    if not search:
        return {x: (most, 1.0) for x, most in largest.items()}
    errors = {x: torch.zeros(len(SHARES), dtype=torch.float64) for x in values}
    for chunk in played.outputs(weights, values):
        for x in values:
            errors[x] += torch.stack([_error(chunk[x], share * largest[x] / LIMIT) for share in SHARES])
    best = {x: SHARES[int(error.argmin())] for x, error in errors.items()}
    return {x: (share * largest[x], share) for x, share in best.items()}


def _error(x: Tensor, step: float) -> Tensor:
    """Σ (x − what int8 of ``step`` makes of it)², float64."""
    if not step:
        return torch.zeros((), dtype=torch.float64)
    return ((x / step).round().clamp(-LIMIT, LIMIT).mul(step) - x).square().sum(dtype=torch.float64)
