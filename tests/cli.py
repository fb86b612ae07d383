"""The command line under test: as a process of its own, measured, or inside this one, quick."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import hasten.cli

ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "/"), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float = 0.0
    peak_bytes: int = 0


def run(
    *arguments: object, stdin: str = "", env: Mapping[str, str] | None = None, options: Sequence[str] = (), timeout: float = 120.0
) -> Outcome:
    """``hasten ARGUMENTS`` as a process, with its peak memory. ``options`` go to the interpreter."""
    process = start(*arguments, env=env, options=options)
    began = time.monotonic()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(stdin.encode())
        process.stdin.close()
    out, err = io.BytesIO(), io.BytesIO()
    # What the commands of these tests print fits the pipes' buffers or is read to its end here; stderr is a line.
    out.write(process.stdout.read())
    err.write(process.stderr.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    assert seconds < timeout, f"{arguments} took {seconds:.0f} s"
    process.stdout.close()
    process.stderr.close()
    return Outcome(process.returncode, out.getvalue().decode(), err.getvalue().decode(), seconds, usage.ru_maxrss * 1024)


def start(*arguments: object, env: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> subprocess.Popen:
    """``hasten ARGUMENTS`` as a running process with pipes."""
    command = [sys.executable, *options, "-m", "hasten.cli", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={**ENVIRONMENT, **(env or {})})


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
