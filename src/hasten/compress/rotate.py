"""Rotation of what a model computes in, folded into its weights (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456): the function stays, and
no feature stands out, so that rounding activations and weights costs less.

Two rotations are folded: of the residual stream, and of each head's values between the value and the output projection. Rotations that a
step would have to compute (of queries and keys after their positions, before the down projection) are not made."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NoReturn

import msgspec
import numpy as np

from hasten.base.errors import ConfigError, UnsupportedError, UserError
from hasten.compress.data import Text
from hasten.compress.orthogonal import Rotation, rotation
from hasten.compress.walk import Run
from hasten.families import find_family
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model, Provenance, Source
from hasten.program import Op, Program, lower, ops
from hasten.spec import Head, Spec

PRODUCTS = (ops.Linear, ops.ExpertLinear)


class Rotate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``seed`` draws the signs; ``values`` says whether each head's values are rotated, too."""

    seed: int = 0
    values: bool = True


@dataclasses.dataclass(slots=True)
class Turns:
    """What a rotation of the residual stream touches: ``tables`` whose rows it is made of, ``readers`` (weight → the norm before, None
    for none), ``writers`` and their ``biases``, ``norms`` with their offsets; and of heads' values ``outputs`` and ``inputs`` of weights,
    with the size of a head."""

    tables: set[str] = dataclasses.field(default_factory=set)
    readers: dict[str, str | None] = dataclasses.field(default_factory=dict)
    writers: set[str] = dataclasses.field(default_factory=set)
    biases: set[str] = dataclasses.field(default_factory=set)
    norms: dict[str, float] = dataclasses.field(default_factory=dict)
    outputs: dict[str, int] = dataclasses.field(default_factory=dict)
    inputs: dict[str, int] = dataclasses.field(default_factory=dict)


def check_rotate(model: Model, settings: Rotate) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    program = lower(untied(model.spec))
    turns = turns_of(program)
    for name in (*turns.readers, *turns.writers):
        if isinstance(_sources(model, program)[name], QuantizedWeight):
            raise ConfigError(f"{name} is quantized already, so it cannot be rotated; put this transform before those that round")


