"""Rotary frequencies and their context extensions, as plain numbers."""

import functools
import math

from hasten.base.errors import ConfigError, one_line
from hasten.spec import LinearScaling, Llama3Scaling, LongRope, PerPair, Rotary, Spec, Yarn


def lowering_contexts(spec: Spec, context: int) -> tuple[int, ...]:
    """The contexts up to ``context`` that a Program must be lowered for, ascending: a sequence takes the first that holds it.

    There are two where LongRope has one set of frequencies for sequences up to the original context and one for longer ones."""
    positions = [getattr(block.mixer, name, None) for block in spec.blocks for name in ("position", "rotary")]
    scalings = [position.scaling for position in positions if isinstance(position, Rotary)]
    originals = {scaling.original_context for scaling in scalings if isinstance(scaling, LongRope)}
    return (*sorted(original for original in originals if original < context), context)


@functools.lru_cache(maxsize=16)  # every layer of a model asks for the same few
def rotary_frequencies(rotary: Rotary, context: int) -> tuple[tuple[float, ...], float]:
    """Angles per position (radians, dims/2 of them) and the factor on cosines and sines, for sequences of up to ``context`` tokens."""
    try:
        frequencies, magnitude = _scaled(rotary, context)
        if all(math.isfinite(frequency) for frequency in frequencies):
            return frequencies, magnitude
    except ArithmeticError:
        pass
    raise ConfigError(f"rotary base {rotary.base} and {one_line(rotary.scaling)} give frequencies that no float can hold")


def _scaled(rotary: Rotary, context: int) -> tuple[tuple[float, ...], float]:
    frequencies = tuple(rotary.base ** (-2.0 * i / rotary.dims) for i in range(rotary.dims // 2))
    match rotary.scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling(factor=factor):
            return tuple(f / factor for f in frequencies), 1.0
        case PerPair(divisors=divisors):
            return tuple(f / d for f, d in zip(frequencies, divisors, strict=True)), 1.0
        case Llama3Scaling():
            return tuple(_llama3(f, rotary.scaling) for f in frequencies), 1.0
        case Yarn():
            return _yarn(frequencies, rotary, rotary.scaling), rotary.scaling.attention_factor
        case LongRope() as scaling:
            divisors = scaling.long_factor if context > scaling.original_context else scaling.short_factor
            return tuple(f / d for f, d in zip(frequencies, divisors, strict=True)), scaling.attention_factor


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    turns = scaling.original_context * frequency / (2 * math.pi)  # full turns over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    if turns < low:
        return frequency / scaling.factor
    if turns > high:
        return frequency
    keep = (turns - low) / (high - low)
    return (1 - keep) * frequency / scaling.factor + keep * frequency


def _yarn(frequencies: tuple[float, ...], rotary: Rotary, scaling: Yarn) -> tuple[float, ...]:
    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        return rotary.dims * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary.dims - 1)
    span = last - first if last != first else 1e-3
    kept = (1 - min(max((i - first) / span, 0.0), 1.0) for i in range(len(frequencies)))
    return tuple(f / scaling.factor * (1 - k) + f * k for f, k in zip(frequencies, kept))
