"""Quantization-aware training: what rounding took is learned back by codes and scales that stay in their format."""

import dataclasses
import functools
from typing import Literal

import msgspec

from hasten.base.errors import ConfigError
from hasten.compress.heal import Heal, check_heal_settings, learned_into, teach
from hasten.compress.walk import Run
from hasten.formats.linear import QuantizedLinear
from hasten.formats.quantized import QuantizedWeight, StaticWeight
from hasten.formats.weights import Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import Program
from hasten.train import Grid, Plain, Rounded

ROUNDING = frozenset({"rtn", "gptq", "mixed", "block_qat", "codebook", "static", "cache", "measured"})
"""Entries of a history after which a weight is still what the original's was, but rounded."""


class Qat(Heal, frozen=True, kw_only=True):
    """Training of what was rounded before, towards the original: scales and all that is not rounded learn; ``codes`` learn too, with the
    gradient straight through, or are kept (as the second phase of EfficientQAT does, Chen et al. 2024, arXiv:2407.11062)."""

    codes: Literal["learned", "kept"] = "learned"


def check_qat(model: Model, settings: Qat) -> None:
    """Raise UserError for settings that teach nothing."""
    check_heal_settings(model, settings, "qat")


def qat(model: Model, settings: Qat, original: Model, run: Run) -> Model:
    """``model``, whose rounded weights keep their formats, after learning from ``original``. Killed, it goes on where it was. Raises
    ConfigError where nothing is rounded to integers."""
    rounded = {name: weight for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight) and _learns(weight)}
    if not rounded:
        raise ConfigError("qat finds no weights in integers; put it behind a transform that rounds, as gptq")

    since = {entry.transform for entry in model.provenance[len(original.provenance) :]}
    near_original = since <= ROUNDING  # else its weights are others than those that were rounded

    def parameters(program: Program) -> Rounded:
        grids = {}
        for name, weight in rounded.items():
            near = original.weights[name] if near_original and name in original.weights else weight
            grids[name] = Grid.of(name, weight.quantized(), weight.form, near.load() if settings.codes == "learned" else None)
        plain = Plain.of(program, {name: array for name, array in model.weights.arrays(program.params) if name not in grids})
        return Rounded(plain, grids)

    learned, trained, evidence = teach(model, settings, original, run, parameters, "learning what is rounded")
    made: dict[str, Weight] = dict(learned_into(model.weights, {k: v for k, v in trained.weights.items() if k not in rounded}))
    changed = total = 0
    for name, weight in rounded.items():
        after = learned.grids[name].made()
        changed, total = changed + int((after.q != weight.quantized().q).sum()), total + weight.size
        made[name] = QuantizedWeight.of(weight.shape, weight.form, functools.partial(_same, after), weight.activations, weight.bits)
    found = {**evidence, "codes_changed": changed / total}
    provenance = (*model.provenance, Provenance("qat", msgspec.to_builtins(settings), found))
    return dataclasses.replace(model, weights=Weights(made), provenance=provenance)


def _learns(weight: Weight) -> bool:
    """Whether it has codes and scales of integers; of sparse ones the zeros would not stay, and places in a codebook are no steps."""
    if not isinstance(weight, QuantizedWeight) or isinstance(weight, StaticWeight):
        return False
    return weight.form.is_integer and not weight.form.sparse and not weight.form.has_codebook


def _same(made: QuantizedLinear) -> QuantizedLinear:
    return made
