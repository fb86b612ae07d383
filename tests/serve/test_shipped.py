"""What is shipped beside the server: the systemd unit, the container file, the notes on running it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import ROOT, run

UNIT = (ROOT / "deploy" / "hasten.service").read_text()
CONTAINER = (ROOT / "deploy" / "Containerfile").read_text()
NOTES = (ROOT / "docs" / "serving.md").read_text()
HASTEN = Path(sys.executable).parent / "hasten"


def options() -> set[str]:
    """What `hasten serve` knows."""
    return set(re.findall(r"--[a-z][a-z-]+", run("serve", "--help", env={"COLUMNS": "400", "TERM": "dumb"}).out))


def test_options_that_are_spoken_of_are_there():
    known = options() | {"--file", "--tag", "--rm", "--publish", "--volume", "--stop-timeout", "--now"}  # podman, systemctl
    assert {"--api-key-file", "--metrics-prefix", "--read-rate", "--grace"} <= known
    for text in (
        UNIT,
        NOTES,
        "".join(re.findall(r"^(?:ENTRYPOINT|#).*", CONTAINER, re.MULTILINE)),
        (ROOT / "docs" / "metrics.md").read_text(),
    ):
        asked = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        assert asked
        assert asked <= known, asked - known


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_unit_is_valid_and_hardened(tmp_path):
    unit = tmp_path / "hasten.service"
    unit.write_text(UNIT.replace("/opt/hasten/bin/hasten", str(HASTEN)))
    said = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KilMode=mixed"))
    said = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "KilMode" in said.stderr  # it does look
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(tmp_path / "hasten.service")]
    scored = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" not in scored.stderr:  # from systemd 250 on
        assert scored.returncode == 0, scored.stdout[-300:]


def test_the_unit_gives_streams_their_time():
    grace = int(re.search(r"--grace (\d+)", UNIT)[1])
    assert int(re.search(r"TimeoutStopSec=(\d+)", UNIT)[1]) > grace + 5
    assert "Type=notify" in UNIT
    assert "RestartPreventExitStatus=2" in UNIT


def test_the_container_copies_what_there_is_and_is_not_root():
    copied = [path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", CONTAINER, re.MULTILINE) for path in line.split()]
    assert {"src", "native", "pyproject.toml"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
    instructions = [line.split()[0] for line in CONTAINER.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert set(instructions) <= {
        "FROM",
        "RUN",
        "WORKDIR",
        "COPY",
        "ENV",
        "USER",
        "VOLUME",
        "EXPOSE",
        "HEALTHCHECK",
        "STOPSIGNAL",
        "ENTRYPOINT",
    }
    assert instructions.index("ENTRYPOINT") > instructions.index("USER")
    assert re.search(r"^USER [1-9]", CONTAINER, re.MULTILINE)
    assert "torch" not in re.sub(r"^#.*", "", CONTAINER, flags=re.MULTILINE)
