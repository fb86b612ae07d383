"""`python -m tests.soak fuzz`: guided by what runs (atheris, libFuzzer), one process a target and slice of time, until every target has
had its processor time. What was found to be worth keeping is in .soak/corpus, which the next slice begins with; an input that breaks
something is kept beside it."""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.ledger import ROOT, Ledger, digest_of
from tests.soak.determinism import Difference
from tests.soak.targets import TARGETS, Target

SLICE_S = 120
HANG_S = 40
MOST_BYTES = 4096
"""Of an input."""
MOST_MB = 2048
LEAST_REACHED = 50
"""Edges: fewer, and what a target is about is not counted, so nothing guides."""


def run_slice(target: str, number: int, seconds: int, seed: int) -> dict[str, Any]:
    """So many seconds; runs, edges reached, and seconds of processor time, with that of what compiles grammars beside it.
    Raises Difference for an input that breaks something, which it names."""
    kept = ROOT / ".soak" / "corpus" / target
    kept.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "tests.soak.guided", target, str(kept), f"-max_total_time={seconds}", f"-timeout={HANG_S}",
        f"-rss_limit_mb={MOST_MB}",
        f"-max_len={MOST_BYTES}", f"-seed={1 + random.Random(f'{seed} {target} {number}').randrange(2**30)}",
        f"-artifact_prefix={kept.parent}/{target}-", "-print_final_stats=1",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
        late = threading.Timer(seconds + 600, os.kill, (process.pid, signal.SIGKILL))
        late.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
        finally:
            late.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    runs, reached = re.findall(r"Done (\d+) runs", text), re.findall(r"cov: (\d+)", text)
    if process.returncode or not runs:
        raise Difference(f"{target}, slice {number}, exit {process.returncode}: {text[-3000:]}")
    if not reached or int(reached[-1]) < LEAST_REACHED:
        raise Difference(f"{target}, slice {number}: {reached[-1] if reached else 0} edges reached; what it is about is not instrumented")
    return {"runs": int(runs[-1]), "reached": int(reached[-1]), "cpu_s": round(used.ru_utime + used.ru_stime, 1)}


def _digest(target: Target) -> str:
    """Of what it is about, and of what asks it."""
    modules = (f"src/hasten/{module.replace('.', '/')}.py" for module in target.of)
    return digest_of(ROOT / name for name in (*modules, "tests/soak/targets.py", "tests/soak/guided.py"))


def _fuzz_one(target: str, ledger: Ledger, seconds: int, seed: int, ended: threading.Event) -> str:
    """Slices until their processor time is ``seconds``, or ``ended`` is set; what to tell of them. Raises Difference."""
    digest = _digest(TARGETS[target])
    runs = reached = number = 0
    used = 0.0
    try:
        while used < seconds and not ended.is_set():
            key = ("fuzz", digest, target, number, seed)
            kept = ledger.get(*key)
            if kept is None:
                kept = run_slice(target, number, max(1, min(SLICE_S, round(seconds - used))), seed)
                ledger.note(*key, value=kept)
            number, runs, reached, used = number + 1, runs + kept["runs"], max(reached, kept["reached"]), used + max(kept["cpu_s"], 0.1)
    except BaseException:
        ended.set()
        raise
    return f"fuzz, {target:12}{used:>6,.0f} s of processor time{runs:>12,} inputs{reached:>8,} edges reached, 0 crashes, 0 hangs"


def fuzz(ledger: Ledger, _digest_of_all: str, seconds: int, seed: int) -> None:
    """Every target for so many seconds of processor time, two targets beside each other where there are two cores; raises Difference. A
    target's slices count until what it is about changes."""
    ended = threading.Event()
    with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:
        try:
            for told in pool.map(lambda target: _fuzz_one(target, ledger, seconds, seed, ended), TARGETS):
                print(told, flush=True)
        finally:
            ended.set()
