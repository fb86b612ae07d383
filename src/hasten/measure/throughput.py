"""How many tokens a second a model puts out when many requests of mixed lengths are there at once, by how they are batched."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hasten.base.errors import ConfigError, UserError
from hasten.engine import LLM, SamplingParams
from hasten.engine.batching import Batching, Continuous, Dynamic, Static
from hasten.engine.plan import Settings
from hasten.measure.roofline import KnowsItsLimits
from hasten.model import Model
from hasten.program import Formats

BATCHINGS: dict[str, Callable[[int], Batching]] = {"static": Static, "dynamic": Dynamic, "continuous": Continuous}


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """``requests`` greedy requests, all there at once. Outputs have ``output_min`` to ``output_max`` tokens, log-uniform; prompts have
    ``prompt`` random ids of their own behind ``shared_prefix`` ids that all begin with. ``seed`` draws lengths and ids."""

    requests: int = 96
    prompt: int = 32
    output_min: int = 16
    output_max: int = 512
    shared_prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.output_min <= self.output_max:
            raise ConfigError(
                f"outputs of {self.output_min} to {self.output_max} tokens; give at least 1, and no more at least than at most"
            )
        if self.requests < 1 or self.prompt < 1 or self.shared_prefix < 0:
            raise ConfigError(f"{self.requests} requests of {self.prompt} tokens behind {self.shared_prefix}; give at least 1, 1 and 0")

    @property
    def context(self) -> int:
        """Most tokens that a request comes to."""
        return self.shared_prefix + self.prompt + self.output_max

    def lengths(self) -> list[int]:
        """Tokens of each output."""
        drawn = np.random.default_rng(self.seed).uniform(np.log(self.output_min), np.log(self.output_max + 1), self.requests)
        return [int(length) for length in np.clip(np.exp(drawn), self.output_min, self.output_max)]

    def prompts(self, vocab: int) -> list[list[int]]:
        """Token ids of each prompt."""
        rng = np.random.default_rng([self.seed, 1])
        shared = rng.integers(0, vocab, self.shared_prefix).tolist()
        return [shared + rng.integers(0, vocab, self.prompt).tolist() for _ in range(self.requests)]


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """How much faster than static batching the drawn lengths allow continuous batching to be, if no slot were ever empty while it could
    be filled: ``steps`` where a step takes as long whatever is in it (memory is the limit), ``rows`` where it takes as long as it has
    rows (arithmetic is), ``measured`` where it takes what the steps of the run say, None where these cannot tell."""

    steps: float
    rows: float
    measured: float | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], slots: int, prompt: int = 0, cost: "StepCost | None" = None) -> "Bound":
        """Of outputs in the order in which they come, whose prompts have ``prompt`` tokens each besides. Every static batch lasts as long
        as its longest, and keeps all its rows so long."""
        batches = [lengths[begin : begin + slots] for begin in range(0, len(lengths), slots)]
        static = StepCount(sum(map(max, batches)), sum(max(batch) * len(batch) for batch in batches))
        packed = StepCount(max(*lengths, -(-sum(lengths) // slots)), sum(lengths))
        prompts = prompt * len(lengths)
        measured = None if cost is None else cost.seconds(static, prompts) / cost.seconds(packed, prompts)
        return cls(static.steps / packed.steps, static.rows / packed.rows, measured)


class StepCount(NamedTuple):
    """Steps, and rows of all of them together."""

    steps: int
    rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepCost:
    """A step takes ``fixed_s`` and ``row_s`` for each of its tokens."""

    fixed_s: float
    row_s: float

    def seconds(self, count: StepCount, prompts: int) -> float:
        """Of so many steps; tokens of prompts are rows in them."""
        return self.fixed_s * count.steps + self.row_s * (count.rows + prompts)

    @classmethod
    def through(cls, steps: Sequence[tuple[int, float]]) -> "StepCost | None":
        """Of (tokens, seconds) of steps, by the medians at each number of tokens; None where there are not three numbers."""
        by_tokens: dict[int, list[float]] = {}
        for tokens, seconds in steps:
            by_tokens.setdefault(tokens, []).append(seconds)
        if len(by_tokens) < 3:
            return None
        found = [(tokens, statistics.median(its), len(its)) for tokens, its in by_tokens.items()]
        weights = [len_**0.5 / seconds for _, seconds, len_ in found]  # so that what is off counts as a share
        slope, at_zero = np.polyfit([tokens for tokens, _, _ in found], [seconds for _, seconds, _ in found], 1, w=weights)
        return cls(max(0.0, float(at_zero)), max(0.0, float(slope)))


@dataclasses.dataclass(frozen=True, slots=True)
class Throughput:
    """One run. Times to the first token count from when all requests were handed in; ``page_waste`` is the share of empty places in the
    pages that sequences held, on average over the steps and at its most, and ``mean_tokens`` what a sequence held then. A step took
    ``step_fixed_s`` and ``step_row_s`` for each of its tokens, None where steps were too much alike to tell."""

    model: str
    backend: str
    batching: str
    prefix_cache: bool
    requests: int
    slots: int
    prompt: int
    shared_prefix: int
    output_tokens: int
    seconds: float
    tokens_per_s: float
    ttft_mean_s: float
    ttft_median_s: float
    ttft_p99_s: float
    steps: int
    computed_tokens: int
    padding_tokens: int
    hit_tokens: int
    preemptions: int
    page_waste: float
    page_waste_most: float
    mean_tokens: float
    bound_steps: float
    bound_rows: float
    bound_measured: float | None
    step_fixed_s: float | None
    step_row_s: float | None


def open_llm(
    model: Model, workload: Workload, *, batching: str, slots: int, backend: str, formats: Formats, prefix_cache: bool, step_tokens: int,
    cache_bytes: int | None = None,
) -> LLM:  # fmt: skip
    """An LLM for one run. Raises UserError for a workload longer than the model's context, ConfigError for a batching nobody knows."""
    if batching not in BATCHINGS:
        raise ConfigError(f"batching is {batching!r}; accepted: {', '.join(BATCHINGS)}")
    if workload.context > model.spec.context:
        raise UserError(f"prompt and output come to {workload.context} tokens; {model.name} accepts up to {model.spec.context}")
    return LLM(
        model, backend=backend, formats=formats, context=workload.context, max_sequences=slots, prefixes=prefix_cache,
        scheduling=Settings(max(step_tokens, slots), BATCHINGS[batching](slots)), cache_bytes=cache_bytes,
    )  # fmt: skip


