"""The command line under test: as a process of its own, measured, or inside this one, quick."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hasten.cli

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "/"), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float = 0.0
    peak_bytes: int = 0


# As `python -m hasten.cli`, with the peak memory written to a pipe.
_MEASURED = """
import os, sys
from hasten.cli import main
from tests.cli import peak_bytes
sys.argv[0] = "hasten"
try:
    main()
finally:
    os.write(int(os.environ["HASTEN_TEST_PEAK"]), str(peak_bytes()).encode())
"""


def run(
    *arguments: object, stdin: str = "", env: Mapping[str, str] | None = None, options: Sequence[str] = (), measured: bool = False
) -> Outcome:
    """``hasten ARGUMENTS`` as a process, killed after two minutes. ``options`` go to the interpreter."""
    began = time.monotonic()
    if not measured:
        done = subprocess.run([*_command(options), *map(str, arguments)], env=_environment(env), **_capture(stdin))
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode(), time.monotonic() - began)
    reader, writer = os.pipe()
    try:
        extra = {"HASTEN_TEST_PEAK": str(writer), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *options, "-c", _MEASURED, *map(str, arguments)]
        done = subprocess.run(command, env={**_environment(env), **extra}, pass_fds=[writer], **_capture(stdin))
        seconds = time.monotonic() - began
        os.close(writer)
        with open(reader, closefd=False) as pipe:
            peak = int(pipe.read() or 0)
    finally:
        os.close(reader)
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode(), seconds, peak)


def _heed_interrupts() -> None:
    """Tests started in the background inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """``hasten ARGUMENTS`` as a running process with pipes."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*_command(), *map(str, arguments)], stdin=pipe, stdout=pipe, stderr=pipe, env=_environment(env), preexec_fn=_heed_interrupts
    )


def peak_bytes() -> int:
    """Peak memory of this process. Not from getrusage, which counts what the process was before exec: the tests' own."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    return {**ENVIRONMENT, "HASTEN_CACHE": os.environ["HASTEN_CACHE"], **(more or {})}


def _command(options: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *options, "-m", "hasten.cli"]


def _capture(stdin: str) -> dict[str, Any]:
    return {"input": stdin.encode(), "capture_output": True, "timeout": 120, "check": False}


def main(monkeypatch, capsys, *arguments: object, stdin: str = "") -> Outcome:
    """``hasten ARGUMENTS`` inside this process."""
    monkeypatch.setattr(sys, "argv", ["hasten", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    code = 0
    try:
        hasten.cli.main()
    except SystemExit as exit:
        code = exit.code or 0
    out, err = capsys.readouterr()
    return Outcome(code, out, err)


def assert_refused(outcome: Outcome, *fragments: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that says all of ``fragments``."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert outcome.err.startswith("hasten: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.endswith("\n"), outcome.err
    assert len(outcome.err) < 1200, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err, (fragment, outcome.err)
