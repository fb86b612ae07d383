"""The supervisor: begins the engine's process, watches it, and replaces one that died or hangs."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Literal

import msgspec

from hasten.base.errors import UserError
from hasten.engine import SamplingParams
from hasten.serve.engine_totals import EngineTotals
from hasten.serve.heart import READ, Patience, Pulse, read_beats
from hasten.serve.mailbox import EngineGoneError, Mailbox
from hasten.serve.messages import Abort, Begin, Failed, Frames, News, Order, Ready, Report, Stats, Submit, frame

State = Literal["starting", "ready", "down", "failed"]
WATCH_S = 0.5
FIRST_TRIES = 2
"""Starts of a server that was never ready."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """After a death the next start waits ``first_s`` seconds, twice as long after each further one, ``most_s`` at most; after ``tries``
    starts in a row that did not become ready, the server gives up. One that did has started well, however soon it dies."""

    first_s: float = 0.1
    most_s: float = 30.0
    tries: int = 12

    def wait_s(self, deaths: int) -> float:
        """Before the start after so many deaths in a row."""
        return min(self.most_s, self.first_s * 2.0 ** max(0, deaths - 1))


class _Process(asyncio.Protocol):
    """One engine's process and the line to it."""

    def __init__(self, owner: "Supervisor", child: "subprocess.Popen[bytes]", beats: int) -> None:
        self.child, self.beats = child, beats
        self._owner, self._frames = owner, Frames[Report](Report)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for report in self._frames.feed(data):
                self._owner.take(self, report)
        except (UserError, msgspec.DecodeError):
            self.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.lost(self)

    def send(self, order: Order) -> None:
        if self._transport is not None:
            self._transport.write(frame(order))

    def hang_up(self) -> None:
        """End the line, which ends the process as soon as its step has."""
        if self._transport is not None:
            self._transport.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(signal.SIGKILL)  # a stopped process dies of it too


