"""Text to measure on: files, folders, or the part of the interpreter's standard library that no bundled model was trained on."""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

from hasten.base.errors import UserError

TEXT_SUFFIXES = frozenset([
    ".c",
    ".cc",
    ".cpp",
    ".css",
    ".go",
    ".h",
    ".hpp",
    ".html",
    ".java",
    ".js",
    ".json",
    ".jsonl",
    ".md",
    ".py",
    ".rs",
    ".rst",
    ".sh",
    ".sql",
    ".toml",
    ".ts",
    ".txt",
    ".yaml",
    ".yml",
])
"""What counts as text in a folder; a file named on its own is read whatever its suffix."""


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order. ``sha256`` is over their bytes laid end to end, so that figures can be compared."""

    name: str
    documents: tuple[str, ...]
    sha256: str


def read_corpus(path: Path) -> Corpus:
    """A text file, or every text file below a folder in sorted order. Raises UserError naming what is not there or not UTF-8."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no text files; looked for {', '.join(sorted(TEXT_SUFFIXES))}")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"no file or folder {path}; give text to evaluate on, or leave it out for the held-out set")
    return _corpus(str(path), files)


def held_out(stdlib: Path | None = None) -> Corpus:
    """The held-out set of the bundled models' card: one in 25 files of the standard library, picked by the hash of its path.

    Which bytes that gives depends on the Python version; compare ``sha256`` with the card's before comparing figures."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    chosen = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root).as_posix()
        excluded = "site-packages" in relative or "test" in relative or relative.startswith("idlelib")
        picked = int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 25 == 0
        if not excluded and picked and 300 <= path.stat().st_size <= 400_000:
            chosen.append(path)
    if not chosen:
        raise UserError(f"the standard library at {root} holds no Python sources, so there is no held-out set; name a file or folder")
    return _corpus("held-out standard library", chosen)


def _corpus(name: str, files: list[Path]) -> Corpus:
    digest, documents = hashlib.sha256(), []
    for file in files:
        data = file.read_bytes()
        digest.update(data)
        try:
            documents.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it or leave it out") from None
    return Corpus(name, tuple(documents), digest.hexdigest())
