"""Launches of ops with recurrent state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hasten.backends.cuda.kernels.dual_scan import dual_numbers, dual_scan
from hasten.backends.cuda.kernels.linear_scan import linear_numbers, linear_scan
from hasten.backends.cuda.kernels.scans import causal_conv, gated_delta_scan, selective_scan
from hasten.backends.cuda.kernels.states import Sequences
from hasten.backends.cuda.places import DTYPES
from hasten.program import Program, RecurrentGroup, ops

RecurrentOp = ops.CausalConv | ops.SelectiveScan | ops.DualScan | ops.GatedDeltaScan | ops.LinearScan
RECURRENT = (ops.CausalConv, ops.SelectiveScan, ops.DualScan, ops.GatedDeltaScan, ops.LinearScan)


def kept_here(program: Program, group: RecurrentGroup) -> RecurrentGroup:
    """``group`` as its pages are here: in float32, for what is carried over all tokens keeps its bits, and of a recurrence in chunks the
    rows of one beside the state."""
    op = next((op for op in program.ops if isinstance(op, RECURRENT) and op.state.group == group.name), None)
    shape = group.shape
    match op:
        case ops.DualScan():
            (heads, width, states), row_bytes = shape, DTYPES[program.values[op.x].dtype].itemsize
            shape = (dual_numbers(heads, width, op.groups, states, row_bytes),)
        case ops.LinearScan():
            row_bytes = DTYPES[program.values[op.k].dtype].itemsize
            shape = (linear_numbers(op.kv_heads, op.head_dim, op.value_dim, row_bytes),)
    return dataclasses.replace(group, shape=shape, format="float32")


def recurrent_launch(
    op: RecurrentOp, at: Mapping[str, Tensor], state: Tensor, sequences: Sequences, weight: Callable[[str], Tensor],
    empty: Callable[[tuple[int, ...], torch.dtype], Tensor],
) -> Callable[[], None]:  # fmt: skip
    """The launch of ``op``, whose layer's pages are ``state``. ``at`` has its values, ``weight`` brings one over in float32, ``empty``
    makes room on the device."""
    match op:
        case ops.CausalConv():
            bias = None if op.bias is None else weight(op.bias)
            return functools.partial(
                causal_conv, at[op.x], weight(op.weight), at[op.y], state, sequences, bias=bias, activation=op.activation
            )  # fmt: skip
        case ops.SelectiveScan():
            return functools.partial(
                selective_scan, at[op.x], at[op.dt], at[op.b], at[op.c], weight(op.a_log), weight(op.d), weight(op.dt_bias), at[op.y],
                state, sequences,
            )  # fmt: skip
        case ops.DualScan():
            return functools.partial(
                dual_scan, at[op.x], at[op.dt], at[op.b], at[op.c], weight(op.a_log), weight(op.d), weight(op.dt_bias), at[op.y], state,
                sequences, heads=op.heads, groups=op.groups, dt_min=op.dt_min, dt_max=op.dt_max,
            )  # fmt: skip
        case ops.GatedDeltaScan():
            return functools.partial(
                gated_delta_scan, at[op.q], at[op.k], at[op.v], at[op.a], at[op.b], weight(op.a_log), weight(op.dt_bias), at[op.y], state,
                sequences, key_heads=op.key_heads, value_heads=op.value_heads,
            )  # fmt: skip
        case ops.LinearScan():
            y = at[op.y]
            totals = empty((y.shape[0], op.heads), torch.float32)
            return functools.partial(
                linear_scan, at[op.q], at[op.k], at[op.v], y, totals, state, sequences, heads=op.heads, kv_heads=op.kv_heads
            )
