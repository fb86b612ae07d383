"""What neighbours feel of a hostile grammar: gaps between tokens of eight streams while one arrives, over the same streams alone.

    python benchmarks/hostile_grammar.py [MODEL]

Prints one JSON object, medians of interleaved runs: how long the hostile request took to fail, and the neighbours' time per token and p99
gap with it over without it, in the same stretch of time."""

import json
import statistics
import sys
import time

from hasten import LLM, SamplingParams
from hasten.backends.cpu import CpuSession
from hasten.engine.grammar import Grammar

CROSSED = " & ".join(f"/(.{{{count}}})*/" for count in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41))
PLAIN, HARMLESS = Grammar.regex("[a-z]{1,5}"), SamplingParams(max_tokens=400, ignore_eos=True)


def gaps(llm: LLM, grammar: Grammar) -> tuple[list[float], float]:
    """Seconds between steps until a second after the request with the grammar ended, and when that was."""
    prompts = [[7 + index] * 16 for index in range(9)]
    params = [HARMLESS] * 8 + [SamplingParams(max_tokens=10, grammar=grammar)]
    began = last = time.perf_counter()
    ended, found = 0.0, []
    for chunk in llm.stream(prompts, params):
        now = time.perf_counter()
        if chunk.index == 8:
            ended = now - began if chunk.finish_reason else ended
        elif chunk.index == 0:
            found.append(now - last)
            last = now
    return found[1:], ended


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "code-8m")
    gaps(llm, PLAIN)
    if isinstance(session := llm.engine().session, CpuSession):
        session.compiled.store.settle()  # else what moves the weights would share the memory with the first runs
    ratios, tails, failed = [], [], []
    for count in range(9):
        with_it, ended = gaps(llm, Grammar.lark(f'start: "{count}" X\nX: {CROSSED}'))
        without, _ = gaps(llm, PLAIN)
        steps = next((i for i in range(len(with_it)) if sum(with_it[:i]) > ended), len(with_it))
        with_it, without = with_it[:steps], without[:steps]
        ratios.append(statistics.fmean(with_it) / statistics.fmean(without))
        tails.append(statistics.quantiles(with_it, n=100)[98] / statistics.quantiles(without, n=100)[98])
        failed.append(ended)
    print(json.dumps({
        "failed_s": statistics.median(failed), "failed_most_s": max(failed), "neighbours_ratio": statistics.median(ratios),
        "neighbours_most": max(ratios), "p99_ratio": statistics.median(tails), "ratios": ratios, "failed": failed, "steps_beside": steps,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
