"""`make soak`: what takes too long for every change. A part that passed is not repeated until what runs changes (.soak/ledger.jsonl).

Parts are functions in PARTS; each notes what it finished and raises with the first thing that is wrong."""

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.ledger import ROOT, Ledger, source_digest
from hasten import _native
from hasten.base import hardware
from tests.soak.determinism import CACHES, CELLS, WEIGHTS, Cell, Difference, run_cell
from tests.soak.determinism import PARTS as KINDS
from tests.soak.fuzz import fuzz
from tests.soak.kill import SLOTS, STREAMS, Served, run_round
from tests.soak.load import CHECKS
from tests.soak.mechanisms import FEWEST, WAYS, Same
from tests.soak.mechanisms import KINDS as PLAYED
from tests.soak.quantize import POINTS, Runs
from tests.soak.quantize import told as told_of_quantize
from tests.soak.requests import PER_CHUNK, requests
from tests.soak.tenants import PER_ROUND, tenants

REQUESTS, PAIRS, SECONDS = 10_000, 1000, 3600
PROMPTS = {"determinism": 200, "engine": 1000}
ROUNDED = {"kill": 50, "quantize": POINTS, **{name: check.rounds for name, check in CHECKS.items()}}
LEAST = {"determinism": 12, "engine": FEWEST}


def determinism(ledger: Ledger, digest: str, prompts: int, seed: int) -> None:
    """Every cell of the contract; raises Difference."""
    brand, isa = hardware.detect().cpu.brand, _native.isa_level()
    results = {}
    for number, cell in enumerate(CELLS, 1):
        key = ("determinism", digest, brand, isa, str(cell), prompts, seed)
        kept = ledger.get(*key)
        if kept is None:
            began = time.perf_counter()
            kept = run_cell(cell, prompts, seed) | {"seconds": round(time.perf_counter() - began, 1)}
            ledger.note(*key, value=kept)
            print(f"{number} of {len(CELLS)}: {cell}: {kept['tokens']:,} tokens the same, {kept['seconds']} s", flush=True)
        else:
            print(f"{number} of {len(CELLS)}: {cell}: done before", flush=True)
        results[cell] = kept
    print(f"\ndeterminism, {isa}, {prompts} prompts a cell, 1 and 2 threads: tokens compared, of which 0 differ")
    width = max(map(len, KINDS))
    print(" " * width + "".join(f"{f'{weights} {cache}':>14}" for weights in WEIGHTS for cache in CACHES))
    for kind in KINDS:
        cells = (results[Cell(weights, kind, cache)] for weights in WEIGHTS for cache in CACHES)
        print(f"{kind:{width}}" + "".join(f"{each['tokens']:>14,}" for each in cells))
    seconds = sum(each["seconds"] for each in results.values())
    print(f"{sum(each['tokens'] for each in results.values()):,} tokens, 0 differ; {seconds:.0f} s")


def engine(ledger: Ledger, digest: str, prompts: int, seed: int) -> None:
    """Every model by every mechanism of the engine; raises Difference."""
    brand, isa = hardware.detect().cpu.brand, _native.isa_level()
    results = {}
    for kind in PLAYED:
        same = Same(kind, prompts, seed)
        for way in WAYS:
            key = ("engine", digest, brand, isa, kind, way, prompts, seed)
            kept = ledger.get(*key)
            if kept is None:
                began = time.perf_counter()
                kept = same.run(way) | {"seconds": round(time.perf_counter() - began, 1)}
                ledger.note(*key, value=kept)
                print(f"{kind}, {way}: {kept['tokens']:,} tokens the same, {kept['seconds']} s", flush=True)
            else:
                print(f"{kind}, {way}: done before", flush=True)
            results[kind, way] = kept
    print(f"\nengine, {isa}, {prompts} prompts a model: tokens compared, of which 0 differ, and what happened meanwhile")
    for (kind, way), each in results.items():
        fired = each["fired"]
        told = ", ".join(f"{name} {fired[name]:,}" for name in ("shared_steps", "hit_tokens", "recomputed", "swapped", "padding_tokens"))
        print(f"{kind:14}{way:16}{each['tokens']:>8,}  steps {fired['steps']:,}, {told}")
    seconds = sum(each["seconds"] for each in results.values())
    print(f"{sum(each['tokens'] for each in results.values()):,} tokens, 0 differ; {seconds:.0f} s")


