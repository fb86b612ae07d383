"""What a draw reckons with, to the bit as ``native/src/philox.hpp`` and ``native/src/sampling*`` have it: noise, logarithm, mass, rank.

Everything is integers, or float64 additions, multiplications and divisions in a written order, which IEEE 754 rounds one way wherever they
run. Kernels that call these are launched with ``enable_fp_fusion=False``: a product that is not rounded before its sum has other bits."""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

MASS_BITS = constexpr(42)  # the likeliest id of a row has mass 2⁴²
LOWER_HALF = constexpr(1 << 31)  # set in a counter whose words are the lower halves of ids' noise
LOG2_E, LN2_HIGH, LN2_LOW = (
    constexpr(float.fromhex(each)) for each in ("0x1.71547652b82fep0", "0x1.62e42fee00000p-1", "0x1.a39ef35793c76p-33")
)
ROOT_TWO = constexpr(float.fromhex("0x1.6a09e667f3bcdp0"))
LARGEST = constexpr(float.fromhex("0x1.fffffffffffffp1023"))
TWO_52, SHIFT_52 = constexpr(2.0**52), constexpr(1.5 * 2.0**52)  # a sum with either leaves the nearest integer in its low bits


@triton.jit
def noise_words(seed: tensor, position: tensor, choice: tensor, purpose: tensor, counter: tensor) -> tensor:
    """uint32 [4 · N]: words 4 · n … 4 · n + 3 are Philox4x32-10 (Salmon et al., SC 2011) of counter (``counter`` uint32 [N], position,
    choice, purpose) under the seed as key; all but ``counter`` int64.

    The upper half of id i's noise is word i % 4 of counter ⌊i / 4⌋, the lower half that of ⌊i / 4⌋ | LOWER_HALF."""
    others = counter ^ counter
    a, b, c, d = tl.philox(
        seed, counter, others + position.to(tl.uint32), others + choice.to(tl.uint32), others + purpose.to(tl.uint32)
    )  # fmt: skip
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def uniform(upper: tensor, lower: tensor) -> tensor:
    """Uniform float64 from the halves of noise, (⌊noise / 2¹²⌋ + ½) · 2⁻⁵²: never 0 or 1."""
    word = (upper.to(tl.int64) << 20) | (lower >> 12).to(tl.int64)
    return (word.to(tl.float64) + 0.5) * 2.0**-52


@triton.jit
def natural_log(x: tensor) -> tensor:
    """ln x of normal float64 above 0, within two units in the last place; ``natural_log`` of sampling.cpp."""
    bits = x.to(tl.int64, bitcast=True)
    n = (bits >> 52) - 1023
    m = ((bits & ((1 << 52) - 1)) | (1023 << 52)).to(tl.float64, bitcast=True)
    large = m > ROOT_TWO
    m = tl.where(large, m * 0.5, m)
    exponent = tl.where(large, n + 1, n).to(tl.float64)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = square * (1.0 / 25.0) + 1.0 / 23.0
    for odd in tl.static_range(21, 1, -2):
        series = series * square + 1.0 / odd
    return exponent * LN2_HIGH + (exponent * LN2_LOW + (2.0 * s + 2.0 * s * (square * series)))


@triton.jit
def gumbel(upper: tensor, lower: tensor) -> tensor:
    """−ln(−ln(1 − u)) of the uniform u of those halves: what an id's log-weight is raised by."""
    return -natural_log(-natural_log(1.0 - uniform(upper, lower)))


@triton.jit
def exp_bound(t: tensor) -> tensor:
    """At least eᵗ of float64, and at most 1.07 of it where t ≤ 0 (above that any number above 1)."""
    y = t * LOG2_E + 1e-6
    inside = tl.minimum(tl.maximum(y, -1000.0), 0.0)
    bound = ((1023.0 + inside) * TWO_52).to(tl.int64).to(tl.float64, bitcast=True)
    return tl.where(y > 0, 2.0, bound)


@triton.jit
def mass_of(w: tensor) -> tensor:
    """eʷ · 2⁴² of log-weights w ≤ 0, float64, to the nearest int64: 0 from about −30 on. ``mass_of`` of sampling_body.hpp."""
    t = tl.where(w > -40.0, w, -40.0)
    shifted = t * LOG2_E + SHIFT_52
    n = shifted - SHIFT_52
    r = (t - n * LN2_HIGH) - n * LN2_LOW
    y = r * (1.0 / 362880.0) + 1.0 / 40320.0
    y = y * r + 1.0 / 5040.0
    y = y * r + 1.0 / 720.0
    y = y * r + 1.0 / 120.0
    y = y * r + 1.0 / 24.0
    y = y * r + 1.0 / 6.0
    y = y * r + 0.5
    y = y * r + 1.0
    y = y * r + 1.0
    power = ((shifted.to(tl.int64, bitcast=True) + (1023 + MASS_BITS)) << 52).to(tl.float64, bitcast=True)
    return (y * power + TWO_52).to(tl.int64, bitcast=True) & ((1 << 52) - 1)


@triton.jit
def order_of(x: tensor) -> tensor:
    """uint32 that rank as float32 do, −0 as 0; what is not a number lies beyond either infinity."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, bits ^ bits, bits)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def logit_of(order: tensor) -> tensor:
    """The float32 of ``order_of``."""
    return tl.where((order >> 31) != 0, order & 0x7FFFFFFF, ~order).to(tl.float32, bitcast=True)
