"""Functions of one number, as the Spec names them, in float32; and rounding of a row to int8 or fp8. Other kernels call them in registers.

Triton's own exp is good to two units in the last place; its division is exact only where it says so (``div_rn``)."""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

ACTIVATIONS: tuple[str, ...] = ("relu", "relu_squared", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
"""What ``activated`` knows: hasten.spec.Activation."""


@triton.jit
def sigmoid(x: tensor) -> tensor:
    """1 / (1 + exp(−x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x: tensor) -> tensor:
    """tanh, to a few units in the last place: near 0 its series, elsewhere (1 − e) / (1 + e) of e = exp(−2|x|)."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0)))))
    fallen = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - fallen) / (1.0 + fallen)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def softplus(x: tensor) -> tensor:
    """log(1 + exp(x)), to a few units in the last place also where it is small: with e = exp(−|x|), log(1 + e) = 2 artanh(e / (2 + e))."""
    fallen = tl.exp(-tl.abs(x))
    part = fallen / (2.0 + fallen)
    square = part * part
    series = 1.0 / 7.0 + square * (1.0 / 9.0 + square * (1.0 / 11.0 + square * (1.0 / 13.0)))
    series = 1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * series))
    return tl.where(x > 0, x, 0.0) + 2.0 * part * series


@triton.jit
def activated(x: tensor, KIND: constexpr) -> tensor:
    """hasten.spec.Activation ``KIND`` of float32; what is not a number stays so."""
    if KIND == "relu":
        return tl.where(x < 0, 0.0, x)
    elif KIND == "relu_squared":
        return tl.where(x < 0, 0.0, x * x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "silu":
        return x * sigmoid(x)
    elif KIND == "sigmoid":
        return sigmoid(x)
    else:
        tl.static_assert(KIND == "tanh")
        return tanh(x)


@triton.jit
def magnitude(x: tensor) -> tensor:
    """|x| of float32 as an integer of the same order, above all of them for what is not a number: a maximum keeps that."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def row_scale(most: tensor, KIND: constexpr) -> tensor:
    """The scale of a row of KIND from its largest magnitude: max|x| / 127 of int8, / 448 of fp8; 1 where that is zero."""
    scale = tl.div_rn(most.to(tl.float32, bitcast=True), 127.0 if tl.int8 == KIND else 448.0)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def rounded(x: tensor, scale: tensor, KIND: constexpr) -> tensor:
    """x / scale to KIND, half to even and within its range: int8, or fp8, where what is not a number stays so."""
    ratio = tl.div_rn(x, scale)
    if tl.int8 == KIND:
        steps = (ratio + 12582912.0) - 12582912.0  # 1.5 · 2²³ leaves a float32 no bits behind the point
        return tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8)
    else:
        return tl.where(ratio > 448.0, 448.0, tl.where(ratio < -448.0, -448.0, ratio)).to(KIND)
