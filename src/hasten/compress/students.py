"""Students: models cut from a teacher by depth, and whether one can learn from another at all."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.families import find_family
from hasten.formats.weights import Weights
from hasten.model import Model, Provenance, Source
from hasten.spec import Block, CrossLayerAttention, Spec

Pairs = tuple[tuple[int, int], ...]
"""Which block of a student is compared with which of its teacher, from 0."""

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers."""


def spread_layers(blocks: int, depth: int) -> tuple[int, ...]:
    """``depth`` of so many blocks, evenly spread, the first and the last among them. Raises ConfigError where there are not as many."""
    if not 1 <= depth <= blocks:
        raise ConfigError(f"depth is {depth}; accepted are 1 to {blocks}, the blocks there are")
    return tuple(round(place * (blocks - 1) / max(1, depth - 1)) for place in range(depth))


def cut_depth(model: Model, layers: Sequence[int]) -> Model:
    """Blocks ``layers`` of ``model``, from 0, in rising order, with their weights, and the ends; an early exit goes with its block, and
    goes away where that comes last.

    Raises ConfigError for blocks that are not there or not in order."""
    blocks, kept = len(model.spec.blocks), tuple(layers)
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < blocks:
        raise ConfigError(f"layers {one_line(list(kept))} are no rising list of the blocks of {model.name}, which are 0 to {blocks - 1}")
    places = {old: new for new, old in enumerate(kept)}
    owners = _owners(model.spec, kept)
    exits = [number for number, early in enumerate(model.spec.exits) if early.after in places and early.after != kept[-1]]
    moved = {f"blocks.{old}.": f"blocks.{new}." for old, new in places.items()}
    moved |= {f"exits.{old}.": f"exits.{new}." for new, old in enumerate(exits)}
    weights = {}
    for name, weight in model.weights.items():
        kind, _, rest = name.partition(".")
        if kind not in {"blocks", "exits"}:
            weights[name] = weight
        elif (head := f"{kind}.{rest.partition('.')[0]}.") in moved:
            weights[moved[head] + name.removeprefix(head)] = weight
        elif kind == "blocks" and (heir := owners.get(int(rest.partition(".")[0]))) is not None and len(weight.shape) > 1:
            weights[f"blocks.{places[heir]}." + name.removeprefix(head)] = weight
    spec = structs.replace(
        model.spec,
        blocks=tuple(_shared(model.spec.blocks[old], old, owners, places) for old in kept),
        exits=tuple(structs.replace(model.spec.exits[old], after=places[model.spec.exits[old].after]) for old in exits),
    )
    made = Provenance("cut-depth", {"layers": list(kept)}, {"of": model.name, "blocks": blocks, "bytes": model.weights.nbytes})
    return dataclasses.replace(
        model, spec=spec, weights=Weights(weights), source=_source(model.source, spec, kept), cache=None,
        provenance=(*model.provenance, made),
    )  # fmt: skip


def _owners(spec: Spec, kept: Sequence[int]) -> dict[int, int]:
    """By block whose matrices others share: the first of them that was kept, itself among them, which has the matrices now."""
    made: dict[int, int] = {}
    for place in kept:
        shares = spec.blocks[place].shares
        made.setdefault(place if shares is None else shares, place)
    return made


def _shared(block: Block, old: int, owners: Mapping[int, int], places: Mapping[int, int]) -> Block:
    """``block``, number ``old``, sharing with whoever has its matrices now, and reading the keys and values it read. Raises ConfigError
    where those went."""
    if isinstance(block.mixer, CrossLayerAttention):
        if block.mixer.source not in places:
            raise ConfigError(f"block {old} reads the keys and values of block {block.mixer.source}; keep both, or neither")
        block = structs.replace(block, mixer=structs.replace(block.mixer, source=places[block.mixer.source]))
    if block.shares is None:
        return block
    owner = owners[block.shares]
    return structs.replace(block, shares=None if owner == old else places[owner])


def pairs_of(student: int, teacher: int, cut: Sequence[int] | None = None) -> Pairs:
    """The block of the teacher that each of ``student`` blocks answers to: as deep, in proportion (Jiao et al. 2019, arXiv:1909.10351). One
    that was ``cut`` from it answers for all blocks up to the next that was kept."""
    if cut is not None:
        return tuple(enumerate([*(following - 1 for following in cut[1:]), teacher - 1]))
    return tuple((place, max(0, round((place + 1) * teacher / student) - 1)) for place in range(student))


def check_pairs(pairs: Pairs, student: int, teacher: int) -> None:
    """Raise ConfigError for pairs of blocks that one of both does not have."""
    for own, other in pairs:
        if not (0 <= own < student and 0 <= other < teacher):
            raise ConfigError(
                f"{own}:{other} pairs a block that is not there; the student has 0 to {student - 1}, the teacher 0 to {teacher - 1}"
            )


def check_together(student: Model, teacher: Model) -> None:
    """Raise UserError where the two do not speak of the same tokens: distributions over other vocabularies cannot be compared."""
    ours, theirs = student.text_tokenizer(), teacher.text_tokenizer()
    if ours.vocabulary != theirs.vocabulary or ours.start_id != theirs.start_id:
        raise UserError(
            f"{student.name} and {teacher.name} have different tokenizers, so one cannot learn from the other; take a student with the "
            "teacher's tokenizer, as one that is cut from it or made of a Spec has"
        )
    if student.spec.vocab != teacher.spec.vocab:
        raise UserError(
            f"{student.name} has a vocabulary of {student.spec.vocab} and {teacher.name} one of {teacher.spec.vocab}; as many are needed"
        )


def weights_digest(model: Model) -> str:
    """sha256 over the Spec and what every weight stands for, in hexadecimal: which model it was, whatever its name."""
    digest = hashlib.sha256(model.spec.to_json())
    for name, array in model.weights.arrays():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _source(source: Source | None, spec: Spec, kept: Sequence[int]) -> Source | None:
    """The config of a model of which these layers were kept; as it was where its family cannot say that: it knows which token ends."""
    if source is None:
        return None
    config: dict[str, Any] = dict(source.config)
    config |= {name: len(kept) for name in _COUNTS if name in config}
    if isinstance(kinds := config.get("layer_types"), list) and len(kinds) > kept[-1]:
        config["layer_types"] = [kinds[place] for place in kept]
    return Source(source.family, config) if _describes(config, spec) else source


def _describes(config: Mapping[str, Any], spec: Spec) -> bool:
    try:
        return find_family(config.get("model_type")).spec(config) == spec
    except UserError:
        return False
