"""A server to measure, and requests to it over plain sockets: a client that takes little of the processor from what is measured."""

import asyncio
import contextlib
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

STARTS_WITHIN_S = 300.0


class Server:
    """`hasten serve`, ready. ``lines`` are those of its log, as objects."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "hasten.cli", "serve", *arguments, "--port", "0", "--log-json"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        found = self.event(r"listening on (http://\S+),")
        self.place = urlsplit(found)
        self.event("^ready after")

    def _read(self) -> None:
        for line in self.process.stderr or ():
            try:
                self.lines.put(json.loads(line))
            except ValueError:
                sys.stderr.write(line)
        self.lines.put(None)

    def event(self, pattern: str) -> str:
        """Wait for an event in the log; what its group holds."""
        while True:
            said = self.line().get("event", "")
            if found := re.search(pattern, said):
                return found[1] if found.groups() else said

    def line(self) -> dict[str, Any]:
        """The next line of the log. Exits where there is none."""
        try:
            line = self.lines.get(timeout=STARTS_WITHIN_S)
        except queue.Empty:
            line = None
        if line is None:
            raise SystemExit("the server ended, or says nothing any more")
        return line

    def request(self) -> dict[str, Any]:
        """The log's next line of a request that was answered."""
        while "route" not in (line := self.line()):
            pass
        return line

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """One whole completion."""
        request = urllib.request.Request(
            f"{self.place.geturl()}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    async def stream(self, body: dict[str, Any]) -> None:
        """One streamed completion, read and thrown away. Exits where it fails."""
        reader, writer = await asyncio.open_connection(self.place.hostname, self.place.port)
        data = json.dumps({**body, "stream": True}).encode()
        head = ("POST /v1/completions HTTP/1.1", "host: localhost", "connection: close", "content-type: application/json")
        writer.write("\r\n".join([*head, f"content-length: {len(data)}\r\n\r\n"]).encode() + data)
        said = await reader.read(-1)
        writer.close()
        if not said.startswith(b"HTTP/1.1 200") or b"[DONE]" not in said[-40:]:
            raise SystemExit(f"a stream failed: {said[-300:]!r}")


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """A server that is ready, ended afterwards."""
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            server.process.kill()
