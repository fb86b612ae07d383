"""Feed-forward units cut from every block, the others' weights making good what went."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.cut.described import described
from hasten.compress.cut.slices import check_damp, check_matrices, check_plain, check_share, kept_of, remade, taken, text_facts
from hasten.compress.cut.spare import spared
from hasten.compress.data import Text
from hasten.compress.sites import Layers, sites_of
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.weights import Array, Weight
from hasten.model import Model, Provenance
from hasten.spec import MLP, FeedForward, GatedMLP, MixtureOfExperts, Spec


class CutNeurons(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``share`` of the units of every feed-forward go, of experts as of others; ``skip`` are globs over their paths, as
    ``blocks.0.feed_forward``, which stay whole. Without ``compensate`` the weights that stay are as they were."""

    share: float = 0.25
    compensate: bool = True
    damp: float = 0.01
    skip: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Units:
    """One feed-forward to be cut, or experts that are cut alike: ``path`` is where its weights are, ``kept`` units of ``part`` stay."""

    path: str
    part: MLP | GatedMLP
    kept: int

    @property
    def down(self) -> str:
        """The weight that reads the units."""
        return f"{self.path}.down.weight"

    @property
    def rows(self) -> tuple[str, ...]:
        """The weights whose rows are the units, and their biases."""
        names = ("up",) if isinstance(self.part, MLP) else ("gate", "up")
        kinds = ("weight", "bias") if self.part.bias else ("weight",)
        return tuple(f"{self.path}.{name}.{kind}" for name in names for kind in kinds)


def check_cut_neurons(model: Model, settings: CutNeurons) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    check_share(settings.share)
    check_matrices(model.spec, low_rank=False)
    check_damp(settings.damp)
    cut = units_of(model.spec, settings)
    if not cut:
        raise ConfigError(f"{model.name} has no feed-forward that is not skipped, so no unit can be cut; leave this transform out")
    check_plain(model, [name for units in cut for name in (*units.rows, units.down)])


def units_of(spec: Spec, settings: CutNeurons) -> tuple[Units, ...]:
    """What ``settings`` mean of ``spec``, in order. Raises ConfigError where all or no units of one would go."""
    meant, found = Layers(("*",), settings.skip), []
    for index, block in enumerate(spec.blocks):
        for path, part in _parts(f"blocks.{index}.feed_forward", block.feed_forward).items():
            if path in meant:
                found.append(Units(path, part, kept_of(part.hidden, settings.share, f"units of {path}")))
    return tuple(found)


def cut_neurons(model: Model, settings: CutNeurons, text: Text, run: Run) -> Model:
    """``model`` with the least needed units of its feed-forwards away, found block by block on ``text``, each block fed what the cut ones
    before it give."""
    cut = {units.down: units for units in units_of(model.spec, settings)}

    def treat(block: Block) -> Treated:
        sites = [site for site in sites_of(block.piece, Layers(("*",))) if site.weight in cut]
        weights, arrays, facts = dict(block.weights), dict[str, Array](), dict[str, Any]()
        moments = block.text().moments(weights, sites) if sites else {}
        for site in sites:
            units, dense, experts = cut[site.weight], weights[site.weight], site.experts is not None
            whole = torch.zeros_like(dense)
            left = []
            for number, seen in enumerate(moments[site]):
                matrix, spare = (dense[number] if experts else dense), units.part.hidden - units.kept
                left.append(spared(matrix, seen.square, spare, damp=settings.damp, compensate=settings.compensate))
                (whole[number] if experts else whole)[:, left[-1].units] = left[-1].weight
            arrays[f"{units.path}:kept"] = _stacked([each.units for each in left], experts)
            arrays[site.weight] = _stacked([each.weight for each in left], experts)
            facts[units.path] = sum(each.error for each in left) / len(left)
            weights[site.weight] = whole
        return Treated(arrays, facts, weights)

    walked = walk(model, settings, text, run, treat)
    made = dict(model.weights)
    for file in walked.files:
        for units in (each for each in cut.values() if each.down in file.entries):
            index = np.array(file.read(f"{units.path}:kept"))
            for name in units.rows:
                made[name] = taken(made[name], index, 1 if index.ndim == 2 else 0)
            entry = file.entries[units.down]
            made[units.down] = Weight(entry.shape, entry.dtype, functools.partial(file.read, units.down))
    sizes = {units.path: units.kept for units in cut.values()}
    spec = _smaller(model.spec, sizes)
    evidence = {
        "units": [sum(units.part.hidden for units in cut.values()), sum(sizes.values())],
        "mean_error": sum(walked.facts.values()) / len(walked.facts),
        "worst": max(walked.facts, key=walked.facts.__getitem__),
        **text_facts(text),
    }
    result = remade(model, spec, made, Provenance("cut_neurons", msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(result, source=described(model.source, spec, _changes(spec)))


def _stacked(each: Sequence[Tensor], experts: bool) -> Array:
    return (torch.stack(list(each)) if experts else each[0]).numpy()


def _parts(path: str, part: FeedForward | None) -> dict[str, MLP | GatedMLP]:
    match part:
        case None:
            return {}
        case MixtureOfExperts():
            shared = {} if part.shared is None else {f"{path}.shared": part.shared}
            return {f"{path}.experts": part.expert, **shared}
        case _:
            return {path: part}


def _smaller(spec: Spec, sizes: Mapping[str, int]) -> Spec:
    """``spec`` whose feed-forwards at the paths in ``sizes`` have as many units as it says."""
    blocks = []
    for index, block in enumerate(spec.blocks):
        path, part = f"blocks.{index}.feed_forward", block.feed_forward
        new = {name: msgspec.structs.replace(each, hidden=sizes.get(name, each.hidden)) for name, each in _parts(path, part).items()}
        if isinstance(part, MixtureOfExperts):
            part = msgspec.structs.replace(part, expert=new[f"{path}.experts"], shared=new.get(f"{path}.shared"))
        elif part is not None:
            part = new[path]
        blocks.append(msgspec.structs.replace(block, feed_forward=part))
    return msgspec.structs.replace(spec, blocks=tuple(blocks))


def _changes(spec: Spec) -> dict[str, int]:
    """What a config may have to say otherwise: sizes of the first feed-forward of each kind."""
    found: dict[str, int] = {}
    for block in spec.blocks:
        match block.feed_forward:
            case MixtureOfExperts() as part:
                found.setdefault("expert_hidden", part.expert.hidden)
                if part.shared is not None:
                    found.setdefault("shared_hidden", part.shared.hidden)
            case MLP() | GatedMLP() as part:
                found.setdefault("hidden", part.hidden)
    return found
