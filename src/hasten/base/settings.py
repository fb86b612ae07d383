"""What a user sets through the environment: where hasten keeps files of its own, and how large they may grow."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from hasten.base.errors import ConfigError, one_line

CACHE_LIMIT = 20_000_000_000
"""Bytes of packed weights kept unless HASTEN_CACHE_SIZE says otherwise."""

_UNITS: Mapping[str, int] = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def cache_directory(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path | None:
    """HASTEN_CACHE, or `hasten` where the platform keeps what can be made anew; None for a user without a home."""
    if given := environment.get("HASTEN_CACHE"):
        return Path(given).absolute()
    try:
        if platform == "win32":
            return Path(environment.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "hasten" / "Cache"
        if platform == "darwin":
            return Path.home() / "Library" / "Caches" / "hasten"
        xdg = Path(environment.get("XDG_CACHE_HOME", ""))  # one that is relative is to be ignored
        return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "hasten"
    except RuntimeError:
        return None


def cache_limit(environment: Mapping[str, str] = os.environ) -> int:
    """HASTEN_CACHE_SIZE in bytes; 0 keeps nothing. Raises ConfigError for what is no size."""
    given = environment.get("HASTEN_CACHE_SIZE", "").strip()
    if not given:
        return CACHE_LIMIT
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)", given, re.IGNORECASE | re.ASCII)
    if found is None or found[2].upper() not in _UNITS:
        raise ConfigError(
            f"HASTEN_CACHE_SIZE is {one_line(given)}; a size such as 20GB, 512MiB or a number of bytes is needed, or 0 for none"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])
