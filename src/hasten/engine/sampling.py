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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral, Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, one_line
from hasten.engine.grammar import Grammar

MAX_INT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_LOGPROBS = 128
MAX_CHOICES = 64


class Purpose(IntEnum):
    """What noise is for; each purpose has its own stream at every position."""

    TOKEN = 0
    """The draw of the output token; a drafter coupled to its target uses this stream too."""
    DRAFT = 1
    """Draws of a drafter that must be independent of the target's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearch:
    """Keep the ``width`` likeliest beginnings at every token instead of drawing, as transformers does (`hasten.engine.beam`)."""

    width: int
    """Beginnings kept."""
    length_penalty: float = 1.0
    """A finished output's score is its summed log-probability over its length to this power; above 0 favours long outputs."""
    early_stopping: bool | Literal["never"] = False
    """True ends with ``width`` finished outputs; False when, at its present length, no beginning could beat them; "never" when none
    could at its best length."""

    def __post_init__(self) -> None:
        checked = {
            "width": _checked_int("beam width", self.width, 1, MAX_CHOICES, "leave beam search out to draw"),
            "length_penalty": _checked_real("length_penalty", self.length_penalty, -10.0, 10.0, "use 0 to compare sums"),
        }
        if type(self.early_stopping) is not bool and self.early_stopping != "never":
            raise ConfigError(f"early_stopping is {_shown(self.early_stopping)}: give true, false or 'never'")
        for field, value in checked.items():
            object.__setattr__(self, field, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it stops.

    ``stop`` may be given as one string or any list or tuple of them, ``stop_token_ids`` as a list or tuple, ``logit_bias`` as a mapping
    from id to number or as pairs; all are tuples once made. Numbers may be NumPy's; they are Python's once made.
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
    and the text of so many tokens may hold ``stop`` strings: only one that is complete in a later token's text ends it (vLLM's rule).
    Where a grammar leaves nothing but the end, it ends all the same."""
    n: int = 1
    """Outputs to return; each draws with its own noise, keyed by the seed and its number."""
    best_of: int | None = None
    """Outputs to draw, of which the ``n`` with the highest log-probability per token are returned, best first; None draws ``n``."""
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    """Added to the logits of these ids, -100 to 100 (OpenAI's definition), before penalties."""
    logprobs: int | None = None
    """Report the log-probability of each output token, and of so many of the likeliest ids at its place. They are of the model's own
    distribution, before anything here changes it. None reports none."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first; makes the prompt bypass the prefix cache."""
    echo: bool = False
    """Begin the text with the prompt's."""
    grammar: Grammar | None = None
    """What the output must be; it ends when the grammar is complete."""
    beam: BeamSearch | None = None
    """Search instead of drawing."""

    def __post_init__(self) -> None:
        for field in ("ignore_eos", "echo"):
            if type(getattr(self, field)) is not bool:
                raise ConfigError(f"{field} is {_shown(getattr(self, field))}: give true or false")
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
            "logit_bias": _checked_bias(self.logit_bias),
            "logprobs": _checked_count("logprobs", self.logprobs),
            "prompt_logprobs": _checked_count("prompt_logprobs", self.prompt_logprobs),
            "n": (n := _checked_int("n", self.n, 1, MAX_CHOICES, "send more requests for more outputs")),
            "best_of": None if self.best_of is None else _checked_int("best_of", self.best_of, n, MAX_CHOICES, "leave it out to draw n"),
        }
        # The documented way to normalise a field of a frozen dataclass; nothing is rewritten after construction.
        for field, value in checked.items():
            object.__setattr__(self, field, value)
        for field, kind in (("grammar", Grammar), ("beam", BeamSearch)):
            if not isinstance(value := getattr(self, field), kind | None):
                raise ConfigError(f"{field} is {_shown(value)}: give a {kind.__name__}, or leave it out")
        if self.grammar is not None and self.ignore_eos:
            raise ConfigError("ignore_eos is true with a grammar: an output ends where its grammar does; leave one of them out")
        if self.beam is not None:
            self._check_beam(self.beam)

    @property
    def choices(self) -> int:
        """Outputs that are drawn."""
        return self.n if self.best_of is None else self.best_of

    @property
    def sequences(self) -> int:
        """Sequences that run together at most: the outputs that are drawn, or the beams."""
        return self.choices if self.beam is None else self.beam.width

    @property
    def reported(self) -> int | None:
        """How many of the likeliest ids the sampler reports beside the drawn one: ``logprobs``, or 0 where ``best_of`` ranks by them."""
        return 0 if self.logprobs is None and self.choices > self.n else self.logprobs

    def _check_beam(self, beam: BeamSearch) -> None:
        """What beam search has no meaning for, or none yet."""
        if self.n > beam.width:
            raise ConfigError(f"n is {self.n} with a beam width of {beam.width}: a search returns at most as many outputs; raise the width")
        plain = {
            "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "best_of": None, "stop": (), "logprobs": None, "prompt_logprobs": None,
        }  # fmt: skip
        for field, value in plain.items():
            if getattr(self, field) != value:
                raise ConfigError(
                    f"{field} is {_shown(getattr(self, field))} with beam search, which does not take it; leave one of them out"
                )


def check_ids(params: SamplingParams, vocab: int) -> None:
    """Raises `ConfigError` for ids that a vocabulary of that size does not have."""
    for field, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", [token for token, _ in biases(params)])):
        if ids and max(ids) >= vocab:
            raise ConfigError(f"{field} holds {max(ids)}: this model's token ids go from 0 to {vocab - 1}")


def biases(params: SamplingParams) -> tuple[tuple[int, float], ...]:
    """``logit_bias`` as the pairs it became."""
    return tuple(params.logit_bias)  # type: ignore[arg-type]


def token_masks(forbidden: Sequence[Collection[int]], vocab: int) -> NDArray[np.uint32]:
    """Masks uint32 [R, ⌈vocab / 32⌉] that allow each row all ids but those; bit i % 32 of word i / 32 is id i's."""
    masks = np.full((len(forbidden), -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
    for mask, ids in zip(masks, forbidden):
        for token in ids:
            if 0 <= token < vocab:
                mask[token // 32] &= np.uint32(0xFFFFFFFF ^ 1 << token % 32)
    return masks


def _checked_count(field: str, given: object) -> int | None:
    remedy = "use 0 for the chosen tokens alone, leave it out for none"
    return None if given is None else _checked_int(field, given, 0, MAX_LOGPROBS, remedy)


def _checked_bias(given: object) -> tuple[tuple[int, float], ...]:
    remedy = f"give at most {MAX_BIASES} token ids with a number from {-MAX_BIAS:g} to {MAX_BIAS:g} each; leave it out for none"
    if not isinstance(given, Mapping | list | tuple):
        raise ConfigError(f"logit_bias is {_shown(given)}: {remedy}")
    if len(given) > MAX_BIASES:
        raise ConfigError(f"logit_bias is a list of {len(given)}: {remedy}")
    pairs: dict[int, float] = {}
    for pair in given.items() if isinstance(given, Mapping) else given:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ConfigError(f"logit_bias holds {_shown(pair)}: {remedy}")
        token = _checked_int("a token id of logit_bias", pair[0], 0, MAX_INT, "look ids up in the tokenizer")
        pairs[token] = _checked_real(f"logit_bias of token {token}", pair[1], -MAX_BIAS, MAX_BIAS, "use a grammar to forbid ids for sure")
    return tuple(sorted(pairs.items()))


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
