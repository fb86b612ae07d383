"""Bits by layer: each weight in the one of several formats that serves the whole model best within a budget of bytes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.checkpoint.quantized.writing import stored_bytes
from hasten.compress.blocks import Moments
from hasten.compress.budget import least_cost
from hasten.compress.data import Text, text_of
from hasten.compress.grid import Clip
from hasten.compress.rounding import (
    Gptq,
    Rounding,
    check_form,
    check_gptq,
    check_layers,
    gptq_rounder,
    round_blocks,
    round_site,
    rtn_rounder,
    weights_in_blocks,
)  # fmt: skip
from hasten.compress.sensitivity import divergences
from hasten.compress.sites import Layers, sites_of
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import is_pruned
from hasten.model import Model
from hasten.program import lower

CHOSEN = "chosen.json"


class Mixed(Rounding, frozen=True, kw_only=True):
    """``bits`` a weight over all that are rounded, as stored: scales and zero points counted. Each weight takes the one of ``choices`` that
    costs the output least, as measured on the first ``measure`` windows of the text, and then is rounded by ``method``, whose settings the
    others are (see Rtn and Gptq). With ``unit`` 'input' all that read one value take the same, which engines need that join q, k and v."""

    bits: float
    choices: tuple[str, ...] = ("int2", "int3", "int4", "int8")
    method: Literal["rtn", "gptq"] = "gptq"
    measure: int = 64
    unit: Literal["weight", "input"] = "weight"
    clip: Clip = "outputs"
    damp: float = 0.01
    descend: int = 0

    @property
    def forms(self) -> tuple[LinearFormat, ...]:
        """The formats to choose from. Raises UnsupportedError for one nobody has."""
        return tuple(dict.fromkeys(LinearFormat.parse(name) for name in self.choices))


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What a choice depends on but its cost: of each weight the numbers it has, and the bytes it takes in each format."""

    sizes: Mapping[str, int]
    bytes: Mapping[str, Sequence[int]]

    def bits(self, stored: Sequence[int]) -> float:
        """Of a number, where all weights take ``stored`` bytes."""
        return 8 * sum(stored) / sum(self.sizes.values())


def check_mixed(model: Model, settings: Mixed) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    if not settings.choices:
        raise ConfigError("mixed has no choices; name formats, as [int3, int4]")
    for form in settings.forms:
        check_form(form, settings.activations)
        if settings.method == "gptq":
            check_gptq(_gptq(settings, form))
    if settings.method == "rtn" and settings.descend:
        raise ConfigError("descend goes with method gptq, not rtn; leave it at 0")
    if settings.measure < 1:
        raise ConfigError(f"measure is {settings.measure}; at least 1 window is needed")
    check_layers(model, settings)
    refuse_pruned(model, settings)
    shape = shape_of(model, settings)
    least, most = (shape.bits([pick(each) for each in shape.bytes.values()]) for pick in (min, max))
    if not least <= settings.bits <= most:
        raise ConfigError(f"bits is {settings.bits}; with {', '.join(settings.choices)}, {least:.3f} to {most:.3f} a weight can be met")


def mixed(model: Model, settings: Mixed, text: Text, run: Run) -> Model:
    """Measured, chosen and rounded on ``text``."""
    refuse_pruned(model, settings)
    shape, forms = shape_of(model, settings), settings.forms
    rounder = rtn_rounder(settings.clip) if settings.method == "rtn" else gptq_rounder(_gptq(settings, forms[0]))

    def errors(name: str, weight: Tensor, moments: Sequence[Moments]) -> list[Tensor]:
        made = (round_site(weight, moments, form, rounder)[0] for form in forms)
        return [torch.from_numpy(each.dense()).reshape(weight.shape) - weight for each in made]

    measured = text_of(text.name, text.windows[: settings.measure])
    costs = divergences(model, settings, shape.sizes, errors, measured, run.part("sensitivity"))
    units = [(name,) for name in shape.sizes] if settings.unit == "weight" else _by_input(model, shape)
    evidence = _choice(costs, shape, units, settings, run)
    chosen = {name: LinearFormat.parse(each["weights"]) for name, each in evidence["chosen"].items()}
    return round_blocks(model, "mixed", settings, chosen, text, run.part("rounding"), rounder, evidence=evidence)


def refuse_pruned(model: Model, settings: Mixed) -> None:
    """Raise ConfigError for weights whose zeros this would fill."""
    for name in weights_in_blocks(model, Layers(settings.layers, settings.skip)):
        if is_pruned(model.weights[name]):
            raise ConfigError(f"{name} was pruned, and bits are chosen by layer for dense weights only; round it by rtn or gptq")


def shape_of(model: Model, settings: Mixed) -> Shape:
    """Of the weights that ``settings`` means."""
    shapes = {name: model.weights[name].shape for name in weights_in_blocks(model, Layers(settings.layers, settings.skip))}
    sizes = {name: model.weights[name].size for name in shapes}
    return Shape(
        sizes, {name: [stored_bytes(each, form, settings.activations) for form in settings.forms] for name, each in shapes.items()}
    )


def _by_input(model: Model, shape: Shape) -> list[tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for site in sites_of(lower(model.spec), Layers()):
        if site.weight in shape.sizes:
            found.setdefault(site.x, []).append(site.weight)
    return [tuple(names) for names in found.values()]


def _choice(
    costs: Mapping[str, Sequence[float]], shape: Shape, units: Sequence[Sequence[str]], settings: Mixed, run: Run
) -> dict[str, Any]:
    """By weight its format and what that costs; and what is to be expected of all. Made once for a run, and then read."""
    file = run.work / CHOSEN
    if file.is_file():
        read: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return read
    names, forms = list(shape.sizes), settings.forms
    budget = int(settings.bits * sum(shape.sizes.values()) / 8 + 1e-6)
    joint = [[sum(each) for each in zip(*(costs[name] for name in unit))] for unit in units]
    sizes = [[sum(each) for each in zip(*(shape.bytes[name] for name in unit))] for unit in units]
    picked = {name: index for unit, index in zip(units, least_cost(joint, sizes, budget)) for name in unit}
    evidence: dict[str, Any] = {
        "bits": shape.bits([shape.bytes[name][picked[name]] for name in names]),
        "expected_kl": sum(costs[name][picked[name]] for name in names),
        "expected_kl_uniform": {str(form): sum(costs[name][index] for name in names) for index, form in enumerate(forms)},
        "chosen": {
            name: {"weights": str(forms[index]), "bytes": shape.bytes[name][index], "kl": costs[name][index]}
            for name, index in picked.items()
        },
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(evidence), "utf-8")
    partial.rename(file)
    return evidence


def _gptq(settings: Mixed, form: LinearFormat) -> Gptq:
    return Gptq(weights=str(form), activations=settings.activations, clip=settings.clip, damp=settings.damp, descend=settings.descend)
