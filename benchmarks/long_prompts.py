"""What sixteen streams feel of long prompts that arrive beside them: the time between two tokens of one, against a step of theirs alone.

    python benchmarks/long_prompts.py [MODEL] [--stretch 1.8]

The streams decode; then prompts arrive, the next as soon as the last one has its first token. Prints one JSON object: the median step
before and after, the p99 of the gaps between tokens of all streams while prompts are computed, over that step and over the steps without
prompts that were nearest in time, and how long a prompt took. The model must have room for the prompt: random:smollm2-135m has."""

import argparse
import bisect
import itertools
import json
import math
import statistics
import time

import numpy as np

from hasten import LLM, SamplingParams
from hasten.engine.batching import Continuous
from hasten.engine.plan import Settings
from hasten.engine.request import Request
from hasten.program import Formats

ALONE = 24  # steps of the streams alone that the median is of, before and after


class Streams:
    """An engine stepped by hand; when each output got its tokens."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.engine = llm, llm.engine()
        self.came: dict[int, list[float]] = {}
        self.alone: list[tuple[float, float]] = []  # steps of one token each: when, and seconds
        self.rng = np.random.default_rng(0)

    def submit(self, length: int, most: int) -> int:
        index, params = len(self.came), SamplingParams(max_tokens=most, ignore_eos=True, temperature=0)
        ids = self.rng.integers(0, self.llm.model.spec.vocab, length).tolist()
        self.came[index] = []
        request = Request(
            index, ids, params, limit=self.llm.context, end_ids=frozenset(), detokenizer=None, program_context=self.llm.context
        )  # fmt: skip
        self.engine.submit([request])
        return index

    def step(self) -> float:
        """Seconds of one step."""
        began, before = time.perf_counter(), self.engine.counters.computed_tokens
        chunks = self.engine.step()
        now = time.perf_counter()
        if self.engine.counters.computed_tokens - before == len(chunks):
            self.alone.append((now, now - began))
        for chunk in chunks:
            self.came[chunk.index].append(now)
        return now - began

    def alone_near(self, when: float) -> float:
        """Seconds of a step without prompts about that time: the median of five, for the machine sways."""
        times = [at for at, _ in self.alone]
        begin = max(0, min(bisect.bisect(times, when) - 2, len(times) - 5))
        return statistics.median(seconds for _, seconds in self.alone[begin : begin + 5])

    def until_first(self, index: int) -> float:
        """Seconds until this output has its first token."""
        began = time.perf_counter()
        while not self.came[index]:
            self.step()
        return time.perf_counter() - began


def opened(model: str, weights: str, prompt: int, streams: int, stretch: float) -> LLM:
    scheduling = Settings(batching=Continuous(streams + 1), stretch=stretch)
    context = prompt + 64
    return LLM(model, backend="cpu", formats=Formats(weights), context=context, max_sequences=streams + 1, scheduling=scheduling)


def measure(made: Streams, prompt: int, streams: int, arrivals: int) -> dict[str, float]:
    most = made.llm.context - 16
    running = [made.submit(16, most) for _ in range(streams)]
    while not all(made.came[index] for index in running):
        made.step()
    decode = [made.step() for _ in range(ALONE + 2)][2:]
    began, took = time.perf_counter(), []
    steps = made.engine.counters.steps
    for _ in range(arrivals):
        took.append(made.until_first(made.submit(prompt, 1)))
    ended, steps = time.perf_counter(), made.engine.counters.steps - steps
    decode += [made.step() for _ in range(ALONE + 2)][2:]
    timed = [
        (after - before, after) for index in running for before, after in itertools.pairwise(made.came[index]) if began < after <= ended
    ]
    if len(timed) < streams * steps:  # the long prompts' own steps are among them
        raise SystemExit(f"{streams} streams got {len(timed)} tokens in {steps} steps")
    gaps, near = [gap for gap, _ in timed], [gap / made.alone_near(at) for gap, at in timed]
    p99, step = float(np.quantile(gaps, 0.99)), statistics.median(decode)
    return {
        "step_ms": 1e3 * step, "p99_gap_ms": 1e3 * p99, "median_gap_ms": 1e3 * statistics.median(gaps), "p99_over_step": p99 / step,
        "p99_over_near_step": float(np.quantile(near, 0.99)), "p99_over_median_gap": p99 / statistics.median(gaps), "steps": steps,
        "prompt_s": statistics.mean(took),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="random:smollm2-135m")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of each that arrives")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--arrivals", type=int, default=1)
    parser.add_argument("--stretch", type=float, default=1.8, help="how much longer than without prompts a step may be; inf: any")
    given = parser.parse_args()
    made = Streams(opened(given.model, given.weights, given.prompt, given.streams, given.stretch))
    found = measure(made, given.prompt, given.streams, given.arrivals)
    settings = {"model": given.model, "weights": given.weights, "prompt": given.prompt, "streams": given.streams}
    stretch = given.stretch if math.isfinite(given.stretch) else None
    print(json.dumps({**settings, "stretch": stretch, **{name: round(value, 4) for name, value in found.items()}}))


if __name__ == "__main__":
    main()