def _rehearse(llm: LLM, workload: Workload) -> None:
    """Steps of the same sizes; what is kept of its prompts is of no use to others."""
    others = dataclasses.replace(workload, seed=workload.seed + 1).prompts(llm.model.spec.vocab)
    for _ in llm.stream(others, [SamplingParams(max_tokens=length, ignore_eos=True) for length in workload.lengths()]):
        pass


def run_workload(
    llm: LLM, workload: Workload, batching: str, prefix_cache: bool, told: Callable[[int], None] = lambda _: None
) -> Throughput:
    """Run all requests once, after a short one to warm up; on a device after all of them with other ids, for it compiles and captures by
    the size of a step. ``told`` hears of each token."""
    prompts, lengths = workload.prompts(llm.model.spec.vocab), workload.lengths()
    engine = llm.engine()
    for _ in llm.stream([prompts[0][-1:]], SamplingParams(max_tokens=2, ignore_eos=True)):
        pass
    if isinstance(engine.session, KnowsItsLimits):
        _rehearse(llm, workload)
    engine.session.settle()  # else the first steps would share the machine with what makes later ones faster
    before, waste, held = dataclasses.asdict(engine.counters), list[float](), list[float]()
    steps, rows = list[tuple[int, float]](), 0
    first: dict[int, float] = {}
    began = last = time.perf_counter()
    for chunk in llm.stream(prompts, [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]):
        if chunk.error is not None:
            raise UserError(chunk.error)
        if chunk.index not in first:
            first[chunk.index] = time.perf_counter() - began
        if engine.counters.steps > before["steps"] + len(waste):
            now, counters, pages = time.perf_counter(), engine.counters, engine.scheduler.pages()
            computed = counters.computed_tokens + counters.padding_tokens - before["computed_tokens"] - before["padding_tokens"]
            steps.append((computed - rows, now - last))
            rows, last = computed, now
            waste.append(engine.cache.empty_share(pages))
            held.append(statistics.fmean(each.length for each in pages) if pages else 0.0)
        told(len(chunk.token_ids))
    seconds = time.perf_counter() - began
    counted = {name: value - before[name] for name, value in dataclasses.asdict(engine.counters).items()}
    times, slots = sorted(first.values()), llm.scheduling.batching.slots
    cost = StepCost.through([(tokens, took) for tokens, took in steps if tokens <= slots])
    bound, p99 = Bound.of(lengths, slots, workload.prompt, cost), times[-(-99 * len(times) // 100) - 1]
    return Throughput(
        llm.model.name, llm.backend, batching, prefix_cache, workload.requests, slots, workload.prompt, workload.shared_prefix,
        sum(lengths), seconds, sum(lengths) / seconds, statistics.mean(times), statistics.median(times), p99,
        counted["steps"], counted["computed_tokens"], counted["padding_tokens"], counted["hit_tokens"],
        counted["recomputed"] + counted["swapped"], statistics.mean(waste), max(waste), statistics.fmean(held),
        bound.steps, bound.rows, bound.measured, None if cost is None else cost.fixed_s, None if cost is None else cost.row_s,
    )  # fmt: skip
