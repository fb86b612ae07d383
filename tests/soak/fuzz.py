"""`python -m tests.soak fuzz`: guided by what runs (atheris, libFuzzer), one process a target and slice of time. What was found to be worth
keeping is in .soak/corpus, which the next slice begins with; an input that breaks something is kept beside it."""

import random
import re
import subprocess
import sys
from typing import Any

from benchmarks.ledger import ROOT, Ledger
from tests.soak.determinism import Difference
from tests.soak.targets import TARGETS

SLICE_S = 300
HANG_S = 40
MOST_BYTES = 4096
"""Of an input."""
MOST_MB = 2048


def run_slice(target: str, number: int, seconds: int, seed: int) -> dict[str, Any]:
    """So many seconds; runs and edges reached. Raises Difference for an input that breaks something, which it names."""
    kept = ROOT / ".soak" / "corpus" / target
    kept.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "tests.soak.guided", target, str(kept), f"-max_total_time={seconds}", f"-timeout={HANG_S}",
        f"-rss_limit_mb={MOST_MB}",
        f"-max_len={MOST_BYTES}", f"-seed={1 + random.Random(f'{seed} {target} {number}').randrange(2**30)}",
        f"-artifact_prefix={kept.parent}/{target}-", "-print_final_stats=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=seconds + 600, check=False)
    runs, reached = re.findall(r"Done (\d+) runs", done.stderr), re.findall(r"cov: (\d+)", done.stderr)
    if done.returncode or not runs:
        raise Difference(f"{target}: {done.stderr[-3000:]}")
    return {"runs": int(runs[-1]), "reached": int(reached[-1]) if reached else 0, "seconds": seconds}


def fuzz(ledger: Ledger, digest: str, seconds: int, seed: int) -> None:
    """Every target for so many seconds, in slices; raises Difference."""
    for target in TARGETS:
        runs = reached = 0
        for number, begin in enumerate(range(0, seconds, SLICE_S)):
            length = min(SLICE_S, seconds - begin)
            key = ("fuzz", digest, target, number, length, seed)
            kept = ledger.get(*key)
            if kept is None:
                kept = run_slice(target, number, length, seed)
                ledger.note(*key, value=kept)
            runs, reached = runs + kept["runs"], max(reached, kept["reached"])
        print(f"fuzz, {target:12}{seconds:>6,} s{runs:>12,} inputs{reached:>8,} edges reached, 0 crashes, 0 hangs", flush=True)