def kill(ledger: Ledger, digest: str, rounds: int, seed: int) -> None:
    """Round after round against one server; raises Difference."""
    brand, served, results = hardware.detect().cpu.brand, None, []
    try:
        for number in range(rounds):
            key = ("kill", digest, brand, STREAMS, number, seed)
            kept = ledger.get(*key)
            if kept is None:
                served = served or Served()
                kept = run_round(served, number, seed) | {"cold_s": served.cold_s}
                ledger.note(*key, value=kept)
                print(
                    f"kill, round {number + 1} of {rounds}: told within {kept['last_told_s']:.2f} s, ready after {kept['ready_s']:.2f} s",
                    flush=True,
                )
            else:
                print(f"kill, round {number + 1} of {rounds}: done before", flush=True)
            results.append(kept)
    finally:
        if served is not None:
            served.end()
    print(f"\nkill, {rounds} engines killed under {STREAMS} streams each, {SLOTS} of which ran: seconds, mean and most")
    for name, said in (("last_told_s", "until the last client was told"), ("ready_s", "until ready again"), ("cold_s", "of a first start")):
        found = [each[name] for each in results]
        print(f"{said:32}{sum(found) / len(found):8.2f}{max(found):8.2f}")
    print(f"{sum(each['refusals'] for each in results):,} requests sent away meanwhile, each with Retry-After")


def load(name: str, ledger: Ledger, digest: str, rounds: int, seed: int) -> None:
    """One of the load and fault checks, round after round; raises Difference."""
    brand, check = hardware.detect().cpu.brand, CHECKS[name]
    with tempfile.TemporaryDirectory() as kept:
        os.environ["HASTEN_CACHE"] = kept  # nothing of the user's
        for number in range(rounds):
            key = (name, digest, brand, number, seed)
            if (found := ledger.get(*key)) is None:
                found = check.round(seed + number)
                ledger.note(*key, value=found)
            print(check.told(found), flush=True)


def quantize(ledger: Ledger, digest: str, points: int, seed: int) -> None:
    """Point after point, against one run that nobody kills; raises Difference."""
    brand, whole = hardware.detect().cpu.brand, None
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HASTEN_CACHE"] = str(Path(folder) / "cache")  # nothing of the user's
        runs = Runs(Path(folder))
        for number in range(points):
            key = ("quantize", digest, brand, points, number, seed)
            if (found := ledger.get(*key)) is None:
                whole = whole or runs.whole()
                found = runs.cut(whole, number, points, seed)
                ledger.note(*key, value=found)
            print(told_of_quantize(found), flush=True)


PARTS = {
    "determinism": determinism, "engine": engine, "kill": kill, "requests": requests, "fuzz": fuzz, "tenants": tenants,
    "quantize": quantize,
    **{name: functools.partial(load, name) for name in CHECKS},
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--prompts", type=int, help=f"for each cell; unless given {PROMPTS}")
    parser.add_argument("--rounds", type=int, help=f"of kill and what follows it; unless given {ROUNDED}")
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"malformed ones, in chunks of {PER_CHUNK}; {REQUESTS} unless given")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"of processor time of fuzz, for each target; {SECONDS} unless given")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"of tenants, in rounds of {PER_ROUND}; {PAIRS} unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, default=ROOT / ".soak" / "ledger.jsonl", help="where finished pieces are noted")
    given = parser.parse_args()
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    parts = given.parts or list(PARTS)
    if given.prompts is not None and given.prompts < (least := max(LEAST.get(part, 0) for part in parts)):
        parser.error(f"{given.prompts} prompts are too few to share batches; {least} or more")
    if given.rounds is not None and given.rounds < 1:
        parser.error(f"{given.rounds} rounds; 1 or more")
    if min(given.requests, given.seconds, given.pairs) < 1:
        parser.error("--requests, --seconds and --pairs are 1 or more")
    ledger, digest = Ledger(given.ledger), source_digest(ROOT / "tests" / "soak", ROOT / "tests" / "serve" / "server.py")
    rounds = {part: given.rounds or count for part, count in ROUNDED.items()}
    sizes = {**rounds, "requests": given.requests, "fuzz": given.seconds, "tenants": given.pairs}
    for part in parts:
        try:
            PARTS[part](ledger, digest, sizes[part] if part in sizes else given.prompts or PROMPTS[part], given.seed)
        except Difference as error:
            print(f"{part}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
