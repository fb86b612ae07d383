"""What a load generator asks: requests of drawn lengths, or those of a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten.base.errors import ConfigError, UserError, one_line

WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what all were we "
    "when your can said there use an each which she do how their if will up other about out many then them these so some her would make "
    "like him into time has look two more write go see number no way could people my than first water been call who oil its now find long "
    "down day did get come made may part"
)
"""Words that are a token in most vocabularies."""

FIRST_ID, IDS = 32, 224
"""Token ids that random prompts are drawn from: every vocabulary has 256, and special ones stand before or far behind."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A prompt, as text or token ids, and how many tokens to ask for."""

    prompt: str | list[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Lengths are uniform from (1 − ``range_ratio``) to (1 + ``range_ratio``) of what is given; ``prefix_tokens`` are the same in every
    prompt, in front. Prompts are token ids, or words, each a token or two, where ``as_text``: only a server knows its tokenizer."""

    input_tokens: int = 1024
    output_tokens: int = 128
    range_ratio: float = 0.0
    prefix_tokens: int = 0
    as_text: bool = False

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 1 or self.prefix_tokens < 0 or not 0 <= self.range_ratio < 1:
            raise ConfigError(
                f"random prompts of {self.prefix_tokens} + {self.input_tokens} tokens, {self.output_tokens} to answer, ratio "
                f"{self.range_ratio}; give at least 1 token each, a prefix of 0 or more, and a ratio from 0 to below 1"
            )

    def draw(self, count: int, seed: int) -> list[LoadRequest]:
        """``count`` requests; equal seeds, equal requests."""
        rng = np.random.default_rng([seed, 1])
        prefix = rng.integers(0, IDS, self.prefix_tokens).tolist()
        inputs, outputs = self._lengths(rng, self.input_tokens, count), self._lengths(rng, self.output_tokens, count)
        return [
            LoadRequest(self._said([*prefix, *rng.integers(0, IDS, length).tolist()]), answer) for length, answer in zip(inputs, outputs)
        ]

    def _lengths(self, rng: np.random.Generator, length: int, count: int) -> list[int]:
        low, high = max(1, int(length * (1 - self.range_ratio))), int(np.ceil(length * (1 + self.range_ratio)))
        return [int(each) for each in rng.integers(low, high + 1, count)]

    def _said(self, drawn: Sequence[int]) -> str | list[int]:
        if not self.as_text:
            return [FIRST_ID + one for one in drawn]
        words = WORDS.split()
        return " ".join(words[one % len(words)] for one in drawn)


def read_sharegpt(path: Path, count: int, output_tokens: int, seed: int) -> list[LoadRequest]:
    """First turns of ShareGPT's conversations, ``count`` drawn without repeats while there are any. Raises UserError for another file."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(str(error))}") from None
    turns = [one.get("conversations") for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    prompts = [its[0]["value"] for its in turns if isinstance(its, list) and len(its) > 1 and _is_turn(its[0])]
    return _drawn(path, [LoadRequest(prompt, output_tokens) for prompt in prompts], count, seed)


def read_custom(path: Path, count: int, output_tokens: int, seed: int) -> list[LoadRequest]:
    """Lines of ``{"prompt": TEXT}``, with ``output_tokens`` if a line has its own. Raises UserError naming the line that is none."""
    requests = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(str(error))}") from None
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            line: Any = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        own = line.get("output_tokens", output_tokens) if isinstance(line, dict) else None
        if not isinstance(own, int) or own < 1 or not isinstance(line.get("prompt"), str) or not line["prompt"]:
            raise UserError(f'{path}: line {number} needs "prompt", a text, and may have "output_tokens", 1 or more')
        requests.append(LoadRequest(line["prompt"], own))
    return _drawn(path, requests, count, seed)


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str) and bool(turn["value"].strip())


def _drawn(path: Path, requests: Sequence[LoadRequest], count: int, seed: int) -> list[LoadRequest]:
    if not requests:
        raise UserError(f"{path} has no prompts")
    order: list[int] = []
    rng = np.random.default_rng([seed, 2])
    while len(order) < count:
        order += rng.permutation(len(requests)).tolist()
    return [requests[index] for index in order[:count]]
