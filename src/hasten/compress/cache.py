"""The cache of keys and values in a byte an element: chosen for a model, measured with it, and written with the scales other engines need.

Hasten's own cache finds a scale for every token and head as it stores them, which is closer and takes no calibration. The scales found
here, one for the keys and one for the values of a layer, are for engines that have no more."""

import dataclasses
from typing import Any, Literal

import msgspec
import numpy as np

from hasten.base.errors import ConfigError
from hasten.checkpoint.quantized.cache import one_scale
from hasten.compress.data import Text
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.cache import LEAST_SCALE, ROW_FORMATS, MeantCache, ScaledRows
from hasten.formats.weights import Array, Weight
from hasten.model import Model, Provenance
from hasten.program import Program, lower, ops


class Cache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How keys and values are kept: ``format`` fp8 or int8."""

    format: Literal["fp8", "int8"] = "fp8"


def check_cache(model: Model, settings: Cache) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    if not _appends(lower(model.spec)):
        raise ConfigError(f"{model.name} keeps no keys and values, so it has no cache to make smaller; leave cache out")


def cache_transform(model: Model, settings: Cache, text: Text, run: Run) -> Model:
    """``model``, to be played with its cache in that format, and the scales that cover the largest key and value of ``text`` in every
    layer. No weight changes."""
    rows = ROW_FORMATS[settings.format]
    if not isinstance(rows, ScaledRows):
        raise ConfigError(f"cache {settings.format} has no scales; accepted are fp8 and int8")
    limit = rows.largest

    def treat(block: Block) -> Treated:
        arrays, facts = dict[str, Array](), dict[str, dict[str, float]]()
        for append in _appends(block.piece):
            read = {"k": append.k, "v": append.v or append.k}  # a latent row is both
            largest = dict.fromkeys(read, 0.0)
            for chunk in block.text().outputs(block.weights, list(dict.fromkeys(read.values()))):
                for part, value in read.items():
                    largest[part] = max(largest[part], float(chunk[value].abs().max()))
            path = ".".join(append.k.split(".")[:3])  # a piece may be of several blocks
            facts[path] = largest
            arrays |= {f"{path}.{part}_scale": np.array([max(most / limit, LEAST_SCALE)], np.float32) for part, most in largest.items()}
        return Treated(arrays, facts, block.weights)

    walked = walk(model, settings, text, run, treat)
    scales: dict[str, Weight] = {key: one_scale(float(file.read(key)[0])) for file in walked.files for key in file.entries}
    evidence: dict[str, Any] = {
        "layers": len(walked.facts), "largest_key": max(fact["k"] for fact in walked.facts.values()),
        "largest_value": max(fact["v"] for fact in walked.facts.values()), "text": text.name, "windows": len(text.windows),
        "tokens": text.tokens, "sha256": text.sha256,
    }  # fmt: skip
    provenance = (*model.provenance, Provenance("cache", msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(model, cache=MeantCache(settings.format, scales), provenance=provenance)


def _appends(program: Program) -> tuple[ops.AppendKv, ...]:
    return tuple(op for op in program.ops if isinstance(op, ops.AppendKv))
