"""`make evidence`: runs what the measured tables ask for, a line after the other, and prints them as Markdown.

What ran is kept in .evidence/ledger.jsonl with the machine, the commit and the date, and is not run again until what runs changes. A line
that this machine cannot show is marked so, never as met."""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.evidence.figures import Passes
from benchmarks.evidence.lines import LINES, Line
from benchmarks.ledger import ROOT, Ledger, source_digest
from hasten import _native
from hasten.base import hardware

MODEL = "random:tinyllama-1.1b"
"""What the tables are about; figures of another model are trials of the runner and meet nothing."""


class Failed(Exception):
    """A command that ended badly, in one line."""


class Evidence:
    """Runs lines on this machine, and tells of them."""

    def __init__(self, ledger: Ledger, model: str, places: dict[str, str], output: Path):
        machine = hardware.detect()
        self._refusals = _native.isa_refusals()
        self.machine = {
            "cpu": machine.cpu.brand, "isa": _native.isa_level(), "threads": machine.cpu.cores, "memory_bytes": machine.memory.total,
        }  # fmt: skip
        self._ledger, self.model, self._output = ledger, model, output
        self._places = {"model": model, "shape": model.removeprefix("random:"), "output": str(output), **places}
        self._failures: dict[str, str] = {}
        self._digests: dict[str, str] = {}

    def missing(self, line: Line) -> str:
        """What this machine, or who called, does not have for the line; empty where it can run."""
        if line.needs and (why := self._refusals[line.needs]):
            return f"not on this machine: {line.needs}: {why}"
        if any("{environments}" in command for command in line.commands) and "environments" not in self._places:
            return "not measured: needs --peers"
        return ""

    def commands(self, line: Line) -> list[str]:
        """Its commands with names filled in; those of peers as they stand where nobody said where they live."""
        shown = {"environments": "DIR", "work": "DIR"} | self._places
        return [command.format_map(shown) for command in line.commands]

    def run(self, line: Line) -> None:
        """Run what of the line has not run yet, its commands in turn, every second round backwards."""
        commands = self.commands(line)
        for number in range(line.rounds):
            for command in commands if number % 2 == 0 else reversed(commands):
                if command in self._failures:
                    raise Failed(self._failures[command])
                if self._kept(command, number) is None:
                    self._run(command, number)

    def verdict(self, line: Line) -> str:
        """What was measured, and whether it is what was asked."""
        if why := self.missing(line):
            return why
        commands = self.commands(line)
        if failed := [self._failures[command] for command in commands if command in self._failures]:
            return f"failed: {failed[0]}"
        kept = [[self._kept(command, number) for command in commands] for number in range(line.rounds)]
        if any(each is None for one in kept for each in one):
            return "not measured yet"
        try:
            figure = line.figure.of([[each["rows"] for each in one] for one in kept])
        except (LookupError, ValueError, TypeError, ZeroDivisionError) as error:
            return f"failed: {error}"
        shown = "passes" if isinstance(line.figure, Passes) else f"{figure:.4g}{line.unit}"
        if self.model != MODEL and "{model}" in "".join(line.commands):
            return f"{shown} (a trial with {self.model})"
        return shown if line.asked is None else f"{shown}, met" if line.asked.holds(figure) else f"**{shown}, missed**"

    def _key(self, command: str, number: int) -> tuple:
        if command not in self._digests:
            words = shlex.split(command)
            files = [ROOT / word for word in words if (ROOT / word).is_file()]
            files += [ROOT / word.replace(".", "/") for word in words if (ROOT / word.replace(".", "/") / "__main__.py").is_file()]
            self._digests[command] = source_digest(*files)
        machine = self.machine
        return "run", self._digests[command], machine["cpu"], machine["isa"], machine["threads"], command, number

    def _kept(self, command: str, number: int) -> dict | None:
        return self._ledger.get(*self._key(command, number))

    def _run(self, command: str, number: int) -> None:
        print(f"  {command} …", end="", file=sys.stderr, flush=True)
        (ROOT / self._output).unlink(missing_ok=True)
        began = time.perf_counter()
        done = subprocess.run(argv(command), cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        print(f" {seconds:.1f} s", file=sys.stderr, flush=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            self._failures[command] = f"exit {done.returncode}" + (f", {said[-1][:200]}" if said else "")
            raise Failed(self._failures[command])
        text = (ROOT / self._output).read_text() if (ROOT / self._output).is_file() else done.stdout
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        value = {"rows": rows_of(text), "seconds": round(seconds, 2), "machine": self.machine, "commit": commit(), "date": now}
        self._ledger.note(*self._key(command, number), value=value)


def argv(command: str) -> list[str]:
    """A command of the tables as a process, by this interpreter."""
    program, *rest = shlex.split(command)
    python = [sys.executable]
    ways = {"python": python, "hasten": [*python, "-m", "hasten.cli"], "pytest": [*python, "-m", "pytest"]}
    return [*ways.get(program, [program]), *rest]


def rows_of(text: str) -> list[dict]:
    """JSON objects that follow each other; none in what is not JSON."""
    decoder, rows, at = json.JSONDecoder(), [], 0
    while (at := at + len(text[at:]) - len(text[at:].lstrip())) < len(text):
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError:
            return []
        rows.append(row)
    return [row for row in rows if isinstance(row, dict)]


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it; empty outside a checkout."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def table(evidence: Evidence, lines: list[Line]) -> str:
    """The lines as Markdown."""
    rows = [("check", "asked", "measured", "command"), ("---",) * 4]
    for line in lines:
        asked = "–" if line.asked is None else "passes" if isinstance(line.figure, Passes) else f"{line.asked}{line.unit}"
        command = " in turn with ".join(f"`{each}`" for each in evidence.commands(line))
        rows.append((line.check, asked, evidence.verdict(line), command))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="lines whose check or table holds one of these")
    parser.add_argument("--show", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--model", default=MODEL, help="another model, to try the runner; its figures meet nothing")
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="where peers and their checkpoints are made; without it they are left out"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".evidence", help="where what ran is kept")
    given = parser.parse_args()
    lines = [line for line in LINES if not given.only or any(text == line.table or text in line.check for text in given.only)]
    if not lines:
        parser.error(f"no line holds {' or '.join(map(repr, given.only))}")
    places = {"environments": str(given.peers / "environments"), "work": str(given.peers / "work")} if given.peers else {}
    output = Path(os.path.relpath(given.folder / "output.json", ROOT))  # commands run there, and tables name it
    evidence = Evidence(Ledger(given.folder / "ledger.jsonl"), given.model, places, output)
    failed = 0
    for number, line in enumerate(lines if not given.show else [], 1):
        print(f"{number} of {len(lines)}: {line.check}", file=sys.stderr, flush=True)
        if not evidence.missing(line):
            try:
                evidence.run(line)
            except Failed as error:
                failed += 1
                print(f"  {error}", file=sys.stderr, flush=True)
        print(f"  {evidence.verdict(line)}", file=sys.stderr, flush=True)
    machine = evidence.machine
    print(f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads; {given.model} unless a line says otherwise\n")
    print(table(evidence, lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
