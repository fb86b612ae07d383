"""Tokens a second of several models on this machine, timed in turn, so that whatever slows the machine slows all of them."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from hasten.base import hardware
from hasten.base.errors import ConfigError, UserError
from hasten.engine.backends import choose_backend, find_loaded
from hasten.measure.latency import PROFILED, Case, Trial, format_names, open_runner
from hasten.model import Model
from hasten.program import Formats, unfuse

CONFIDENCE = 0.9
ROOMY = 0.75
"""Of free memory, for weights; what else each open model takes, and packing, is in the rest."""

FEWEST = 5
"""Rounds whose ratios from the least to the most hold the median with CONFIDENCE (2 / 2⁵ of all ways that they may fall miss it)."""


@dataclasses.dataclass(frozen=True, slots=True)
class SpeedTest:
    """For each of ``batches`` sequences at once: prompts of ``prompt`` tokens, then ``new`` tokens one by one, ``rounds`` times."""

    batches: tuple[int, ...] = (1, 8)
    prompt: int = 128
    new: int = 16
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.rounds < FEWEST:
            raise ConfigError(f"rounds is {self.rounds}; at least {FEWEST} are needed to tell faster from slower")

    def within(self, context: int) -> "SpeedTest":
        """The same, shortened where sequences would be longer than ``context``."""
        new = max(1, min(self.new, (context - PROFILED) // 2))
        return dataclasses.replace(self, new=new, prompt=max(1, min(self.prompt, context - PROFILED - new)))

    def cases(self) -> list[Case]:
        """One for each batch."""
        return [Case(batch, self.prompt, self.new) for batch in self.batches]


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as many tokens a second as the base: the median over rounds of both timed within a round, and the interval that it
    lies in with a probability of 90 % (of ranks, so free of any distribution)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, base_s: Sequence[float], seconds: Sequence[float]) -> "Ratio":
        """From the seconds that both took, round by round."""
        ratios = sorted(base / own for base, own in zip(base_s, seconds, strict=True))
        out = _ranks_outside(len(ratios))
        return cls(statistics.median(ratios), ratios[out], ratios[-1 - out])

    @property
    def word(self) -> str:
        """faster or slower, where the interval says so."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no faster"

    def __str__(self) -> str:
        return f"{self.median:.2f} × ({self.low:.2f} to {self.high:.2f})"


def _ranks_outside(rounds: int) -> int:
    """How many of the smallest and of the largest may be left out of an interval that holds the median with CONFIDENCE."""
    out, below = 0, 1.0  # of 2 ** rounds: ways in which fewer than out + 1 rounds are below the median
    while 2 * below / 2.0**rounds <= 1 - CONFIDENCE:
        out += 1
        below += math.comb(rounds, out)
    return out - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """At one batch: medians of tokens a second, and their ratios to the base's, None for the base itself."""

    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill: Ratio | None
    decode: Ratio | None


@dataclasses.dataclass(frozen=True, slots=True)
class Speeds:
    """What a model was timed as, one ``rows`` entry a batch. ``isa`` is the level of native kernels, 'torch' where torch chooses."""

    backend: str
    isa: str
    threads: int
    weights: str
    activations: str
    cache: str
    rows: tuple[Speed, ...]

    def lines(self, *words: str) -> list[str]:
        """A line for each batch and phase that is one of ``words``, as in 'slower at batch 8: decode 0.92 × (0.90 to 0.94)'."""
        return [
            f"{ratio.word} at batch {row.batch}: {phase} {ratio}"
            for row in self.rows
            for phase, ratio in (("prefill", row.prefill), ("decode", row.decode))
            if ratio is not None and ratio.word in words
        ]


def played_as(model: Model) -> tuple[str, str, str]:
    """(weights, activations, cache) of the linear layers, as this machine plays ``model``."""
    backend = choose_backend(model)[0]
    return format_names(unfuse(find_loaded(backend, model).program(model)))


def require_room(models: Sequence[Model], remedy: str) -> None:
    """Raise UserError, ending in ``remedy``, where the weights of ``models`` do not fit in memory together."""
    needed, free = dict[str, int](), dict[str, int | None]()
    for model in models:
        name = choose_backend(model)[0]
        backend = find_loaded(name, model)
        needed[name] = needed.get(name, 0) + backend.weight_bytes(backend.program(model))
        free[name] = _available(name, backend)
    for name, available in free.items():
        if available is not None and needed[name] > available:
            who = f"{models[0].name} takes" if len(models) == 1 else f"{len(models)} models side by side take"
            raise UserError(f"{who} {needed[name] / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; {remedy}")


def _available(name: str, backend: Any) -> int | None:
    """Bytes for the weights of models on a backend, None where that is not known."""
    if name != "cuda":
        return hardware.memory(hardware.ROOT).available
    free: int = backend.free_bytes()
    return free


def fit_together(model: Model, backend: str, formats: Sequence[Formats]) -> bool:
    """Do the weights of ``model`` fit in ROOMY of the free memory in all of ``formats`` at once?"""
    loaded = find_loaded(backend, model)
    available = _available(backend, loaded)
    needed = sum(loaded.weight_bytes(loaded.program(model, formats=each)) for each in formats)
    return available is None or needed <= ROOMY * available


def measure_speeds(
    base: Model, models: Sequence[Model], test: SpeedTest, threads: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[Speeds]:  # fmt: skip
    """Of ``base`` and each of ``models``, one of them open at a time: in each round every model is opened and timed once at every batch,
    and each round in the other order.

    Raises UserError for sequences longer than a model's context, and as `open_runner` does."""
    every, cases = (base, *models), test.cases()
    times: list[list[list[tuple[float, float]]]] = [[[] for _ in cases] for _ in every]
    found: list[Speeds | None] = [None] * len(every)
    done, of = 0, len(cases) * test.rounds * len(every)
    for round_ in range(test.rounds):
        for place in range(len(every)) if round_ % 2 == 0 else reversed(range(len(every))):
            backend = choose_backend(every[place])[0]
            runner = open_runner(every[place], cases, backend=backend, threads=threads if backend == "cpu" else None)
            for case, own in zip(cases, times[place], strict=True):
                prompt_s, token_s, _ = Trial(runner, case).time()
                own.append((prompt_s, token_s))
                done += 1
                if report is not None:
                    report(done, of)
            found[place] = Speeds(runner.backend, runner.isa, runner.threads, runner.weights, runner.activations, runner.cache, ())
            del runner  # before the next is opened
    return [
        dataclasses.replace(
            speeds, rows=tuple(_speed(case, *taken, is_base=place == 0) for case, *taken in zip(cases, times[0], times[place], strict=True))
        )
        for place, speeds in enumerate(found)
        if speeds is not None
    ]


def _speed(case: Case, base: Sequence[tuple[float, float]], own: Sequence[tuple[float, float]], *, is_base: bool) -> Speed:
    (base_prompt, base_token), (prompt, token) = zip(*base), zip(*own)
    return Speed(
        case.batch, case.batch * case.prompt / statistics.median(prompt), case.batch / statistics.median(token),
        None if is_base else Ratio.of(base_prompt, prompt), None if is_base else Ratio.of(base_token, token),
    )  # fmt: skip
