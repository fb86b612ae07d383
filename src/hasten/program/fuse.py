"""Fusion: passes Program → Program that join ops, so that memory is passed over less often and threads wait for each other less often.

A fused op carries the ops it joined, prints them and is played by playing them, so no pass changes any result. What is named as an
output of the Program, or read outside, stays an output of the fused op; the rest is no value of the fused Program, so tap before fusing.
A fused op belongs to the layer where its first part stood, and a layer with no op left is dropped: cut before fusing, too."""

import dataclasses
from collections.abc import Sequence
from itertools import groupby

from hasten.program import ops
from hasten.program.fused import Fused, Products, RowChain
from hasten.program.ops import Op
from hasten.program.program import Layer, Program

ROW_WISE: tuple[type[Op], ...] = (
    ops.Embed, ops.EmbedPositions, ops.SelectRows, ops.Split, ops.Concat, ops.HeadSplit, ops.Cast, ops.QuantizeRows, ops.QuantizeFp8,
    ops.QuantizeFixed, ops.Route, ops.Combine, ops.RmsNorm, ops.LayerNorm, ops.Add, ops.Scale, ops.Clip, ops.SoftCap, ops.Activate,
    ops.Gate, ops.Rotate, ops.AppendKv,
)  # fmt: skip
"""Ops of which row r of the outputs needs no other row of the inputs. (SelectRows picks among rows that no R op makes.)"""


def fuse(program: Program, row_wise: Sequence[type[Op]] = ROW_WISE) -> Program:
    """Products that share an input joined, then chains of row-wise ops; ``row_wise`` are the ops that the backend can play in a chain."""
    return join_row_chains(join_products(program), row_wise)


def join_products(program: Program) -> Program:
    """Linear layers of one layer that read the same rows become one Products, in the place of the first: q, k and v; gate and up."""
    groups: dict[tuple[int, str, str | None], list[ops.Linear]] = {}
    for number, layer in enumerate(program.layers):
        for op in program.ops[layer.start : layer.stop]:
            if isinstance(op, ops.Linear):
                groups.setdefault((number, op.x, op.scale), []).append(op)
    joined = {same[0]: Products(parts=tuple(same)) for same in groups.values() if len(same) > 1}
    gone = {op for same in groups.values() for op in same[1:]}
    layers = [
        (
            layer.label,
            [joined.get(op, op) if isinstance(op, ops.Linear) else op for op in program.ops[layer.start : layer.stop] if op not in gone],
        )
        for layer in program.layers
    ]
    return _with_layers(program, layers)


def join_row_chains(program: Program, row_wise: Sequence[type[Op]] = ROW_WISE) -> Program:
    """Row-wise ops that follow one another over the same rows become one RowChain, also across layers.

    So: residual add + norm + rounding; gated activation + rounding; norms and rotations of q and k + append to the cache; embedding +
    norm + rounding; rows asked for + norm + rounding."""
    labels = [layer.label for layer in program.layers for _ in range(layer.start, layer.stop)]
    chainable = tuple(row_wise)
    kinds = [_rows(program, op) if isinstance(op, chainable) else index for index, op in enumerate(program.ops)]
    layers: list[tuple[str, list[Op]]] = [(layer.label, []) for layer in program.layers]
    by_label = dict(layers)
    readers: dict[str, list[int]] = {}
    for index, op in enumerate(program.ops):
        for name in op.inputs:
            readers.setdefault(name, []).append(index)
    for _, run in groupby(range(len(program.ops)), kinds.__getitem__):
        indices = list(run)
        first, last = indices[0], indices[-1]
        parts = program.ops[first : last + 1]
        hidden = [
            name
            for part in parts
            for name in part.outputs
            if name not in program.outputs and readers.get(name) and all(first <= reader <= last for reader in readers[name])
        ]
        inner = tuple((name, program.values[name]) for name in hidden)
        by_label[labels[first]].append(parts[0] if len(parts) == 1 else RowChain(parts=parts, inner=inner))
    return _with_layers(program, layers)


def unfuse(program: Program) -> Program:
    """The parts of every fused op one by one, as a Program that has none."""
    values = dict(program.values)
    for op in program.ops:
        if isinstance(op, Fused):
            values.update(op.inner)
    layers = [(layer.label, [part for op in program.ops[layer.start : layer.stop] for part in parts_of(op)]) for layer in program.layers]
    return _with_layers(dataclasses.replace(program, values=values), layers)


def parts_of(op: Op) -> tuple[Op, ...]:
    """The ops that ``op`` is made of: itself unless it is fused."""
    return op.parts if isinstance(op, Fused) else (op,)


def _rows(program: Program, op: Op) -> str:
    """The symbol of the rows that ``op`` goes over: those it makes, or reads where it makes none."""
    return program.values[(*op.outputs, *op.inputs)[0]].rows


def _with_layers(program: Program, layers: Sequence[tuple[str, Sequence[Op]]]) -> Program:
    """``program`` with the ops of these layers, without those that have none and without the values that no op names."""
    kept: list[Layer] = []
    flat: list[Op] = []
    for label, its_ops in layers:
        if its_ops:
            kept.append(Layer(label, len(flat), len(flat) + len(its_ops)))
            flat.extend(its_ops)
    named = {name for op in flat for name in (*op.inputs, *op.outputs)} | {*program.inputs}
    values = {name: value for name, value in program.values.items() if name in named}
    return dataclasses.replace(program, ops=tuple(flat), layers=tuple(kept), values=values)
