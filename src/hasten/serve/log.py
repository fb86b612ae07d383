"""The server's log: a line a person can read for each request and event, or JSON. Written by a thread, so that a slow reader of it never
holds a request up."""

import json
import queue
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, TextIO

from hasten.serve.trace import Trace

MOST = 10_000
"""Lines that wait to be written; what is more is dropped, and counted."""


@dataclass(slots=True)
class Note:
    """What is known of one HTTP request, filled in on its way."""

    id: str
    method: str
    route: str
    began: float
    status: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    queued_s: float = 0.0
    """How long it waited for a slot, of the time to its first token."""
    trace: Trace | None = None
    tenant: str = ""
    cached: str = ""
    """How the response cache answered it, if it did."""
    said: str = ""
    """What was wrong."""


class Log:
    """Lines to ``file``; ``as_json`` for programs."""

    def __init__(self, file: TextIO | None = None, as_json: bool = False) -> None:
        self._file, self._json = file or sys.stderr, as_json
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.dropped = 0
        """Lines that were not written."""
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def event(self, text: str) -> None:
        """Something that happened to the server."""
        self._put({"event": text}, text)

    def request(self, note: Note, seconds: float) -> None:
        """A request that has ended."""
        fields: dict[str, Any] = {"id": note.id, "method": note.method, "route": note.route, "status": note.status, "seconds": seconds}
        words = [note.id, note.method, note.route, str(note.status)]
        if note.prompt_tokens:
            words.append(f"{note.prompt_tokens} → {note.output_tokens} tokens")
            fields |= {"prompt_tokens": note.prompt_tokens, "output_tokens": note.output_tokens}
        if note.first_token_s is not None:
            words.append(f"queued {note.queued_s:.3f} s  first {note.first_token_s:.3f} s")
            fields |= {"queue_seconds": note.queued_s, "first_token_seconds": note.first_token_s}
        words.append(f"total {seconds:.3f} s")
        if note.cached:
            words.append(f"from the response cache ({note.cached})")
            fields["cached"] = note.cached
        if note.said:
            words.append(_plain(note.said))
            fields["error"] = note.said
        if note.tenant:
            fields["tenant"] = note.tenant
        if note.trace is not None:
            words.append(f"trace {note.trace.id}")
            fields |= {"trace_id": note.trace.id, "span_id": note.id}
            if note.trace.parent:
                fields["parent_span_id"] = note.trace.parent
        self._put(fields, "  ".join(words))

    def close(self) -> None:
        """Write what is there."""
        self._lines.put(None)
        self._thread.join(2.0)

    def _put(self, fields: dict[str, Any], words: str) -> None:
        if self._lines.qsize() >= MOST:
            self.dropped += 1
            return
        at = time.time()
        stamp = time.strftime("%H:%M:%S", time.localtime(at))
        self._lines.put(json.dumps({"time": round(at, 3), **fields}) if self._json else f"hasten {stamp}  {_plain(words)}")

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except (OSError, ValueError):
                return  # nobody reads it any more


def _plain(text: str) -> str:
    """Strangers' text, unable to forge lines or to command a terminal."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[:400])
