"""Attention heads cut: query heads, or key/value heads with all that read them; the others' values make good what went."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.blocks import Moments
from hasten.compress.budget import least_cost
from hasten.compress.cut.described import described
from hasten.compress.cut.slices import check_cache, check_damp, check_matrices, check_plain, check_share, remade, taken, text_facts
from hasten.compress.cut.spare import Spared, inputs_of, spared
from hasten.compress.data import Text, text_of
from hasten.compress.sensitivity import divergences
from hasten.compress.sites import Layers, sites_of
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.weights import Array, Weight
from hasten.model import Model, Provenance
from hasten.spec import Alibi, Attention, LatentAttention, Spec

EVEN = 0.05
"""By how much the share that every block loses may be another than was asked for, before blocks lose differently."""


class CutHeads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``share`` of the heads go: of ``query`` heads as many from each group (where each has keys of its own, these too), or of ``kv``
    heads with the query heads that read them. Every block loses as many, or, where that cannot be near the share, each what costs least,
    measured on ``measure`` windows. ``skip`` are globs over paths, as ``blocks.0.mixer``, that stay whole."""

    share: float = 0.25
    kind: Literal["query", "kv"] = "query"
    compensate: bool = True
    damp: float = 0.01
    measure: int = 32
    skip: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """One mixer to be cut: ``units`` can go singly of each of ``teams``, and one unit's columns of the output projection are ``size``;
    ``whole`` says that a unit is a key/value head with the query heads that read it."""

    path: str
    mixer: Attention | LatentAttention
    units: int
    teams: int
    size: int
    whole: bool

    @property
    def out(self) -> str:
        """The weight that reads all heads."""
        return f"{self.path}.o.weight"

    def spared(self, weight: Tensor, moments: Moments, spare: int, settings: CutHeads) -> Spared:
        """The output projection without ``spare`` units of each team."""
        teams = [team for team in range(self.teams) for _ in range(self.units)]
        return spared(
            weight, moments.square, spare, damp=settings.damp, compensate=settings.compensate, size=self.size, teams=teams
        )  # fmt: skip

    def smaller(self, stay: Sequence[int]) -> Attention | LatentAttention:
        """The mixer with those units alone that ``stay``."""
        if isinstance(self.mixer, LatentAttention):
            return msgspec.structs.replace(self.mixer, heads=len(stay))
        heads, position = self._query(stay), self.mixer.position
        kv_heads = len(stay) if self.whole else self.mixer.kv_heads
        if isinstance(position, Alibi):
            position = Alibi(slopes=tuple(position.slopes[head] for head in heads))
        return msgspec.structs.replace(self.mixer, heads=len(heads), kv_heads=kv_heads, position=position)

    def rows(self, stay: Sequence[int]) -> dict[str, Sequence[int]]:
        """The rows that are left of each weight but the output projection's."""
        mixer, query = self.mixer, self._query(stay)
        if isinstance(mixer, LatentAttention):
            return {f"{self.path}.q.weight": _each(query, mixer.nope_dim + mixer.rope_dim)} | {
                f"{self.path}.{name}.weight": query for name in ("k_up", "v_up")
            }
        sizes = {"q": (query, mixer.head_dim)} | ({"gate": (query, mixer.value_dim)} if mixer.gate else {})
        if self.whole:
            sizes |= {"k": (stay, mixer.head_dim), "v": (stay, mixer.value_dim)}
        kinds = ("weight", "bias") if mixer.bias else ("weight",)
        found = {f"{self.path}.{name}.{kind}": _each(heads, size) for name, (heads, size) in sizes.items() for kind in kinds}
        of_heads = ("sinks", "content_bias", "position_bias")
        return found | {f"{self.path}.{name}": query for name in of_heads} | {f"{self.path}.position.weight": _each(query, mixer.head_dim)}

    def _query(self, stay: Sequence[int]) -> Sequence[int]:
        """The query heads of units."""
        if not self.whole or not isinstance(self.mixer, Attention):
            return stay
        return _each(stay, self.mixer.heads // self.mixer.kv_heads)


def check_cut_heads(model: Model, settings: CutHeads) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    check_share(settings.share)
    check_matrices(model.spec, low_rank=False)
    check_cache(model)
    check_damp(settings.damp)
    if settings.measure < 1:
        raise ConfigError(f"measure is {settings.measure}; at least 1 window is needed")
    cut = heads_of(model.spec, settings)
    if not cut:
        raise ConfigError(f"{model.name} has no mixer that is not skipped, so no head can be cut; leave this transform out")
    to_go(cut, settings)
    names = [name for heads in cut for name in (*heads.rows(range(heads.units * heads.teams)), heads.out) if name in model.weights]
    check_plain(model, names)


def heads_of(spec: Spec, settings: CutHeads) -> tuple[Heads, ...]:
    """What ``settings`` mean of ``spec``, in order. Raises UnsupportedError for a mixer that is not cut here."""
    meant, found = Layers(("*",), settings.skip), []
    for index, block in enumerate(spec.blocks):
        path, mixer = f"blocks.{index}.mixer", block.mixer
        if mixer is None or path not in meant:
            continue
        match mixer:
            case Attention() if mixer.norm_span == "row" and (mixer.q_norm is not None or mixer.k_norm is not None):
                raise UnsupportedError(f"{path} normalizes all heads together, so none can go without changing the others; skip it")
            case Attention() if settings.kind == "kv" or mixer.heads == mixer.kv_heads:
                found.append(Heads(path, mixer, mixer.kv_heads, 1, mixer.heads // mixer.kv_heads * mixer.value_dim, True))
            case Attention():
                found.append(Heads(path, mixer, mixer.heads // mixer.kv_heads, mixer.kv_heads, mixer.value_dim, False))
            case LatentAttention() if settings.kind == "query":
                found.append(Heads(path, mixer, mixer.heads, 1, mixer.value_dim, False))
            case _:
                raise UnsupportedError(f"{path} is {type(mixer).__name__}, which has no {settings.kind} heads to cut; skip it")
    return tuple(found)


def to_go(cut: Sequence[Heads], settings: CutHeads) -> int | None:
    """How many units of each team go of every block; None where no number is near the share in all of them. Raises ConfigError where all
    or no heads would go."""
    numbers = {round(settings.share * heads.units) for heads in cut}
    if len(numbers) == 1 and all(abs(number / heads.units - settings.share) <= EVEN for number in numbers for heads in cut):
        (number,) = numbers
        if 0 < number < min(heads.units for heads in cut):
            return number
    total, most = _total(cut, settings), sum(heads.teams * (heads.units - 1) for heads in cut)
    if not 0 < total <= most:
        there = sum(heads.teams * heads.units for heads in cut)
        raise ConfigError(f"a share of {settings.share} is {total} of {there} heads, and 1 to {most} of these can go; name another")
    return None


def cut_heads(model: Model, settings: CutHeads, text: Text, run: Run) -> Model:
    """``model`` with its least needed heads away, found block by block on ``text``, each block fed what the cut ones before it give."""
    found = {heads.out: heads for heads in heads_of(model.spec, settings)}
    number, costs = to_go(list(found.values()), settings), dict[str, Any]()
    if number is None:
        spare, costs = _cheapest(model, found, settings, text, run)
    else:
        spare = dict.fromkeys(found, number)

    def treat(block: Block) -> Treated:
        sites = [site for site in sites_of(block.piece, Layers(("*",))) if spare.get(site.weight)]
        weights, arrays, facts = dict(block.weights), dict[str, Array](), dict[str, Any]()
        moments = block.text().moments(weights, sites) if sites else {}
        for site in sites:
            heads = found[site.weight]
            made = heads.spared(weights[site.weight], moments[site][0], spare[site.weight], settings)
            arrays[f"{heads.path}:stay"], arrays[heads.out] = made.units.numpy(), made.weight.numpy()
            facts[heads.path] = made.error
            weights[heads.out] = _whole(weights[heads.out], made, heads.size)
        return Treated(arrays, facts, weights)

    walked = walk(model, settings, text, run.part("cut"), treat)
    made, stay = dict(model.weights), dict[str, Sequence[int]]()
    for file in walked.files:
        for heads in (each for each in found.values() if each.out in file.entries):
            stay[heads.path] = np.array(file.read(f"{heads.path}:stay")).tolist()
            for name, rows in heads.rows(stay[heads.path]).items():
                if name in made:
                    made[name] = taken(made[name], np.array(rows), 0)
            entry = file.entries[heads.out]
            made[heads.out] = Weight(entry.shape, entry.dtype, functools.partial(file.read, heads.out))
    smaller = {heads.path: heads.smaller(stay[heads.path]) for heads in found.values() if heads.path in stay}
    spec = _with_mixers(model.spec, smaller)
    evidence = {
        "heads": [_count(model.spec, "heads"), _count(spec, "heads")],
        "kv_heads": [_count(model.spec, "kv_heads"), _count(spec, "kv_heads")],
        "left": stay,
        "mean_error": sum(walked.facts.values()) / len(walked.facts),
        "worst": max(walked.facts, key=walked.facts.__getitem__),
        **costs,
        **text_facts(text),
    }
    result = remade(model, spec, made, Provenance("cut_heads", msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(result, source=described(model.source, spec, _changes(spec)))


def _cheapest(model: Model, found: Mapping[str, Heads], settings: CutHeads, text: Text, run: Run) -> tuple[dict[str, int], dict[str, Any]]:
    """How many units of each team go of each block, all in all the share that was asked for, where the divergence that is expected is
    least; and what that is."""

    def errors(name: str, weight: Tensor, moments: Sequence[Moments]) -> list[Tensor]:
        made = (found[name].spared(weight, moments[0], spare, settings) for spare in range(1, found[name].units))
        return [_whole(weight, each, found[name].size) - weight for each in made]

    measured = text_of(text.name, text.windows[: settings.measure])
    names = [name for name, heads in found.items() if heads.units > 1]
    costs = divergences(model, settings, names, errors, measured, run.part("sensitivity"))
    options = [[0.0, *costs[name]] for name in names]
    left = [[found[name].teams * (found[name].units - spare) for spare in range(found[name].units)] for name in names]
    budget = sum(max(each) for each in left) - _total(list(found.values()), settings)
    chosen = least_cost(options, left, budget)
    expected = sum(each[spare] for each, spare in zip(options, chosen))
    return dict(zip(names, chosen)), {"expected_kl": expected}


def _total(cut: Sequence[Heads], settings: CutHeads) -> int:
    """How many units go of all blocks together."""
    return round(settings.share * sum(heads.teams * heads.units for heads in cut))


def _whole(weight: Tensor, made: Spared, size: int) -> Tensor:
    """``weight`` with nothing in the columns that went."""
    whole = torch.zeros_like(weight)
    whole[:, inputs_of(made.units, size)] = made.weight
    return whole


def _each(units: Sequence[int], size: int) -> list[int]:
    return [unit * size + index for unit in units for index in range(size)]


def _with_mixers(spec: Spec, mixers: Mapping[str, Attention | LatentAttention]) -> Spec:
    blocks = (
        msgspec.structs.replace(block, mixer=mixers.get(f"blocks.{index}.mixer", block.mixer)) for index, block in enumerate(spec.blocks)
    )
    return msgspec.structs.replace(spec, blocks=tuple(blocks))


def _count(spec: Spec, field: str) -> int:
    return sum(getattr(block.mixer, field, 0) for block in spec.blocks)


def _changes(spec: Spec) -> dict[str, int]:
    """What a config may have to say otherwise: the heads of the first attention."""
    for block in spec.blocks:
        match block.mixer:
            case Attention() as mixer:
                return {"heads": mixer.heads, "kv_heads": mixer.kv_heads, "head_dim": mixer.head_dim}
            case LatentAttention() as mixer:
                return {"heads": mixer.heads, "kv_heads": mixer.heads}
    return {}
