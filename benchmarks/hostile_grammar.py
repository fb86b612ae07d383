"""What neighbours feel of a hostile grammar: gaps between tokens of eight streams while a request with one is there, over the gaps of the
same streams before and after it.

    python benchmarks/hostile_grammar.py [MODEL]

Prints one JSON object, medians over requests: seconds until the hostile one has failed, the neighbours' time for a token beside it over
that without, and their p99 gap so; and the same ratio where nothing hostile was there, which says how much the machine sways."""

import argparse
import itertools
import json
import statistics
import time

from hasten import SamplingParams, load
from hasten.backends.cpu import CpuBackend
from hasten.engine.batching import Continuous
from hasten.engine.constraint import Constraints
from hasten.engine.engine import Engine
from hasten.engine.grammar import Grammar
from hasten.engine.plan import Settings
from hasten.engine.request import Request
from hasten.program import Formats

CROSSED = " & ".join(f"/(.{{{count}}})*/" for count in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41))
STREAMS, CONTEXT, ASIDE_S = 8, 1024, 1.0


class Streams:
    """Streams that do not end, on an engine that is stepped by hand."""

    def __init__(self, name: str, weights: str) -> None:
        model = load(name)
        session = CpuBackend().session(model, CONTEXT, Formats(weights))
        session.compiled.store.settle()  # else what moves the weights would share the memory with the first runs
        tokenizer = load("code-8m").text_tokenizer().path  # a random model has none; ids beyond it are never allowed
        self.constraints = Constraints(tokenizer, model.spec.vocab, model.eos_token_ids or (0,))
        self.engine = Engine(session, Settings(512, Continuous(STREAMS + 1)), constraints=self.constraints)
        self._numbers, self.failed = itertools.count(), {}

    def submit(self, params: SamplingParams) -> int:
        number = next(self._numbers)
        one = Request(
            number, [7 + number % 50] * 16, params, limit=CONTEXT, end_ids=frozenset(), detokenizer=None, program_context=CONTEXT,
            constraint=None if params.grammar is None else self.constraints.start(params.grammar),
        )  # fmt: skip
        self.engine.submit([one])
        return number

    def fill(self) -> None:
        """Have all streams begun, at the same place."""
        for number in range(next(self._numbers)):
            self.engine.abort(number)
        for _ in range(STREAMS):
            self.submit(SamplingParams(max_tokens=CONTEXT, ignore_eos=True))
        for _ in range(20):
            self.engine.step()

    def step(self) -> float:
        """Seconds of a step, in which requests may fail."""
        began = time.perf_counter()
        for chunk in self.engine.step():
            if chunk.finish_reason == "length":
                self.submit(SamplingParams(max_tokens=CONTEXT, ignore_eos=True))
            elif chunk.finish_reason is not None:
                self.failed[chunk.index] = chunk.error
        return time.perf_counter() - began

    def steps(self, seconds: float) -> list[float]:
        """Steps for so long."""
        found, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            found.append(self.step())
        return found

    def beside(self, grammar: Grammar) -> list[float]:
        """Steps until the request with the grammar has failed."""
        number, found = self.submit(SamplingParams(max_tokens=10, grammar=grammar)), []
        while number not in self.failed:
            found.append(self.step())
        if self.failed[number] is None:
            raise SystemExit("the hostile grammar did not fail")
        return found


def over(during: list[float], before: list[float], after: list[float]) -> tuple[float, float]:
    """Ratios of the time for a token and of the p99 gap."""
    without = before + after
    tails = [statistics.quantiles(each, n=100)[98] for each in (during, without)]
    return statistics.fmean(during) / statistics.fmean(without), tails[0] / tails[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="code-8m")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    made = Streams(given.model, given.weights)
    made.fill()
    made.submit(SamplingParams(max_tokens=2, grammar=Grammar.regex("[a-z]{1,5}")))  # its processes are there
    made.steps(2 * ASIDE_S)
    ratios, tails, quiet, failed = [], [], [], []
    for count in range(given.rounds):
        before, began = made.steps(ASIDE_S), time.perf_counter()
        during = made.beside(Grammar.lark(f'start: "{count}" X\nX: {CROSSED}'))
        failed.append(time.perf_counter() - began)
        after, still = made.steps(ASIDE_S), made.steps(failed[-1])
        ratio, tail = over(during, before, after)
        ratios.append(ratio)
        tails.append(tail)
        quiet.append(over(still, after, made.steps(ASIDE_S))[0])
    made.constraints.close()
    print(json.dumps({
        "model": given.model, "failed_s": statistics.median(failed), "failed_most_s": max(failed),
        "neighbours_ratio": statistics.median(ratios), "neighbours_most": max(ratios), "p99_ratio": statistics.median(tails),
        "quiet_ratio": statistics.median(quiet), "quiet_most": max(quiet), "ratios": [round(each, 3) for each in ratios],
        "failed": [round(each, 2) for each in failed],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
