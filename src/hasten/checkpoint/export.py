"""A model as other tools load it: what only hasten stores is written by what it means."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from msgspec import structs

from hasten.base.errors import UnsupportedError
from hasten.checkpoint.quantized.writing import can_say, packed_zero_points
from hasten.checkpoint.save import OWN, unread_elsewhere
from hasten.formats.quantized import QuantizedWeight, is_pruned, stored_as
from hasten.formats.weights import DTYPES, Weight, Weights
from hasten.model import Model, Provenance
from hasten.spec import Spec


def exported(model: Model) -> Model:
    """``model`` as transformers with compressed-tensors loads it, giving the same logits, but for the rounding of activations that go with
    a format it does not say: layers that share matrices have copies, a product of two factors is one matrix, and formats that
    compressed-tensors cannot say are plain numbers (bfloat16 where weights were pruned and not rounded, else float32). All else stays as it
    is stored.

    Raises UnsupportedError where no family describes the model even so."""
    spec, weights = _unshared(model.spec, model.weights)
    spec, weights = _multiplied(spec, weights)
    plain = {name: _plain(weight) if _unsaid(name, weight) else weight for name, weight in weights.items()}
    for tried in (plain, {name: _plain(weight) for name, weight in plain.items()}):
        done = dataclasses.replace(model, spec=spec, weights=Weights(tried))
        if not (why := unread_elsewhere(done)):
            changed = {name: weight for name, weight in tried.items() if weight is not model.weights.get(name)}
            before = sorted({stored_as(model.weights[name]) for name in changed if name in model.weights})
            evidence = {"weights": len(changed), "stored": before, "bytes": [model.weights.nbytes, done.weights.nbytes]}
            return dataclasses.replace(done, provenance=(*model.provenance, Provenance("export", {}, evidence)))
    raise UnsupportedError(f"{model.name} cannot be exported: {why.removesuffix(OWN)}")


def _unsaid(name: str, weight: Weight) -> bool:
    """Whether there is no way to store it that transformers loads."""
    if not isinstance(weight, QuantizedWeight):
        return False
    return name == "embedding.weight" or not can_say(name, weight) or packed_zero_points(weight)


def _plain(weight: Weight) -> Weight:
    if not isinstance(weight, QuantizedWeight):
        return weight
    dtype = DTYPES["bfloat16" if is_pruned(weight) else "float32"]
    return Weight(weight.shape, dtype, lambda: weight.load().astype(dtype))


def _unshared(spec: Spec, weights: Mapping[str, Weight]) -> tuple[Spec, dict[str, Weight]]:
    """With matrices of its own, the same, for each block."""
    found = dict(weights)
    for number, block in enumerate(spec.blocks):
        if block.shares is not None:
            owner = f"blocks.{block.shares}."
            inner = {name.removeprefix(owner): weight for name, weight in weights.items() if name.startswith(owner)}
            found |= {name: weight for part, weight in inner.items() if (name := f"blocks.{number}.{part}") not in found}
    return structs.replace(spec, blocks=tuple(structs.replace(block, shares=None) for block in spec.blocks)), found


def _multiplied(spec: Spec, weights: Mapping[str, Weight]) -> tuple[Spec, dict[str, Weight]]:
    """With one matrix, float32, for each two factors."""
    found = dict(weights)
    for number, block in enumerate(spec.blocks):
        for factored in block.low_rank:
            stem = f"blocks.{number}.{factored.layer}"
            found[f"{stem}.weight"] = _product(found.pop(f"{stem}.b.weight"), found.pop(f"{stem}.a.weight"))
    return structs.replace(spec, blocks=tuple(structs.replace(block, low_rank=()) for block in spec.blocks)), found


def _product(b: Weight, a: Weight) -> Weight:
    dtype = DTYPES["float32"]
    return Weight((b.shape[0], a.shape[1]), dtype, lambda: np.asarray(b.load().astype(dtype) @ a.load().astype(dtype)))
