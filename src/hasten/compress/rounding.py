"""Transforms that round: linear weights become stored codes and scales."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.blocks import Moments
from hasten.compress.data import Text
from hasten.compress.descend import descend
from hasten.compress.ends import forms_of_ends, left_alone, rounded_ends
from hasten.compress.gptq import Order, aimed, gptq
from hasten.compress.grid import Clip
from hasten.compress.rtn import round_to_nearest
from hasten.compress.sites import Layers, Site, by_value, sites_of
from hasten.compress.threads import in_order
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.linear import NUMBERS, ClusteredLinear, LinearFormat, QuantizedLinear, stacked
from hasten.formats.quantized import QuantizedWeight, is_pruned
from hasten.formats.safetensors import SafetensorsFile
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import lower

Activations = Literal["bf16", "int8", "fp8"]

Rounder = Callable[[Tensor, Moments | None, LinearFormat], QuantizedLinear]
"""Rounds one weight [out, in], float32, given the moments of what it reads where there is text."""


Refine = Callable[[Block, Mapping[str, QuantizedLinear]], tuple[dict[str, QuantizedLinear], dict[str, Any]]]
"""Makes something better of all that was rounded of a block, and says of it what is kept beside each weight's error."""


class Rounding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``activations`` are what the weights are to be multiplied with; ``layers`` and ``skip`` are globs over weight names within blocks.
    ``head`` and ``embedding`` are formats for these, which are left as they are without; norms and routers are always."""

    activations: Activations = "bf16"
    layers: tuple[str, ...] = ("blocks.*",)
    skip: tuple[str, ...] = ()
    head: str | None = None
    embedding: str | None = None


class Uniform(Rounding, frozen=True, kw_only=True):
    """All in one format: ``weights`` as in hasten.formats.linear."""

    weights: str = "int4-g64"

    @property
    def form(self) -> LinearFormat:
        """The format. Raises UnsupportedError for one nobody has."""
        return LinearFormat.parse(self.weights)


class Rtn(Uniform, frozen=True, kw_only=True):
    """Round-to-nearest; ``clip`` searches the range of each group for the least error of weights, or of outputs, which takes text."""

    clip: Clip = "none"


class Gptq(Uniform, frozen=True, kw_only=True):
    """GPTQ, then as many ``descend`` rounds of coordinate descent. Each layer sees what the rounded layers before it give, and is rounded
    for what it gives of that, or, with ``aim`` 'plain', for what it gave before anything was rounded (experts for the former always)."""

    damp: float = 0.01
    order: Order = "activation"
    static_groups: bool = True
    clip: Clip = "none"
    descend: int = 0
    aim: Literal["seen", "plain"] = "seen"


def check_rounding(model: Model, settings: Uniform) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    check_form(settings.form, settings.activations)
    check_layers(model, settings)
    same_form(model, settings)
    if isinstance(settings, Gptq):
        check_gptq(settings)


def check_form(form: LinearFormat, activations: str) -> None:
    """Raise ConfigError for a format that is not rounded to, or not multiplied with ``activations``."""
    if not NUMBERS[form.number][1] or form.sparse or form.has_codebook:
        other = "; codebook clusters to them" if form.has_codebook else ""
        raise ConfigError(
            f"weights {form} are not rounded to by a transform; accepted are int8, int4, int3, int2, fp8 and their variants{other}"
        )
    if activations not in form.activations:
        raise ConfigError(f"activations {activations} do not go with weights in {form}; accepted are {', '.join(form.activations)}")


def check_layers(model: Model, settings: Rounding) -> None:
    """Raise ConfigError where the globs of ``settings`` mean nothing of ``model``, or what is quantized already."""
    layers = Layers(settings.layers, settings.skip)
    program = lower(model.spec)
    layers.check(program)
    weights = {site.weight: model.weights[site.weight] for site in sites_of(program, layers)}
    done = [name for name, weight in weights.items() if isinstance(weight, QuantizedWeight) and not is_pruned(weight)]
    for name, form in forms_of_ends(model.spec, settings.embedding, settings.head).items():
        check_form(form, form.activations[0])
        done += [name] if isinstance(model.weights[name], QuantizedWeight) else []
    if done:
        raise ConfigError(f"{done[0]} is quantized already, and what rounding took cannot be had back; start from the original, or skip it")


def check_gptq(settings: Gptq) -> None:
    """Raise ConfigError for settings that do not go together."""
    form = settings.form
    if settings.order == "activation" and not settings.static_groups and form.group:
        raise ConfigError("activation order without static groups would spread a group over the inputs; turn one of them off")
    if not 0 < settings.damp < 1:
        raise ConfigError(f"damp is {settings.damp}; accepted is a share between 0 and 1, as 0.01")
    if not 0 <= settings.descend <= 100:
        raise ConfigError(f"descend is {settings.descend}; accepted are 0 to 100 rounds")
    if settings.descend and not form.is_integer:
        raise ConfigError(f"coordinate descent is for integers, not {form}; leave descend at 0")


def rtn(model: Model, settings: Rtn, text: Text | None, run: Run) -> Model:
    """Each weight to the nearest its grid has. ``text`` is used where ``clip`` is 'outputs'."""
    text = text if settings.clip == "outputs" else None
    return round_blocks(model, "rtn", settings, same_form(model, settings), text, run, rtn_rounder(settings.clip))


def gptq_transform(model: Model, settings: Gptq, text: Text, run: Run) -> Model:
    """GPTQ over all blocks, on ``text``."""
    forms = same_form(model, settings)
    return round_blocks(model, "gptq", settings, forms, text, run, gptq_rounder(settings), plain=settings.aim == "plain")


def same_form(model: Model, settings: Uniform) -> dict[str, LinearFormat]:
    """The format of ``settings`` for every weight that it means, sparse for those that were pruned. Raises UnsupportedError where it cannot
    be."""
    names = weights_in_blocks(model, Layers(settings.layers, settings.skip))
    return {name: settings.form.as_sparse() if is_pruned(model.weights[name]) else settings.form for name in names}


def weights_in_blocks(model: Model, layers: Layers) -> list[str]:
    """The names that ``layers`` mean."""
    return [site.weight for site in sites_of(lower(model.spec), layers) if site.weight in Layers()]


def rtn_rounder(clip: Clip) -> Rounder:
    """To nearest."""

    def one(weight: Tensor, moments: Moments | None, form: LinearFormat) -> QuantizedLinear:
        return round_to_nearest(weight, form, clip=clip, moments=None if moments is None else moments.square)

    return one


def gptq_rounder(settings: Gptq) -> Rounder:
    """GPTQ as ``settings`` say, whatever format they name."""

    def one(weight: Tensor, moments: Moments | None, form: LinearFormat) -> QuantizedLinear:
        if moments is None:
            raise ConfigError("gptq looks at activations, so it needs text to calibrate on")
        keep = weight != 0 if form.sparse else None
        if moments.cross is not None:
            weight = aimed(weight, moments.square, moments.cross, settings.damp)
        made = gptq(
            weight, moments.square, form, damp=settings.damp, order=settings.order, static_groups=settings.static_groups,
            clip=settings.clip, keep=keep,
        )  # fmt: skip
        if not settings.descend:
            return made
        return descend(weight, made, moments.square, form, damp=settings.damp, rounds=settings.descend, keep=keep)

    return one


def round_blocks(
    model: Model, name: str, settings: Rounding, forms: Mapping[str, LinearFormat], text: Text | None, run: Run, rounder: Rounder, *,
    plain: bool = False, refine: Refine | None = None, evidence: Mapping[str, Any] = MappingProxyType({}),
) -> Model:  # fmt: skip
    """``model`` with the weights that ``forms`` names rounded by ``rounder`` (see store_blocks), and its ends as ``settings`` ask;
    ``evidence`` is kept beside what is found here. The third party's way to a transform of one function."""
    stored, facts = store_blocks(
        model, name, settings, forms, text, run, rounder, activations=settings.activations, plain=plain, refine=refine
    )  # fmt: skip
    ends = rounded_ends(model, forms_of_ends(model.spec, settings.embedding, settings.head), settings.activations, run)
    made: dict[str, Weight] = {**model.weights, **stored, **ends}
    found = {**evidence_of(facts, text), "left": left_alone(lower(model.spec), model.weights, made), **evidence}
    return dataclasses.replace(
        model,
        weights=Weights(made),
        provenance=(*model.provenance, Provenance(name, msgspec.to_builtins(settings), found)),
    )


