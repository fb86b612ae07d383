"""Transforms that move scales from activations into weights: the function stays, rounding that follows costs less."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.backends.reference.play import as_tensor
from hasten.base.errors import ConfigError
from hasten.compress.blocks import Moments, pieces
from hasten.compress.data import Text
from hasten.compress.fold import fold, tie_of
from hasten.compress.scales import awq_scales, smooth_scales
from hasten.compress.sites import Layers, NormBefore, ScaleGroup, Site, scale_groups
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.linear import NUMBERS, LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import lower

Chooser = Callable[[Sequence[tuple[Tensor, Moments]], Moments, Tensor | None, int], tuple[Tensor, dict[str, Any]]]
"""Chooses the scales [in] of weights that read one value, each with the moments of what it reads, given the moments of the value itself,
which inputs share a scale, and a number of threads; and says what they are expected to give."""

_WHOLE = ""  # stands for the value itself among the sites that read it


class Awq(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Activation-aware scales for rounding to ``weights``, of which ``steps`` + 1 exponents are tried."""

    weights: str = "int4-g64"
    steps: int = 20
    layers: tuple[str, ...] = ("blocks.*",)
    skip: tuple[str, ...] = ()


class SmoothQuant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scales for int8 activations; ``strength`` 0 leaves all to the activations, 1 all to the weights."""

    strength: float = 0.5
    layers: tuple[str, ...] = ("blocks.*",)
    skip: tuple[str, ...] = ()


def check_awq(model: Model, settings: Awq) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    form = LinearFormat.parse(settings.weights)
    if not NUMBERS[form.number][1] or form.sparse or form.has_codebook:
        raise ConfigError(f"awq has nothing to search for weights {form}; accepted are int8, int4, int3, int2, fp8 and their variants")
    if not 1 <= settings.steps <= 200:
        raise ConfigError(f"steps is {settings.steps}; accepted are 1 to 200")
    _check(model, Layers(settings.layers, settings.skip))


def check_smoothquant(model: Model, settings: SmoothQuant) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    if not 0 <= settings.strength <= 1:
        raise ConfigError(f"strength is {settings.strength}; accepted is 0 to 1")
    _check(model, Layers(settings.layers, settings.skip))


def _check(model: Model, layers: Layers) -> None:
    program = lower(model.spec)
    layers.check(program)
    groups = scale_groups(program, layers)
    if not groups:
        raise ConfigError(f"no linear layer of {model.name} reads what a scale can be moved out of; leave this transform out")
    for group in groups:
        for name in (*group.readers, group.before.weight):
            if isinstance(model.weights[name], QuantizedWeight):
                raise ConfigError(f"{name} is quantized already, so it cannot be scaled; put this transform before those that round")


def awq(model: Model, settings: Awq, text: Text, run: Run) -> Model:
    """AWQ's scales, moved into the norms and linear layers before; nothing is rounded."""
    form = LinearFormat.parse(settings.weights)

    def choose(
        readers: Sequence[tuple[Tensor, Moments]], value: Moments, tie: Tensor | None, threads: int
    ) -> tuple[Tensor, dict[str, Any]]:
        pairs = [(weight, moments.square) for weight, moments in readers]
        scales, before, after = awq_scales(pairs, form, magnitudes=value.mean, tie=tie, steps=settings.steps, threads=threads)
        return scales, {"error_left": after / before if before else 1.0}

    return scale_blocks(model, "awq", settings, settings.layers, settings.skip, text, run, choose)


def smoothquant(model: Model, settings: SmoothQuant, text: Text, run: Run) -> Model:
    """SmoothQuant's scales, moved into the norms and linear layers before; nothing is rounded."""

    def choose(
        readers: Sequence[tuple[Tensor, Moments]], value: Moments, tie: Tensor | None, threads: int
    ) -> tuple[Tensor, dict[str, Any]]:
        scales = smooth_scales([weight for weight, _ in readers], value.largest, strength=settings.strength, tie=tie)
        typical = value.largest.mean()
        return scales, {"spread_before": float(value.largest.max() / typical) if typical else 1.0}

    return scale_blocks(model, "smoothquant", settings, settings.layers, settings.skip, text, run, choose)


