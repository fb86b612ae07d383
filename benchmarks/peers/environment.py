"""An environment of its own for each peer: a venv made by the ordinary package installer, once."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH = (Path(__file__).parents[2] / "constraints.txt").read_text().strip()  # any looser requirement may pull gigabytes of CUDA


def make(directory: Path, name: str, installs: Sequence[Sequence[str]]) -> Path:
    """The interpreter of environment ``name`` below ``directory``, with ``installs`` (the arguments of one `pip` each) done.

    What was installed is noted inside, so that a second call does nothing. Raises CalledProcessError where an installation fails."""
    home = directory / name
    note, wanted = home / "installed.txt", "\n".join(" ".join(arguments) for arguments in installs)
    python = home / "bin" / "python"
    if note.is_file() and note.read_text() == wanted:
        return python
    print(f"installing {name} into {home} …", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    for arguments in installs:
        subprocess.run(
            ["nice", str(python), "-m", "pip", "--quiet", "--no-cache-dir", "--disable-pip-version-check", *arguments],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
    note.write_text(wanted)
    return python