Facts = Mapping[str, Mapping[str, Any]]
"""By weight: what its storing cost."""


def store_blocks(
    model: Model, name: str, settings: msgspec.Struct, forms: Mapping[str, LinearFormat], text: Text | None, run: Run, rounder: Rounder, *,
    activations: str = "bf16", plain: bool = False, refine: Refine | None = None,
) -> tuple[dict[str, QuantizedWeight], Facts]:  # fmt: skip
    """The weights that ``forms`` names as ``rounder`` makes them, each in its format, block by block, those that read one value together,
    each fed what the ones made before it give; ``plain`` gives moments their ``cross``. ``refine`` then has all of a block's at once."""

    def treat(block: Block) -> Treated:
        weights, stored, facts = dict(block.weights), dict[str, QuantizedLinear](), dict[str, dict[str, Any]]()
        for _, sites in by_value([site for site in sites_of(block.piece, Layers()) if site.weight in forms]):
            beside = None if block.plain is None else (block.plain, block.weights)
            moments = {} if text is None else block.text().moments(weights, sites, beside)

            def one(site: Site, moments: Mapping[Site, Sequence[Moments]] = moments) -> tuple[QuantizedLinear, dict[str, Any]]:
                return round_site(weights[site.weight], moments.get(site), forms[site.weight], rounder)

            for site, (made, fact) in zip(sites, in_order(one, sites, block.threads)):
                stored[site.weight], facts[site.weight] = made, fact
                weights[site.weight] = torch.from_numpy(made.dense().reshape(tuple(weights[site.weight].shape)))
        if refine is not None and stored:
            stored, found = refine(block, stored)
            for weight, made in stored.items():
                facts[weight] |= found
                weights[weight] = torch.from_numpy(made.dense().reshape(tuple(weights[weight].shape)))
        arrays = {key: array for weight, made in stored.items() for key, array in _arrays(weight, made).items()}
        return Treated(arrays, facts, weights)

    walked = walk(model, _Asked(name, settings, {weight: str(form) for weight, form in forms.items()}), text, run, treat, plain=plain)
    made = {
        key[:-2]: _stored(file, key[:-2], model.weights[key[:-2]], forms[key[:-2]], activations)
        for file in walked.files
        for key in file.entries
        if key.endswith(":q")
    }
    return made, walked.facts