def scale_blocks(
    model: Model, name: str, settings: msgspec.Struct, only: tuple[str, ...], skip: tuple[str, ...], text: Text, run: Run, choose: Chooser
) -> Model:  # fmt: skip
    """``model`` with scales moved wherever ``choose`` finds them to pay and something before can take them. Its function is the same.
    The third party's way to a transform of one function."""
    layers = Layers(only, skip)

    def treat(block: Block) -> Treated:
        groups = scale_groups(block.piece, layers)
        if not groups:
            return Treated({}, {}, block.weights)
        every = [site for group in groups for site in (*group.sites, Site(_WHOLE, group.x))]
        moments = block.text().moments(block.weights, every)
        weights, arrays, facts = dict(block.weights), dict[str, Array](), dict[str, Any]()
        for group in groups:
            readers = [
                pair
                for site in group.sites
                for pair in zip(weights[site.weight].reshape(-1, *weights[site.weight].shape[-2:]), moments[site], strict=True)
            ]
            scales, fact = choose(readers, moments[Site(_WHOLE, group.x)][0], tie_of(group), block.threads)
            changed, scales = fold(weights, group, scales, _dtype(model, group))
            weights.update(changed)
            arrays[f"{group.x}:scales"] = scales.numpy()
            facts[group.x] = fact
        kept = {each for group in groups if isinstance(group.before, NormBefore) for each in (group.before.weight, group.before.bias)}
        biases = {group.before.bias for group in groups}
        arrays |= {f"{each}:whole": weights[each].numpy() for each in sorted(filter(None, kept | biases))}
        return Treated(arrays, facts, block.weights)  # what the scaled weights give, but for rounding

    walked = walk(model, settings, text, run, treat)
    made: dict[str, Weight] = dict(model.weights)
    for file, piece in zip(walked.files, pieces(model.spec, text.longest)[1:], strict=True):
        for key in file.entries:
            if key.endswith(":whole"):
                made[key[:-6]] = _whole(file.read(key), model.weights[key[:-6]])
        for group in scale_groups(piece, layers):
            scales = file.read(f"{group.x}:scales")
            if not isinstance(group.before, NormBefore):
                rows = np.ones(made[group.before.weight].shape[-2], np.float32)
                rows[list(group.before.sources)] = scales
                made[group.before.weight] = _times(made[group.before.weight], 1 / rows[:, None])
            for reader in group.readers:
                made[reader] = _times(made[reader], scales)
    facts = list(walked.facts.values())
    evidence: dict[str, Any] = {
        "values": len(facts),
        "text": text.name,
        "windows": len(text.windows),
        "tokens": text.tokens,
        "sha256": text.sha256,
    }
    for key in facts[0]:
        evidence[f"mean_{key}"] = sum(fact[key] for fact in facts) / len(facts)
    return dataclasses.replace(
        model, weights=Weights(made), provenance=(*model.provenance, Provenance(name, msgspec.to_builtins(settings), evidence))
    )


def _dtype(model: Model, group: ScaleGroup) -> torch.dtype:
    """What the norm before is stored in."""
    return as_tensor(np.zeros(1, model.weights[group.before.weight].dtype)).dtype


def _whole(array: Array, before: Weight) -> Weight:
    made = array.astype(before.dtype).reshape(before.shape)
    return Weight(before.shape, before.dtype, lambda: made)


def _times(weight: Weight, factor: Array) -> Weight:
    """Lazily, in float32: what is rounded next must not have been rounded on the way."""
    return Weight(weight.shape, np.dtype(np.float32), functools.partial(_product, weight, factor))


def _product(weight: Weight, factor: Array) -> Array:
    made: Array = weight.load().astype(np.float32) * factor
    return made
