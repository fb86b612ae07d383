"""The side of a comparison that runs inside a peer's environment: load once, then time what is asked for, line by line.

A request is {"batch", "prompt", "new", "seed"}; the answer {"seconds", "first"}: from the prompts' ids to `new` tokens of each
sequence, greedy, and the first token of each. Every runner gets the same ids, which differ from seed to seed: who keeps prefixes
must find none."""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[int]]
"""(prompts, new) → the first new token of each; every sequence gets exactly ``new``."""


def prompts(batch: int, length: int, vocab: int, seed: str) -> list[list[int]]:
    """Random ids, the same for the same arguments."""
    draw = random.Random(f"{batch} {length} {vocab} {seed}")
    return [[draw.randrange(3, vocab) for _ in range(length)] for _ in range(batch)]


def main(formats: Sequence[str], load: Callable[[Path, Path, str, int, int, int], tuple[str, Generate]]) -> None:
    """``load(checkpoint, work, format, threads, context, batch)`` → (version, generate); ``work`` is a directory for converted weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--format", choices=formats, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="longest sequence")
    parser.add_argument("--batch", type=int, required=True, help="most sequences at once")
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # libraries print where they like
    os.dup2(2, 1)
    vocab = json.loads((given.checkpoint / "config.json").read_text())["vocab_size"]
    began = time.perf_counter()
    version, generate = load(given.checkpoint, given.work, given.format, given.threads, given.context, given.batch)
    print(json.dumps({"version": version, "load_s": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = prompts(asked["batch"], asked["prompt"], vocab, asked["seed"])
        began = time.perf_counter()
        first = generate(ids, asked["new"])
        print(json.dumps({"seconds": time.perf_counter() - began, "first": first}), file=answers, flush=True)
