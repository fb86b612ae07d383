"""Sharing: several layers with one set of matrices, each with norms of its own."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.data import Text
from hasten.compress.heal import in_dtype
from hasten.compress.walk import Run
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import lower
from hasten.spec import Block


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``every`` so many layers, one after the other, but for those in ``skip``, the matrices become one set: those of the ``first``,
    or the ``mean`` of all."""

    every: int = 2
    keep: Literal["first", "mean"] = "first"
    skip: tuple[int, ...] = ()

    def groups(self, blocks: Sequence[Block]) -> Iterator[list[int]]:
        """Numbers of layers that are to share, those that can: neighbours with the same parts."""
        group: list[int] = []
        for index in range(len(blocks) + 1):
            fits = index < len(blocks) and index not in self.skip and blocks[index].shares is None
            if group and (not fits or len(group) == self.every or _parts(blocks[group[0]]) != _parts(blocks[index])):
                if len(group) > 1:
                    yield group
                group = []
            if fits:
                group.append(index)


def check_share(model: Model, settings: Share) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    if not 2 <= settings.every <= len(model.spec.blocks):
        raise ConfigError(f"every is {settings.every}; accepted are 2 to {len(model.spec.blocks)} layers that share")
    if beyond := [index for index in settings.skip if not 0 <= index < len(model.spec.blocks)]:
        raise ConfigError(f"skip names layer {beyond[0]}; there are 0 to {len(model.spec.blocks) - 1}")
    if not list(settings.groups(model.spec.blocks)):
        raise ConfigError("no two layers side by side have the same parts, so none can share; skip fewer")
    for name, weight in model.weights.items():
        if isinstance(weight, QuantizedWeight):
            raise ConfigError(f"{name} is rounded or pruned already; put share before")


def share(model: Model, settings: Share, text: Text | None, run: Run) -> Model:
    """``model`` with a Spec in which layers share (Lan et al. 2019, arXiv:1909.11942). What it costs is for healing to learn back."""
    blocks, made = list(model.spec.blocks), dict(model.weights)
    groups = list(settings.groups(blocks))
    for first, *others in groups:
        matrices = [name for name in model.weights if name.startswith(f"blocks.{first}.") and len(model.weights[name].shape) > 1]
        for name in matrices:
            inner = name.removeprefix(f"blocks.{first}.")
            if settings.keep == "mean":
                made[name] = _mean([model.weights[f"blocks.{index}.{inner}"] for index in (first, *others)])
            for index in others:
                del made[f"blocks.{index}.{inner}"]
        for index in others:
            blocks[index] = msgspec.structs.replace(blocks[index], shares=first)
    spec = msgspec.structs.replace(model.spec, blocks=tuple(blocks))
    if made.keys() != lower(spec).params.keys():
        raise UnsupportedError(f"{model.name} has weights that layers cannot share yet; leave share out")
    evidence: dict[str, Any] = {"groups": groups, "bytes": sum(weight.nbytes for weight in made.values())}
    return dataclasses.replace(
        model,
        spec=spec,
        weights=Weights(made),
        provenance=(*model.provenance, Provenance("share", msgspec.to_builtins(settings), evidence)),
    )


def _parts(block: Block) -> object:
    return block.mixer, block.feed_forward, block.low_rank


def _mean(weights: Sequence[Weight]) -> Weight:
    total = np.zeros(weights[0].shape, np.float32)
    for weight in weights:
        total += weight.load().astype(np.float32)
    return in_dtype(total / np.float32(len(weights)), weights[0].dtype)
