"""API keys: who may ask, and as which tenant."""

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from hasten.base.errors import ConfigError

LONGEST = 4096
"""Characters of a key."""


class Keys:
    """Keys that are accepted. Only their digests are kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, given: bytes) -> str | None:
        """The tenant whose key this is, None for nobody's. Takes as long whatever is given and whichever it is."""
        digest = hashlib.sha256(given[: LONGEST + 1]).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known.hex()[:16]
        return found


def read_keys(path: Path) -> Keys:
    """One key a line; blank lines and those that begin with # are none. Raises ConfigError for a file without any."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one a line")
    for number, key in enumerate(keys, 1):
        if len(key) > LONGEST or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"--api-key-file {path}: key {number} is longer than {LONGEST} characters, or not of visible ASCII characters"
            )
    return Keys(keys)


def key_in(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The key that a request shows, as OpenAI's clients do or as Anthropic's; empty without one."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, rest = value.partition(b" ")
            return rest.strip() if scheme.lower() == b"bearer" else b""
        if name == b"x-api-key":
            return value.strip()
    return b""
