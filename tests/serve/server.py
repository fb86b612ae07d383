"""A real server for tests: `hasten serve` as a process, on a port of its own."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.cli import start

STARTS_WITHIN_S = 60.0


class Server:
    """A running server; its log is read as it comes, so that it never waits for a reader."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None) -> None:
        self.process = start("serve", *arguments, "--port", "0", env=env)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self.until(lambda: self._found(r"listening on (http://\S+),"))

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.decode().rstrip("\n"))

    def _found(self, pattern: str) -> str | None:
        return next((found[1] for line in list(self.lines) if (found := re.search(pattern, line))), None)

    def until(self, condition, seconds: float = STARTS_WITHIN_S):
        """What ``condition`` gives once it gives something."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"not within {seconds} s: {self.lines[-20:]}"
            assert self.process.poll() is None, self.lines[-20:]
            time.sleep(0.02)
        return value

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        return False

    def post(self, path: str, body: object, **settings) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **settings)

    def engine_pid(self) -> int:
        """Of the engine's process: the child that is not a grammar's."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(one) for one in children if b"engine_process" in Path(f"/proc/{one}/cmdline").read_bytes()]
        return pid

    def stop(self, seconds: float = 20.0) -> int:
        """Ask it to end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def serving(*arguments: object, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready, ended afterwards however the test went."""
    server = Server(*arguments, env=env)
    try:
        server.until(server.ready)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


def events(text: str) -> list[dict]:
    """What a stream's events hold; the last must be [DONE]."""
    frames = text.split("\n\n")
    assert frames[-1] == ""
    assert frames[-2] == "data: [DONE]"
    assert all(frame.startswith("data: {") for frame in frames[:-2])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def client_of(server: Server, **settings) -> httpx.AsyncClient:
    """One with as many connections as are asked for."""
    return httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None), **settings)


async def read(client: httpx.AsyncClient, body: dict, begun: asyncio.Event | None = None) -> tuple[int, list[dict], float]:
    """A completion's status, the events of its stream, and when its last one came. ``begun`` is set with the first."""
    found = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return answer.status_code, [json.loads(await answer.aread())], time.monotonic()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
                if begun is not None:
                    begun.set()
    return 200, found, time.monotonic()


def cpu_seconds(pid: int) -> float:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