def rotate(model: Model, settings: Rotate, text: Text | None, run: Run) -> Model:
    """``model`` with its residual stream and heads' values rotated, and the scales of its norms in what reads them. Nothing is rounded.

    A tied head has weights of its own afterwards: it reads the stream behind the last norm, whose scales the embedding must not have."""
    spec = untied(model.spec)
    program = lower(spec)
    turns = turns_of(program)
    if not settings.values:
        turns.outputs, turns.inputs = {}, {}
    whole = rotation(spec.width, settings.seed)
    heads = {size: rotation(size, settings.seed + 1) for size in {*turns.outputs.values(), *turns.inputs.values()}}
    sources, made = _sources(model, program), dict[str, Weight]()
    for name, weight in sources.items():
        steps: list[Callable[[Array], Array]] = []
        if (norm := turns.readers.get(name)) is not None:
            steps.append(functools.partial(_scaled, sources[norm], turns.norms[norm]))
        if name in turns.readers or name in turns.tables:
            steps.append(whole.apply)
        if name in turns.inputs:
            steps.append(heads[turns.inputs[name]].apply)
        if name in turns.writers or name in turns.biases:
            steps.append(_along(whole, biases=name in turns.biases))
        if name in turns.outputs:
            steps.append(_along(heads[turns.outputs[name]], biases=len(weight.shape) == 1))
        made[name] = Weight(weight.shape, np.dtype(np.float32), functools.partial(_through, weight, tuple(steps))) if steps else weight
        if name in turns.norms:
            made[name] = _full(weight, 1 - turns.norms[name])
    evidence = {
        "width": spec.width,
        "matrix": whole.kind,
        "weights": len(turns.readers.keys() | turns.writers),
        "norms": len(turns.norms),
        "heads": sorted(heads),
        "head_untied": spec != model.spec,
    }
    provenance = (*model.provenance, Provenance("rotate", msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(model, spec=spec, weights=Weights(made), provenance=provenance, source=_source(model, spec))


def untied(spec: Spec) -> Spec:
    """``spec`` with heads of their own."""

    def own(head: Head) -> Head:
        return msgspec.structs.replace(head, tied=False)

    exits = tuple(msgspec.structs.replace(early, head=own(early.head)) for early in spec.exits)
    return msgspec.structs.replace(spec, head=own(spec.head), exits=exits)


def turns_of(program: Program) -> Turns:
    """What a rotation of the residual stream of ``program`` touches. Raises UnsupportedError, with the reason, where it would change the
    function."""
    turns, stream, normed = Turns(), set[str](), dict[str, str | None]()
    for op in program.ops:
        match op:
            case ops.Embed() | ops.EmbedPositions():
                turns.tables.add(op.weight)
                stream.add(op.y)
            case ops.Add() if op.a in stream or op.b in stream:
                for branch in {op.a, op.b} - stream:
                    _write(program, branch, turns)
                stream.add(op.y)
            case ops.Cast() | ops.SelectRows() if op.x in stream:
                stream.add(op.y)
            case ops.Cast() | ops.SelectRows() if op.x in normed:
                normed[op.y] = normed[op.x]
            case ops.RmsNorm() if op.x in stream and op.group == program.values[op.x].features[-1]:
                turns.norms[op.weight] = op.offset
                normed[op.y] = op.weight
            case ops.Linear() | ops.ExpertLinear() if op.x in stream or op.x in normed:
                if op.weight in turns.readers:
                    raise UnsupportedError(f"{op.weight} reads the residual stream at two places, so no one rotation of it is right")
                turns.readers[op.weight] = normed.get(op.x)
            case _ if any(x in stream or x in normed for x in op.inputs):
                _refuse(op)
    _values(program, turns)
    return turns


def _write(program: Program, x: str, turns: Turns) -> None:
    """Back from what joins the residual stream to the products that make it."""
    if sum(x in op.inputs for op in program.ops) != 1:
        raise UnsupportedError(f"{x} is read by more than the residual stream, which cannot be rotated; leave rotate out")
    maker = next(op for op in program.ops if x in op.outputs)
    match maker:
        case ops.Linear() | ops.ExpertLinear():
            turns.writers.add(maker.weight)
            if maker.bias is not None:
                turns.biases.add(maker.bias)
        case ops.Combine() | ops.Cast():
            _write(program, maker.x, turns)
        case ops.Add():
            _write(program, maker.a, turns)
            _write(program, maker.b, turns)
        case ops.Gate() if program.values[maker.gate].features[-1] == 1:  # one number for the row
            _write(program, maker.up, turns)
        case _:
            _refuse(maker)


def _refuse(op: Op) -> NoReturn:
    name = op.outputs[0] if op.outputs else type(op).__name__
    match op:
        case ops.LayerNorm():
            reason = "a LayerNorm takes the mean of the features, which a rotation changes; only models of RMSNorm can be rotated"
        case ops.RmsNorm():
            reason = "a norm over what joins the residual stream scales features one by one, which cannot be moved through a rotation"
        case _:
            reason = f"{type(op).__name__} looks at features one by one"
    raise UnsupportedError(f"the residual stream cannot be rotated: {name}: {reason}; leave rotate out")


def _values(program: Program, turns: Turns) -> None:
    """Heads' values, where they go from one product through attention to another and nothing on the way looks at single features."""
    for attend in program.ops:
        if not isinstance(attend, ops.Attend):
            continue
        appended = [op for op in program.ops if isinstance(op, ops.AppendKv) and op.state == attend.state]
        others = [op for op in program.ops if attend.state in op.state_refs and op is not attend and not isinstance(op, ops.AppendKv)]
        if others or len(appended) != 1 or (v := appended[0].v) is None:
            continue
        before = next(op for op in program.ops if v in op.outputs)
        after = [op for op in program.ops if attend.y in op.inputs]
        if isinstance(before, ops.Linear) and len(after) == 1 and isinstance(after[0], ops.Linear) and _read_once(program, v):
            turns.outputs[before.weight] = attend.value_dim
            if before.bias is not None:
                turns.outputs[before.bias] = attend.value_dim
            turns.inputs[after[0].weight] = attend.value_dim


def _read_once(program: Program, x: str) -> bool:
    return sum(x in op.inputs for op in program.ops) == 1


def _sources(model: Model, program: Program) -> dict[str, Weight]:
    """The weights of ``program``: the model's own, and the embedding for heads that were tied to it."""
    return {name: model.weights[name if name in model.weights else "embedding.weight"] for name in program.params}


def _source(model: Model, spec: Spec) -> Source | None:
    """The config, saying that the head is not tied, where the family's words for that are the usual ones."""
    if model.source is None or spec == model.spec:
        return model.source
    config = {**model.source.config, "tie_word_embeddings": False}
    try:
        said = find_family(config.get("model_type")).spec(config) == spec
    except UserError:
        said = False
    return Source(model.source.family, config) if said else model.source


def _along(turn: Rotation, *, biases: bool) -> Callable[[Array], Array]:
    """The outputs of a product, or of its bias, turned."""
    return turn.apply if biases else turn.apply_to_outputs


def _through(weight: Weight, steps: tuple[Callable[[Array], Array], ...]) -> Array:
    array: Array = weight.load().astype(np.float32)
    for step in steps:
        array = step(array)
    return np.ascontiguousarray(array)


def _scaled(norm: Weight, offset: float, array: Array) -> Array:
    made: Array = array * (norm.load().astype(np.float32) + np.float32(offset))
    return made


def _full(weight: Weight, number: float) -> Weight:
    return Weight(weight.shape, weight.dtype, lambda: np.full(weight.shape, number, weight.dtype))
