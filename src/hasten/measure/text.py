"""Text to measure on: files, folders, or the part of the interpreter's standard library that no bundled model was trained on."""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
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

PASSED_OVER = frozenset(["node_modules", "__pycache__"])
"""Folders that hold nobody's own text; hidden ones are passed over too."""


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order. ``sha256`` is over their bytes laid end to end, so that figures can be compared.

    ``skipped`` counts files of a folder that are called text and are not UTF-8."""

    name: str
    documents: tuple[str, ...]
    sha256: str
    skipped: int = 0


def read_corpus(path: Path) -> Corpus:
    """A text file, or every text file below a folder in sorted order, hidden folders and `PASSED_OVER` left out.

    In a folder, files that are not UTF-8 are skipped and counted. Raises UserError naming what is not there, cannot be read, or, named
    on its own, is not UTF-8."""
    try:
        if path.is_dir():
            files = sorted(_text_files(path))
            if not files:
                raise UserError(f"{path} holds no text files; looked for {', '.join(sorted(TEXT_SUFFIXES))}")
            corpus = _corpus(str(path), files, skip=True)
            if not corpus.documents:
                raise UserError(f"{path} holds {corpus.skipped} text files and none is UTF-8, the first {files[0].name}; convert them")
            return corpus
        if path.is_file():
            return _corpus(str(path), [path])
    except OSError as error:
        raise _unreadable(path, error) from None
    raise UserError(f"no file or folder {path}; name text that is there, or leave it out for the standard library")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or path} cannot be read: {error.strerror or error}; give text that can be, or leave it out")


def _text_files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in PASSED_OVER]
        for name in names:
            path = Path(place, name)
            if path.suffix in TEXT_SUFFIXES and path.is_file():
                yield path


def held_out(stdlib: Path | None = None) -> Corpus:
    """The held-out set of the bundled models' card: one in 25 files of the standard library, picked by the hash of its path.

    Which bytes that gives depends on the Python version; compare ``sha256`` with the card's before comparing figures."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    chosen = [path for path, picked in _sources(root) if picked]
    if not chosen:
        raise UserError(f"the standard library at {root} holds no Python sources, so there is no held-out set; name a file or folder")
    return _corpus("held-out standard library", chosen)


def standard_library(stdlib: Path | None = None) -> Corpus:
    """What the held-out set is picked from, without it: the standard library's sources of the same sizes, no tests among them."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    chosen = [path for path, picked in _sources(root) if not picked]
    if not chosen:
        raise UserError(f"the standard library at {root} holds no Python sources; name a file or folder")
    return _corpus("standard library, less the held-out set", chosen, skip=True)


def _sources(root: Path) -> Iterator[tuple[Path, bool]]:
    """Sources in sorted order, and whether each is of the held-out set."""
    found: list[str] = []
    for place, folders, names in os.walk(root):
        below = os.path.relpath(place, root)
        prefix = "" if below == os.curdir else Path(below).as_posix() + "/"
        folders[:] = [name for name in folders if not _passed_over(prefix + name)]
        found += [prefix + name for name in names if name.endswith(".py") and not _passed_over(prefix + name)]
    for relative in sorted(found):
        path = root / relative
        if 300 <= path.stat().st_size <= 400_000:
            yield path, int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 25 == 0


def _passed_over(relative: str) -> bool:
    return "site-packages" in relative or "test" in relative or relative.startswith("idlelib")


def _corpus(name: str, files: list[Path], *, skip: bool = False) -> Corpus:
    digest, documents = hashlib.sha256(), []
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise _unreadable(file, error) from None
        try:
            documents.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            if skip:
                continue
            raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it or leave it out") from None
        digest.update(data)
    return Corpus(name, tuple(documents), digest.hexdigest(), len(files) - len(documents))
