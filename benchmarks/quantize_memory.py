"""How much memory `hasten quantize` takes for a model of a public shape that lies on disk, over the bytes of its checkpoint.

    python -m benchmarks.quantize_memory random:tinyllama-1.1b

Two peaks are told: of all resident pages of the process and those it begins, pages of mapped files among them (VmHWM), and of anonymous
memory alone, which the system cannot have back. With --slice the command is killed after so many seconds; called again, it goes on, and
peaks are over all slices."""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.ledger import ROOT, Ledger, source_digest

EVERY_S = 0.02
ESTIMATE = re.compile(rb"about ([0-9.]+) GiB of memory")


def written(shape: str, work: Path) -> Path:
    """The checkpoint of a model, saved once."""
    from hasten.checkpoint import load, save

    directory = work / shape.replace(":", "-")
    if not (directory / "config.json").is_file():
        save(load(shape), directory)
    return directory


def family(pid: int) -> list[int]:
    """A process and those it began, as they are now."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of the family: for one process its own high-water mark, for several what they hold together now."""
    pids, resident, anonymous = family(pid), 0, 0
    for each in pids:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
        resident += int(lines["VmHWM" if len(pids) == 1 else "VmRSS"].split()[0]) << 10
        anonymous += int(lines["RssAnon"].split()[0]) << 10
    return resident, anonymous


def run_slice(command: list[str], work: Path, seconds: float | None) -> dict:
    """Run until it ends or is killed; peaks, seconds, when each block was done, what it printed. Raises SystemExit where it fails."""
    with (work / "stderr.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    began, resident, anonymous, blocks = time.monotonic(), 0, 0, dict[str, float]()
    before = {file.name for file in work.glob("steps/*/block-*")}
    while process.poll() is None:
        try:
            now = memory(process.pid)
            resident, anonymous = max(resident, now[0]), max(anonymous, now[1])
        except (OSError, KeyError):  # ended meanwhile
            continue
        since = time.monotonic() - began
        for file in work.glob("steps/*/block-*.safetensors"):
            if file.name not in before:
                blocks.setdefault(file.name, round(since, 1))
        if seconds is not None and since > seconds:
            process.kill()
        time.sleep(EVERY_S)
    said, errors = process.stdout.read(), (work / "stderr.txt").read_bytes()
    if process.returncode not in {0, -9}:
        raise SystemExit(errors.decode(errors="replace")[-500:])
    estimate = ESTIMATE.search(errors)
    return {
        "resident": resident, "anonymous": anonymous, "seconds": time.monotonic() - began, "blocks": blocks,
        "estimate_gib": float(estimate.group(1)) if estimate else None, "facts": json.loads(said) if process.returncode == 0 else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="random:SHAPE")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--slice", type=float, help="seconds after which the run is killed, to be gone on with by the next call")
    parser.add_argument("--work", type=Path, default=ROOT / ".evidence" / "quantize_memory", help="where it all lies; 5 GB for 1.1 B")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    checkpoint, out = written(given.model, given.work), given.work / "out"
    ledger = Ledger(given.work / "ledger.jsonl")
    key = (given.model, given.method, given.samples, given.sequence, source_digest())
    slices = (ledger.get(*key) or {"slices": []})["slices"]
    if not slices or slices[-1]["facts"]:  # from the beginning
        slices = []
        for left in (out, given.work / "steps"):
            shutil.rmtree(left, ignore_errors=True)
    command = [
        sys.executable, "-m", "hasten.cli", "quantize", str(checkpoint), str(out), "--method", given.method,
        "--samples", str(given.samples), "--sequence", str(given.sequence), "--work", str(given.work / "steps"), "--json",
    ]  # fmt: skip
    slices.append(run_slice(command, given.work, given.slice))
    ledger.note(*key, value={"slices": slices})
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    peaks = {name: max(each[name] for each in slices) for name in ("resident", "anonymous")}
    steps = [later - earlier for each in slices for earlier, later in itertools.pairwise(each["blocks"].values())]
    print(json.dumps({
        "done": bool(slices[-1]["facts"]), "checkpoint_bytes": size, "peak_resident_bytes": peaks["resident"],
        "peak_anonymous_bytes": peaks["anonymous"], "resident_over_checkpoint": peaks["resident"] / size,
        "anonymous_over_checkpoint": peaks["anonymous"] / size, "estimate_bytes": round((slices[0]["estimate_gib"] or 0) * 2**30),
        "seconds": sum(each["seconds"] for each in slices), "slices": len(slices), "blocks": sum(len(each["blocks"]) for each in slices),
        "seconds_a_block": sorted(steps)[len(steps) // 2] if steps else None,
        "slice_peaks": [[each["resident"], each["anonymous"]] for each in slices],
        "bytes": slices[-1]["facts"]["bytes"] if slices[-1]["facts"] else None,
    }, indent=2))  # fmt: skip
    return 0 if slices[-1]["facts"] else 3


if __name__ == "__main__":
    sys.exit(main())
