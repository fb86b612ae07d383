"""The ends of a model, its embedding and head: rounded on purpose or left on purpose; and what else was left, with the reason."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hasten.base.errors import ConfigError
from hasten.compress.grid import Clip
from hasten.compress.rtn import round_to_nearest
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.safetensors import SafetensorsFile, layout_of, write
from hasten.formats.weights import Array, Weight
from hasten.model import Model
from hasten.program import ops
from hasten.program.program import Program
from hasten.spec import Spec

EMBEDDING, HEAD = "embedding.weight", "head.weight"
ROWS = 4096  # rounded together


def forms_of_ends(spec: Spec, embedding: str | None, head: str | None) -> dict[str, LinearFormat]:
    """Formats by weight. A head that shares the embedding's weight is rounded with it, so one format is given for both.

    Raises ConfigError for two that differ, UnsupportedError for a format nobody has."""
    if not spec.head.tied:
        asked = {EMBEDDING: embedding, HEAD: head}
    else:
        if embedding is not None and embedding != head:
            raise ConfigError(f"the head is the embedding's weight too, so 'embedding: {embedding}' is said by 'head: {embedding}'")
        asked = {EMBEDDING: head}
    return {name: LinearFormat.parse(form) for name, form in asked.items() if form is not None}


def rounded_ends(model: Model, forms: Mapping[str, LinearFormat], activations: str, run: Run) -> dict[str, QuantizedWeight]:
    """These weights rounded to nearest, below 8 bits each group on the range that leaves the least squared error. Their codes lie in
    ``run.work``, whence they are mapped."""
    made = {}
    for name, form in forms.items():
        file = run.work / f"{name}.safetensors"
        if not file.is_file():
            run.report(f"rounding {name}", 0, 1)
            parts = _rounded(model.weights[name].load(), form)
            partial = file.with_suffix(".partial")
            write(partial, layout_of(parts), parts.__getitem__, {})
            partial.rename(file)
        shape, fed = model.weights[name].shape, activations if activations in form.activations else "bf16"
        made[name] = QuantizedWeight.of(shape, form, functools.partial(_read, SafetensorsFile.open(file), form, shape[-1]), fed)
    return made


def left_alone(program: Program, before: Mapping[str, Weight], after: Mapping[str, Weight]) -> dict[str, dict[str, Any]]:
    """What was not rounded, by why: how many weights, and their bytes."""
    routers: set[str] = {op.logits for op in program.ops if isinstance(op, ops.Route)}
    linear: dict[str, bool] = {op.weight: op.y in routers for op in program.ops if isinstance(op, ops.Linear | ops.ExpertLinear)}
    found: dict[str, dict[str, Any]] = {}
    for name, weight in before.items():
        if isinstance(after[name], QuantizedWeight):
            continue
        if name in {EMBEDDING, HEAD}:
            tied = name == EMBEDDING and HEAD not in before
            why = f"{'embedding, which is the head too' if tied else name.removesuffix('.weight')}: no format was asked for"
        elif name in linear:
            why = "router: which experts are chosen hangs on small differences" if linear[name] else "linear layer that was skipped"
        elif len(weight.shape) == 1:
            why = "norm or bias: a vector, few bytes that act on every token"
        else:
            why = "read by no linear layer, so no format is played"
        entry = found.setdefault(why, {"weights": 0, "bytes": 0})
        entry["weights"] += 1
        entry["bytes"] += weight.nbytes
    return found


def _rounded(weight: Array, form: LinearFormat) -> dict[str, Array]:
    clip: Clip = "none" if form.bits >= 8 else "weights"
    parts = [
        round_to_nearest(torch.from_numpy(weight[begin : begin + ROWS].astype(np.float32)), form, clip=clip)
        for begin in range(0, len(weight), ROWS)
    ]
    found = {"q": np.concatenate([part.q for part in parts])}
    for key, each in (("scales", [part.scales for part in parts]), ("zeros", [part.zeros for part in parts])):
        if kept := [one for one in each if one is not None]:
            found[key] = np.concatenate(kept)
    return found


def _read(file: SafetensorsFile, form: LinearFormat, width: int) -> QuantizedLinear:
    zeros = file.read("zeros") if "zeros" in file.entries else None
    return QuantizedLinear(file.read("q"), file.read("scales"), zeros, form.group or width)
