"""Blocks behind those that were cut, made to give what reached them before: each product that joins the residual stream is fitted to it."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.blocks import Played
from hasten.compress.data import Text
from hasten.compress.gptq import damped
from hasten.compress.walk import Block, Run, Treated, walk
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model
from hasten.program import Op, Program, ops


class Fitting(msgspec.Struct, frozen=True):
    """All that decides how a walk fits: the numbers of the blocks that are gone, and the damping."""

    gone: tuple[int, ...]
    damp: float


@dataclasses.dataclass(frozen=True, slots=True)
class Join:
    """A linear layer ``op`` whose outputs are added to ``stream``, which gives ``out``."""

    op: ops.Linear
    stream: str
    out: str


def made_good(model: Model, gone: Collection[int], damp: float, text: Text, run: Run) -> tuple[Model, dict[str, float]]:
    """``model`` in which what comes behind the blocks that are ``gone`` makes it good, as if these handed on what they are given; and which
    share of the error, by energy, that leaves behind each. A product is fitted by least squares to the stream of the whole model, given
    the stream that there is; where a norm or a mixture of experts stands between a product and the stream, it is left alone."""
    fitting = Fitting(tuple(sorted(gone)), damp)

    def treat(block: Block) -> Treated:
        weights, arrays, facts = dict(block.weights), dict[str, Array](), dict[str, Any]()
        if block.index in fitting.gone:
            return Treated({}, {}, {name: torch.zeros_like(each) if _writes(name) else each for name, each in weights.items()})
        if block.index > fitting.gone[0]:
            for join in joins(block.piece):
                name = join.op.weight
                made, facts[name] = _fitted(block, weights, join, fitting.damp)
                arrays[name], weights[name] = made.numpy(), made
        return Treated(arrays, facts, weights)

    walked = walk(model, fitting, text, run, treat, plain=True)
    made: dict[str, Weight] = dict(model.weights)
    for file in walked.files:
        for name, entry in file.entries.items():
            made[name] = Weight(entry.shape, entry.dtype, functools.partial(file.read, name))
    return dataclasses.replace(model, weights=Weights(made)), dict(walked.facts)


def joins(piece: Program) -> tuple[Join, ...]:
    """The linear layers of ``piece`` whose outputs are added to the stream as they are, in order."""
    makers: dict[str, Op] = {name: op for op in piece.ops for name in op.outputs}
    found = []
    for op in piece.ops:
        linear = makers.get(op.b) if isinstance(op, ops.Add) else None
        if isinstance(op, ops.Add) and isinstance(linear, ops.Linear) and sum(op.b in each.inputs for each in piece.ops) == 1:
            found.append(Join(linear, op.a, op.y))
    return tuple(found)


def _fitted(block: Block, weights: Mapping[str, Tensor], join: Join, damp: float) -> tuple[Tensor, float]:
    """The weight with which ``join.out`` comes nearest to what it is in the whole model, and which share of the error that leaves."""
    old = weights[join.op.weight].double()
    bias = 0.0 if join.op.bias is None else weights[join.op.bias]
    square = cross = None
    error = torch.zeros((), dtype=torch.float64)
    for mine, whole in zip(_values(block.text(), weights, [join.op.x, join.stream]), _values(block.plain, block.weights, [join.out])):
        x, missing = mine[join.op.x], whole[join.out] - mine[join.stream] - bias
        missing = missing - x @ weights[join.op.weight].T  # by the old weight
        error += missing.square().sum(dtype=torch.float64)
        square, cross = _plus(square, x.T @ x), _plus(cross, missing.T @ x)
    if square is None or cross is None or not bool(error > 0):
        return weights[join.op.weight], 1.0
    change = torch.linalg.solve(damped(square, damp), cross.T).T
    left = error - 2 * (change * cross).sum() + ((change @ square) * change).sum()
    return (old + change).float().contiguous(), float(left / error)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more.double() if total is None else total + more


def _values(played: Played | None, weights: Mapping[str, Tensor], names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Values chunk by chunk, those that come into the piece among them."""
    if played is None:
        raise ConfigError("this transform looks at activations, so it needs text to calibrate on")
    given = [name for name in names if name in played.live.rows]
    for (_, begin, end), values in zip(played.chunks, played.outputs(weights, [name for name in names if name not in given])):
        yield values | {name: torch.tensor(played.live.rows[name][begin:end]) for name in given}


def _writes(name: str) -> bool:
    """Whether a block's weight is of the last product of its mixer or feed-forward: without these it hands on what it is given."""
    return any(part in name for part in (".mixer.o.", ".down."))
