"""Transforms that prune: linear weights of blocks become sparse ones, which keep bf16 numbers and leave zeros out."""

import dataclasses
from typing import Any

import msgspec
import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.blocks import Moments
from hasten.compress.data import Text
from hasten.compress.ends import left_alone
from hasten.compress.prune import Among, Share, magnitude, parse_pattern, sparsegpt, wanda
from hasten.compress.rounding import Rounder, evidence_of, store_blocks, weights_in_blocks
from hasten.compress.sites import Layers
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.formats.quantized import QuantizedWeight, is_pruned
from hasten.formats.weights import Weights
from hasten.model import Model, Provenance
from hasten.program import lower

FORM = LinearFormat.parse("bf16-sparse")


class Pruning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``sparsity`` is the share of weights that go, as 50%, or how many of how many stay, as 2:4; ``layers`` and ``skip`` are globs over
    weight names within blocks."""

    sparsity: str = "50%"
    layers: tuple[str, ...] = ("blocks.*",)
    skip: tuple[str, ...] = ()

    @property
    def meant(self) -> Layers:
        """The layers that are pruned."""
        return Layers(self.layers, self.skip)


class Magnitude(Pruning, frozen=True, kw_only=True):
    """The smallest weights go."""


class Wanda(Pruning, frozen=True, kw_only=True):
    """Those go that are smallest times the size of what they read, ``among`` those of a row, or of a whole matrix."""

    among: Among = "rows"


class SparseGpt(Pruning, frozen=True, kw_only=True):
    """Those go whose loss the others of their row can best make good, and these do; ``damp`` as in Gptq."""

    damp: float = 0.01


def check_prune(model: Model, settings: Pruning) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    pattern = parse_pattern(settings.sparsity)
    if isinstance(settings, Wanda) and settings.among == "matrix" and not isinstance(pattern, Share):
        raise ConfigError(f"wanda takes {settings.sparsity} of every few weights side by side, not among a matrix; give a share, as 50%")
    settings.meant.check(lower(model.spec))
    for name in weights_in_blocks(model, settings.meant):
        weight = model.weights[name]
        if isinstance(weight, QuantizedWeight) and not is_pruned(weight):
            raise ConfigError(f"{name} is quantized already, so it cannot be pruned; put this transform before those that round")
    if isinstance(settings, SparseGpt) and not 0 < settings.damp < 1:
        raise ConfigError(f"damp is {settings.damp}; accepted is a share between 0 and 1, as 0.01")


def prune(model: Model, settings: Pruning, text: Text | None, run: Run) -> Model:
    """``model`` with fewer weights, block by block, each block fed what the pruned ones before it give. ``text`` is what Wanda and
    SparseGpt look at; Magnitude is given none."""
    name = type(settings).__name__.lower()
    forms = dict.fromkeys(weights_in_blocks(model, settings.meant), FORM)
    stored, facts = store_blocks(model, name, settings, forms, text, run, _pruner(settings))
    weights = Weights({**model.weights, **stored})
    size, kept = sum(weight.size for weight in stored.values()), sum(fact["kept"] for fact in facts.values())
    evidence: dict[str, Any] = {
        **evidence_of(facts, text), "zeros": 1 - kept / size, "left": left_alone(lower(model.spec), model.weights, weights),
    }  # fmt: skip
    provenance = (*model.provenance, Provenance(name, msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(model, weights=weights, provenance=provenance)


def _pruner(settings: Pruning) -> Rounder:
    pattern = parse_pattern(settings.sparsity)

    def one(weight: Tensor, moments: Moments | None, form: LinearFormat) -> QuantizedLinear:
        match settings:
            case SparseGpt():
                made = sparsegpt(weight, _known(settings, moments).square, pattern, damp=settings.damp)
            case Wanda():
                known = _known(settings, moments)
                # of inputs that nothing is known of, as of an expert that no token chose, all are alike
                seen = known.square if known.rows else torch.eye(weight.shape[1], dtype=known.square.dtype)
                made = torch.where(wanda(weight, seen, pattern, settings.among), weight, 0.0)
            case _:
                made = torch.where(magnitude(weight, pattern), weight, 0.0)
        return form.quantize(made.numpy())

    return one


def _known(settings: Pruning, moments: Moments | None) -> Moments:
    if moments is None:
        raise ConfigError(f"{type(settings).__name__.lower()} looks at activations, so it needs text to calibrate on")
    return moments
