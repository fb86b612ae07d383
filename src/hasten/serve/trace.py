"""Trace ids as W3C's Trace Context has them: a request's place in somebody else's trace. They are told, never looked up."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

_PARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class Trace:
    """``id`` of the trace, and the span that asked, '' where nobody said."""

    id: str
    parent: str = ""
    sampled: bool = False

    def answer(self, span: str) -> str:
        """What the client is told of its request, which is ``span`` here."""
        return f"00-{self.id}-{span}-{'01' if self.sampled else '00'}"


def trace_in(headers: Sequence[tuple[bytes, bytes]]) -> Trace:
    """The trace that a request says it belongs to; a new one where it says nothing, says it twice, or says nothing valid."""
    said = [value for name, value in headers if name == b"traceparent"]
    if len(said) == 1 and (found := _PARENT.fullmatch(said[0])) is not None:
        version, id, parent, flags, more = found.groups()
        if version != b"00" or more is None:  # versions to come may say more
            return Trace(id.decode(), parent.decode(), bool(int(flags, 16) & 1))
    return Trace(secrets.token_hex(16))
