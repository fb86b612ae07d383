"""Whole blocks cut: those that change least what goes through them (block influence; Men et al. 2024, ShortGPT, arXiv:2403.03853)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.cut.behind import made_good
from hasten.compress.cut.described import described
from hasten.compress.cut.slices import check_cache, check_damp, check_matrices, check_plain, check_share, remade, text_facts
from hasten.compress.data import Text
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.model import Model, Provenance
from hasten.program import lower
from hasten.spec import Attention, GatedDeltaNet, Mixer, PostNorm, SlidingWindow, Spec
from hasten.train import linear_weights


class CutLayers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``count`` blocks go, or a ``share`` of them; a quarter where neither is given. Without ``compensate`` the others stay as they are."""

    count: int | None = None
    share: float | None = None
    compensate: bool = True
    damp: float = 0.01


def check_cut_layers(model: Model, settings: CutLayers) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    layers_to_go(model.spec, settings)
    check_damp(settings.damp)
    check_matrices(model.spec, low_rank=True)
    check_cache(model)
    if settings.compensate:
        check_plain(model, sorted(linear_weights(lower(model.spec))))
    if model.spec.exits:
        raise UnsupportedError("the model has early exits, each behind a block that might go; cut layers before exits are added")


def layers_to_go(spec: Spec, settings: CutLayers) -> int:
    """How many blocks go. Raises ConfigError for none, all, or two answers."""
    there = len(spec.blocks)
    if settings.count is not None and settings.share is not None:
        raise ConfigError(f"count is {settings.count} and share is {settings.share}; give one of them")
    share = 0.25 if settings.share is None else settings.share
    check_share(share)
    count = round(share * there) if settings.count is None else settings.count
    if not 0 < count < there:
        said = f"a share of {share}" if settings.count is None else f"a count of {count}"
        raise ConfigError(f"{said} of {there} blocks takes {count}; at least 1 goes and 1 stays")
    return count


def cut_layers(model: Model, settings: CutLayers, text: Text, run: Run) -> Model:
    """``model`` without its least influential blocks. One goes at a time, and what is left is measured again."""
    left, influence = list(range(len(model.spec.blocks))), dict[str, float]()
    for number in range(layers_to_go(model.spec, settings)):
        found = influences(without_layers(model, left), settings, text, run.part(str(number)))
        least = min(range(len(left)), key=found.__getitem__)
        influence[f"blocks.{left.pop(least)}"] = found[least]
    gone = sorted({*range(len(model.spec.blocks))} - {*left})
    evidence: dict[str, Any] = {"layers": gone, "of": len(model.spec.blocks), "influence": influence, **text_facts(text)}
    kept = model
    if settings.compensate and not any(isinstance(block.wiring, PostNorm) for block in model.spec.blocks):
        kept, evidence["error_left"] = made_good(model, gone, settings.damp, text, run.part("fit"))
    made = without_layers(kept, left)
    made = remade(made, made.spec, dict(made.weights), Provenance("cut_layers", msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(made, source=described(model.source, made.spec, _changes(made.spec)))


def influences(model: Model, settings: CutLayers, text: Text, run: Run) -> list[float]:
    """Of each block, 1 − the mean over ``text`` of the cosine between what goes in and what comes out."""

    def treat(block: Block) -> Treated:
        played, total, rows = block.text(), 0.0, 0
        (before,), (after,) = block.piece.inputs, block.piece.outputs
        for (_, begin, end), values in zip(played.chunks, played.outputs(block.weights, [after])):
            given = torch.tensor(played.live.rows[before][begin:end])
            total += float(torch.nn.functional.cosine_similarity(given, values[after], dim=-1).sum(dtype=torch.float64))
            rows += end - begin
        return Treated({}, {str(block.index): 1 - total / rows}, block.weights)

    facts = walk(model, settings, text, run, treat).facts
    return [facts[str(index)] for index in range(len(model.spec.blocks))]


def without_layers(model: Model, left: Sequence[int]) -> Model:
    """``model`` with those of its blocks only that ``left`` names, in that order."""
    place = {f"blocks.{old}": f"blocks.{new}" for new, old in enumerate(left)}
    weights = {}
    for name, weight in model.weights.items():
        block = ".".join(name.split(".")[:2])
        if not name.startswith("blocks."):
            weights[name] = weight
        elif block in place:
            weights[place[block] + name.removeprefix(block)] = weight
    spec = msgspec.structs.replace(model.spec, blocks=tuple(model.spec.blocks[index] for index in left))
    return remade(model, spec, weights)


def _changes(spec: Spec) -> dict[str, Any]:
    """What a config may have to say otherwise: how many layers, and, where they differ, of what kind each is."""
    kinds = [_kind(block.mixer) for block in spec.blocks]
    return {"layers": len(kinds), "layer_types": kinds}


def _kind(mixer: Mixer | None) -> str:
    match mixer:
        case GatedDeltaNet():
            return "linear_attention"
        case Attention(visible=SlidingWindow()):
            return "sliding_attention"
        case _:
            return "full_attention"