class Supervisor:
    """Keeps one engine's process alive, and hands requests to it. ``told`` hears of what happens to it, a line each; ``gave_up`` is called
    when there will be none any more, with the exit code. Everything here runs in one event loop."""

    def __init__(
        self, begin: Begin, *, told: Callable[[str], None], gave_up: Callable[[int], None], patience: Patience | None = None,
        restarts: Restarts | None = None,
    ) -> None:  # fmt: skip
        self._begin, self._told, self._gave_up = begin, told, gave_up
        self._patience, self._restarts = patience or Patience(), restarts or Restarts()
        self.state: State = "starting"
        self.ready: Ready | None = None
        """What the last engine that became ready said."""
        self.stats = Stats(running=0, waiting=0, cache_usage=0.0, counters={})
        self.totals = EngineTotals()
        self.deaths = 0
        """Of engines, since the server began."""
        self._in_a_row = 0
        self._process: _Process | None = None
        self._pulse = Pulse(self._patience, time.monotonic())
        self._ids = itertools.count(1)
        self._mailboxes: dict[int, Mailbox] = {}
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    # --- for requests

    @property
    def able(self) -> bool:
        """Can a request be answered now?"""
        return self.state == "ready" and self._pulse.well(time.monotonic())

    @property
    def retry_s(self) -> int:
        """After how many seconds to ask again while not `able`."""
        return 1 if self.ready is None else max(1, min(60, round(self.ready.seconds)))

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return None if self._process is None else self._process.child.pid

    @property
    def live(self) -> int:
        """Requests that the engine has."""
        return len(self._mailboxes)

    def submit(self, prompt: list[int], params: SamplingParams, tenant: str, mailbox: Mailbox) -> int:
        """Hand a request to the engine; its number, which its pieces bear. Raises EngineGoneError where there is none."""
        if self._process is None or self.state != "ready":
            raise EngineGoneError
        id = next(self._ids)
        self._mailboxes[id] = mailbox
        self._process.send(Submit(id, prompt, params, tenant))
        return id

    def abort(self, id: int) -> None:
        """Nobody waits for this one any more."""
        if self._mailboxes.pop(id, None) is not None and self._process is not None:
            self._process.send(Abort(id))

    def ended(self, id: int) -> None:
        """All outputs of this one have come."""
        self._mailboxes.pop(id, None)

    def cut_off(self) -> None:
        """End all requests, unfinished."""
        mailboxes, self._mailboxes = self._mailboxes, {}
        for id, mailbox in mailboxes.items():
            if self._process is not None:
                self._process.send(Abort(id))
            mailbox.close()

    # --- the process's life

    async def start(self) -> None:
        """Begin the first process, and to watch."""
        await self._launch()
        self._spawn(self._watch())

    async def stop(self) -> None:
        """End the process; it gets a moment to go by itself."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        if (process := self._process) is not None:
            process.hang_up()
            for _ in range(40):
                if process.child.poll() is not None:
                    return
                await asyncio.sleep(0.05)
            process.kill()
            process.child.wait()

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        beats, pipe = os.pipe()
        os.set_blocking(beats, False)
        command = [sys.executable, "-m", "hasten.serve.engine_process", str(theirs.fileno()), str(pipe), str(os.getpid())]
        # From the main thread: the kernel takes the death of the thread that began a process for that of its parent.
        try:
            child = subprocess.Popen(command, pass_fds=[theirs.fileno(), pipe], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError:
            ours.close()
            os.close(beats)
            raise
        finally:
            theirs.close()
            os.close(pipe)
        loop = asyncio.get_running_loop()
        self._pulse = Pulse(self._patience, time.monotonic())
        process = _Process(self, child, beats)
        self._process = process
        await loop.create_unix_connection(lambda: process, sock=ours)
        loop.add_reader(beats, self._feel, beats)
        self.stats = Stats(running=0, waiting=0, cache_usage=0.0, counters={})
        self.totals.begin()
        process.send(self._begin)

    def take(self, process: _Process, report: Report) -> None:
        """What a process says."""
        if process is not self._process:
            return
        match report:
            case News(pieces, begun):
                mailboxes = self._mailboxes
                for id, waited_s in begun:
                    if (mailbox := mailboxes.get(id)) is not None:
                        mailbox.waited_s.setdefault(id, waited_s)
                for piece in pieces:
                    if (mailbox := mailboxes.get(piece.id)) is not None:  # news of one that was aborted may still be on their way
                        mailbox.put(piece)
            case Stats():
                self.stats = report
                self.totals.take(report.counters, time.monotonic(), report.running + report.waiting > 0)
            case Ready():
                self.state, self.ready = "ready", report
                self._begin = msgspec.structs.replace(self._begin, read_bytes_s=report.read_bytes_s)
                for line in filter(None, (report.notice, report.plan)):
                    self._told(line)
                self._told(f"ready after {report.seconds:.1f} s, on the {report.backend} backend")
            case Failed(reason, mistake):
                self._told(reason)
                if mistake or self.ready is None:
                    self._give_up(2 if mistake else 1)

    def lost(self, process: _Process) -> None:
        """A process ended, or hung up, which comes to the same."""
        process.kill()
        asyncio.get_running_loop().remove_reader(process.beats)
        os.close(process.beats)
        if process is not self._process:
            return
        self._process = None
        mailboxes, self._mailboxes = self._mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.close()
        self._spawn(self._reap(process.child))
        if self._closing or self.state == "failed":
            return
        self.deaths += 1
        self._in_a_row = 1 if self.state == "ready" else self._in_a_row + 1
        self.state = "down"
        if self._in_a_row > (self._restarts.tries if self.ready is not None else FIRST_TRIES):
            self._told(f"the engine died {self._in_a_row} times in a row; giving up")
            self._give_up(1)
            return
        wait = self._restarts.wait_s(self._in_a_row)
        self._told(f"the engine died with {len(mailboxes)} requests, which were told; another begins in {wait:.1f} s")
        self._spawn(self._relaunch(wait))

    async def _relaunch(self, wait: float) -> None:
        while not self._closing:
            await asyncio.sleep(wait)
            self.state = "starting"
            try:
                await self._launch()
                return
            except OSError as error:  # no memory, no process
                wait = self._restarts.most_s
                self._told(f"no process can begin ({error.strerror}); tried again in {wait:g} s")

    async def _reap(self, child: "subprocess.Popen[bytes]") -> None:
        while child.poll() is None:
            await asyncio.sleep(0.02)

    def _feel(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, READ)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(descriptor)
            return
        now = time.monotonic()
        for beat in read_beats(data):
            self._pulse.feel(beat, now)

    async def _watch(self) -> None:
        """Replace a process that hangs. One that loads is given all the time it wants as long as it is there."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            if now - last > 4 * WATCH_S:  # this process did not run itself; what it did not hear says nothing
                self._pulse = Pulse(self._patience, now)
            last = now
            if self.state == "ready" and self._process is not None and (why := self._pulse.lost(now)):
                self._told(f"the engine's process {why}; it is replaced")
                self._process.kill()

    def _give_up(self, code: int) -> None:
        self.state = "failed"
        self._gave_up(code)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
