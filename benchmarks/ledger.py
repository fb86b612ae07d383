"""A file of JSON lines in which long work notes each finished piece, so that a run that was killed goes on where it was."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def source_digest(*more: Path) -> str:
    """16 hex digits of what runs: the package's Python, the extension as built, and the files ``more`` (folders whole)."""
    import hasten
    from hasten import _native

    files = {Path(_native.__file__)}
    for root in (Path(hasten.__file__).parent, *more):
        files |= set(root.rglob("*.py")) if root.is_dir() else {root}
    return digest_of(files)


def digest_of(files: Iterable[Path]) -> str:
    """16 hex digits of what ``files`` hold and how they are called."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        digest.update(f"{name}\0".encode() + hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


class Ledger:
    """Records under keys of JSON values, in the file ``path``; the last one under a key counts. A line cut short is no record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, dict[str, Any]] = {}
        text = path.read_text() if path.is_file() else ""
        self._open_line = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self._records[_name(record["key"])] = record["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, *key: Any) -> dict[str, Any] | None:
        """What was noted under ``key``, or None."""
        return self._records.get(_name(list(key)))

    def note(self, *key: Any, value: dict[str, Any]) -> None:
        """Write ``value`` under ``key``; it is on disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(("\n" if self._open_line else "") + json.dumps({"key": list(key), "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._open_line = False
        self._records[_name(list(key))] = value


def _name(key: Any) -> str:
    return json.dumps(key, sort_keys=True)
