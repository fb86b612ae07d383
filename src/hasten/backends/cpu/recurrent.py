"""Ops with recurrent state on a tape. How a state lies within its page is the kernels' business; a page has the Program's bytes of it."""

import math
from collections.abc import Callable

import numpy as np

from hasten import _native
from hasten.formats.weights import Array
from hasten.program import RecurrentGroup, ops

RecurrentOp = ops.CausalConv | ops.SelectiveScan | ops.DualScan | ops.GatedDeltaScan | ops.LinearScan


def emit_recurrent(
    tape: _native.Tape, op: RecurrentOp, at: dict[str, int], number: int, state: RecurrentGroup, weight: Callable[[str], Array]
) -> None:
    """Add ``op`` to the tape, whose state group ``number`` is ``state``. ``at`` has the places of values, ``weight`` loads one by name."""

    def array(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return np.ascontiguousarray(weight(name), np.float32)

    def floats(name: str | None) -> list[float]:
        numbers: list[float] = [] if name is None else array(name).tolist()
        return numbers

    slot = op.state.slot
    match op:
        case ops.CausalConv():
            kept, channels = state.shape
            tape.causal_conv(number, slot, at[op.x], at[op.y], channels, kept + 1, array(op.weight), floats(op.bias), op.activation)
        case ops.SelectiveScan():
            channels, states = state.shape
            tape.selective_scan(
                number, slot, at[op.x], at[op.dt], at[op.b], at[op.c], at[op.y], channels, states, array(op.a_log), floats(op.d),
                floats(op.dt_bias),
            )  # fmt: skip
        case ops.DualScan():
            heads, head_dim, states = state.shape
            most = math.inf if op.dt_max is None else op.dt_max
            tape.dual_scan(
                number, slot, at[op.x], at[op.dt], at[op.b], at[op.c], at[op.y], heads, op.groups, head_dim, states, floats(op.a_log),
                floats(op.d), floats(op.dt_bias), op.dt_min, most,
            )  # fmt: skip
        case ops.GatedDeltaScan():
            heads, key_dim, value_dim = state.shape
            tape.gated_delta_scan(
                number, slot, at[op.q], at[op.k], at[op.v], at[op.a], at[op.b], at[op.y], op.key_heads, heads, key_dim, value_dim,
                floats(op.a_log), floats(op.dt_bias),
            )  # fmt: skip
        case ops.LinearScan():
            tape.linear_scan(
                number, slot, at[op.q], at[op.k], at[op.v], at[op.y], op.heads, op.kv_heads, op.head_dim, op.value_dim, ops.FEATURE_FLOOR
            )
