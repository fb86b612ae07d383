"""How one request's tokens are chosen: what a user may ask for, and that it is in range. The native sampler does the choosing
(`hasten.engine.sampler`); its order of steps is

1. ids that a mask forbids leave;
2. logit bias, then repetition penalty, then frequency and presence penalties (vLLM's order);
3. temperature;
4. top-k, then top-p, then min-p: transformers' order. vLLM takes min-p before top-k and top-p. The two differ only when min-p and
   top-p are both on: here top-p counts its mass before min-p has removed any, so top-p keeps as many ids or more;
5. one draw by the Gumbel-max rule (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the largest of log-weight + noise wins.

Equal logits rank by id, the lowest first, everywhere: in the greedy choice, at the edge of top-k and top-p, and in the draw.
Penalised logits are float32, log-weights and noise float64, masses integers (``native/src/sampling.hpp`` has it to the bit). The noise
belongs to an id, not to a rank, so that a drafter drawing with the same noise tends to agree with its target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral, Real

import numpy as np

from hasten.base.errors import ConfigError, one_line

MAX_INT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024


class Purpose(IntEnum):
    """What noise is for; each purpose has its own stream at every position."""

    TOKEN = 0
    """The draw of the output token; a drafter coupled to its target uses this stream too."""
    DRAFT = 1
    """Draws of a drafter that must be independent of the target's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it stops.

    ``stop`` may be given as one string or any list or tuple of them, ``stop_token_ids`` as a list or tuple; both are tuples once made.
    Numbers may be NumPy's; they are Python's once made.
    A value of the wrong type or out of range raises `ConfigError`, one line that names the field.
    """

    max_tokens: int = 128
    """Most tokens to generate, 1 or more."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest id (after penalties) without drawing."""
    top_k: int = 0
    """Keep this many likeliest ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest ids whose probability reaches this; the likeliest always stays (Holtzman et al. 2019, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep ids at least this probable relative to the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of ids in prompt or output (Keskar et al. 2019, arXiv:1909.05858); 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each id in the output (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """Subtracted from an id's logit once for each time the output holds it (OpenAI's definition)."""
    seed: int | None = None
    """Key of the request's noise; None lets the engine choose one."""
    stop: Sequence[str] = ()
    """Text that ends the output; it is not part of the output."""
    stop_token_ids: Sequence[int] = ()
    """Ids that end the output as end-of-sequence does."""
    ignore_eos: bool = False
    """Generate on past end-of-sequence."""
    min_tokens: int = 0
    """Fewest tokens before the output may end; at most ``max_tokens``. Until then end-of-sequence and ``stop_token_ids`` are not drawn,
    and the text of so many tokens may hold ``stop`` strings: only one that is complete in a later token's text ends it (vLLM's rule)."""

    def __post_init__(self) -> None:
        if type(self.ignore_eos) is not bool:
            raise ConfigError(f"ignore_eos is {_shown(self.ignore_eos)}: give true or false")
        most = _checked_int("max_tokens", self.max_tokens, 1, MAX_INT, "ask for at least one token")
        greedy, every, off = "use 0 for greedy, 1 for the model's own distribution", "to keep every id", "for no penalty"
        checked = {
            "max_tokens": most,
            "temperature": _checked_real("temperature", self.temperature, 0.0, 100.0, greedy),
            "top_k": _checked_int("top_k", self.top_k, 0, MAX_INT, f"use 0 {every}"),
            "top_p": _checked_real("top_p", self.top_p, 0.0, 1.0, f"use 1 {every}"),
            "min_p": _checked_real("min_p", self.min_p, 0.0, 1.0, f"use 0 {every}"),
            "repetition_penalty": _checked_real("repetition_penalty", self.repetition_penalty, 0.01, 100.0, f"use 1 {off}"),
            "presence_penalty": _checked_real("presence_penalty", self.presence_penalty, -2.0, 2.0, f"use 0 {off}"),
            "frequency_penalty": _checked_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0, f"use 0 {off}"),
            "seed": None if self.seed is None else _checked_int("seed", self.seed, 0, MAX_SEED, "leave it out for a fresh seed"),
            "min_tokens": _checked_int("min_tokens", self.min_tokens, 0, most, "use 0 for no minimum, or raise max_tokens"),
            "stop": _checked_stops(self.stop),
            "stop_token_ids": _checked_ids(self.stop_token_ids),
        }
        # The documented way to normalise a field of a frozen dataclass; nothing is rewritten after construction.
        for field, value in checked.items():
            object.__setattr__(self, field, value)


def _checked_int(field: str, value: object, low: int, high: int, remedy: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise ConfigError(f"{field} is {_shown(value)}: give a whole number from {low} to {high}; {remedy}")
    return int(value)


def _checked_real(field: str, value: object, low: float, high: float, remedy: str) -> float:
    # NaN fails the comparison, which comes before float() because that cannot take every int.
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(f"{field} is {_shown(value)}: give a number from {low:g} to {high:g}; {remedy}")
    return float(value)


def _checked_stops(given: object) -> tuple[str, ...]:
    remedy = f"give a string or a list of at most {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARS} characters; leave it out for none"
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, list | tuple):
        raise ConfigError(f"stop is {_shown(given)}: {remedy}")
    if len(stops) > MAX_STOPS:
        raise ConfigError(f"stop is a list of {len(stops)}: {remedy}")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ConfigError(f"stop holds {_shown(stop)}: {remedy}")
    return tuple(stops)


def _checked_ids(given: object) -> tuple[int, ...]:
    remedy = f"give a list of at most {MAX_STOP_IDS} token ids, each from 0 to {MAX_INT}; leave it out for none"
    if not isinstance(given, list | tuple):
        raise ConfigError(f"stop_token_ids is {_shown(given)}: {remedy}")
    if len(given) > MAX_STOP_IDS:
        raise ConfigError(f"stop_token_ids is a list of {len(given)}: {remedy}")
    for token in given:
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= int(token) <= MAX_INT:
            raise ConfigError(f"stop_token_ids holds {_shown(token)}: {remedy}")
    return tuple(map(int, given))


def _shown(value: object) -> str:
    """A foreign value for an error message, at bounded cost: a huge int has no repr, and a huge list's is slow."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return one_line(value[:200] if isinstance(value, str) else value)
    return f"a {type(value).__name__}"