class _Asked(msgspec.Struct, frozen=True):
    """All that decides how a walk rounds."""

    name: str
    settings: Any
    forms: dict[str, str]


def round_site(
    weight: Tensor, moments: Sequence[Moments] | None, form: LinearFormat, rounder: Rounder
) -> tuple[QuantizedLinear, dict[str, Any]]:
    """One matrix, or the experts of one one after the other; and how much of what they give is error, by energy."""
    matrices = weight[None] if weight.dim() == 2 else weight
    seen: Sequence[Moments | None] = [None] * len(matrices) if moments is None else moments
    made = [rounder(matrix, each, form) for matrix, each in zip(matrices, seen, strict=True)]
    lost = whole = 0.0
    for matrix, each, result in zip(matrices, seen, made):
        square = None if each is None else each.square.float()  # for a share that is told, that is enough
        lost += _energy(matrix - torch.from_numpy(result.dense()), square)
        whole += _energy(matrix, square)
    joined = made[0] if weight.dim() == 2 else stacked(made)
    fact = {"error": lost / whole if whole else 0.0, "of": "weights" if moments is None else "outputs"}
    return joined, fact | ({"kept": int(np.count_nonzero(joined.q))} if form.sparse else {})


def _energy(rows: Tensor, square: Tensor | None) -> float:
    """Σ r·square·rᵀ over the rows r of [out, in]; without ``square`` [in, in], Σ r·rᵀ."""
    return float(((rows if square is None else rows @ square) * rows).sum(dtype=torch.float64))


def _arrays(name: str, made: QuantizedLinear) -> dict[str, Array]:
    """The stored numbers as a file keeps them; `_quantized` reads them back."""
    arrays: dict[str, Array] = {f"{name}:q": made.q if made.scales is not None else made.q.astype(ml_dtypes.bfloat16)}
    if made.scales is not None:
        arrays[f"{name}:scales"] = made.scales
    if made.zeros is not None:
        arrays[f"{name}:zeros"] = made.zeros
    if isinstance(made, ClusteredLinear):
        arrays[f"{name}:codebook"] = made.codebook
    return arrays


def _stored(file: SafetensorsFile, name: str, before: Weight, form: LinearFormat, activations: str) -> QuantizedWeight:
    return QuantizedWeight.of(before.shape, form, functools.partial(_quantized, file, name, before.shape, form), activations)


def _quantized(file: SafetensorsFile, name: str, shape: tuple[int, ...], form: LinearFormat) -> QuantizedLinear:
    q = file.read(f"{name}:q").reshape(shape)
    if f"{name}:scales" not in file.entries:
        return QuantizedLinear(q.astype(np.float32), None, None, 0)
    zeros = file.read(f"{name}:zeros") if f"{name}:zeros" in file.entries else None
    scales = file.read(f"{name}:scales")
    beside = (*shape[:-1], scales.shape[-1])
    if form.has_codebook:
        return ClusteredLinear(q, scales.reshape(beside), None, form.group or shape[-1], file.read(f"{name}:codebook"))
    return QuantizedLinear(q, scales.reshape(beside), None if zeros is None else zeros.reshape(beside), form.group or shape[-1])


def evidence_of(facts: Facts, text: Text | None) -> dict[str, Any]:
    """What provenance keeps of them."""
    errors = {name: fact["error"] for name, fact in facts.items()}
    worst = max(errors, key=errors.__getitem__)
    found: dict[str, Any] = {
        "layers": len(errors), "mean_error": sum(errors.values()) / len(errors), "worst_layer": worst, "worst_error": errors[worst],
        "error_of": facts[worst]["of"],
    }  # fmt: skip
    return (
        found if text is None else found | {"text": text.name, "windows": len(text.windows), "tokens": text.tokens, "sha256": text.sha256}
    )
