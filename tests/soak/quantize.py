"""`hasten quantize` killed at a random point and gone on with: it writes what a run that nobody killed does, to the byte, and does
nothing twice."""

import dataclasses
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.soak.determinism import Difference
from tests.soak.watch import require

SAMPLES, SEQUENCE, POINTS = 16, 256, 10
TRIES = 5
"""A run that is over before its moment comes is begun anew, so often at most, with an earlier moment."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """What a run that nobody killed wrote, by file, and how long it took."""

    digests: Mapping[str, str]
    seconds: float


class Runs:
    """Runs below ``folder``, all with the same options."""

    def __init__(self, folder: Path, samples: int = SAMPLES, sequence: int = SEQUENCE, *more: str) -> None:
        self._folder, self._options = folder, ("--samples", str(samples), "--sequence", str(sequence), *more)

    def begin(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        """A process that quantizes code-8m into ``name``."""
        command = [
            sys.executable, "-m", "hasten.cli", "quantize", "code-8m", str(self.out(name)), "--method", "gptq",
            "--gate-tokens", "2048", "--no-speed", *self._options, "--work", str(self.work(name)), "--json", *more,
        ]  # fmt: skip
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def out(self, name: str) -> Path:
        return self._folder / name

    def work(self, name: str) -> Path:
        return self._folder / f"{name}-work"

    def blocks(self, name: str) -> dict[Path, tuple[int, int]]:
        """Finished blocks, each file with what changes when it is written again."""
        found = {}
        try:
            for file in self.work(name).glob("*/block-*.safetensors"):
                found[file] = (file.stat().st_ino, file.stat().st_mtime_ns)
        except FileNotFoundError:  # the run is over, and clears away
            return {}
        return found

    def whole(self) -> Whole:
        """One that nobody kills. Raises Difference where it fails."""
        began = time.monotonic()
        finish(self.begin("whole"))
        return Whole(digests(self.out("whole")), time.monotonic() - began)

    def cut(self, whole: Whole, number: int, points: int, seed: int) -> dict:
        """Kill one in the ``number``-th of ``points`` equal parts of its time, at a random moment of it, and go on. Raises Difference."""
        name, moment = f"cut-{number}", (number + random.Random(f"{seed} {number}").random()) / points * whole.seconds
        for _ in range(TRIES):
            process = self.begin(name)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode == -signal.SIGKILL:
                break
            require(process.returncode == 0, f"a run ended with {process.returncode}")
            for file in self.out(name).iterdir():
                file.unlink()
            moment *= 0.9
        else:
            raise Difference(f"{TRIES} runs were over before they were to be killed")
        before = self.blocks(name)
        kept = self.out(name).is_dir()
        began = time.monotonic()
        process = self.begin(name, *(["--overwrite"] if kept else []))
        while process.poll() is None:  # what it prints fits into the pipes
            again = [file.name for file, now in self.blocks(name).items() if before.get(file, now) != now]
            require(not again, f"{', '.join(again)} had been finished and was made again")
            time.sleep(0.01)
        finish(process)
        self.require_same(name, whole)
        return {"killed_s": round(moment, 2), "of_s": round(whole.seconds, 2), "blocks": len(before), "resumed_s": time.monotonic() - began}

    def require_same(self, name: str, whole: Whole) -> None:
        """Raise Difference where ``name`` is not what nobody killed, or anything else was left."""
        found = digests(self.out(name))
        different = sorted({file for file in found.keys() | whole.digests.keys() if found.get(file) != whole.digests.get(file)})
        require(not different, f"killed and gone on with, {', '.join(different)} are others")
        left = [file.name for file in self._folder.glob(".*")] + [file.name for file in self._folder.glob("*-work")]
        require(not left, f"{', '.join(left)} were left")


def finish(process: subprocess.Popen[bytes]) -> dict:
    """What it printed. Raises Difference where it failed."""
    out, said = process.communicate()
    require(process.returncode == 0, f"a run ended with {process.returncode}: {said.decode(errors='replace').strip()[-300:]}")
    return json.loads(out)


def digests(directory: Path) -> dict[str, str]:
    """Of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def told(found: dict) -> str:
    """The figures of one point, for people."""
    return (
        f"quantize, killed after {found['killed_s']:.1f} of {found['of_s']:.1f} s with {found['blocks']} of 8 blocks done: "
        f"gone on with for {found['resumed_s']:.1f} s, every byte the same"
    )
