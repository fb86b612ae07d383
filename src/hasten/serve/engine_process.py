"""The engine's process: takes orders from a socket, steps, and reports. It ends with its server, and with nothing else's failure."""

import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator

from hasten.base.errors import UserError
from hasten.engine import LLM, SamplingParams
from hasten.engine.llm import continuous
from hasten.program import Formats
from hasten.serve.heart import Heart
from hasten.serve.messages import Abort, Begin, Embed, Embedded, Failed, Frames, News, Order, Piece, Ready, Report, Submit, Vector, frame
from hasten.serve.meter import streaming_read
from hasten.serve.vectors import Vectors
from hasten.serve.work import Work

RECEIVED = 1 << 18
"""Bytes read at a time."""
STATS_S = 0.25
"""How often the server hears how things stand, while there is work."""
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Line:
    """The socket to the server."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._frames: Frames[Order] = Frames(Order)
        self.ended = False

    def orders(self, wait: bool) -> Iterator[Order]:
        """What the server wants. Waits for something where there is nothing, if so asked."""
        if wait:
            waiting = select.poll()  # not select, which takes no descriptor from 1024 on
            waiting.register(self._socket, select.POLLIN)
            waiting.poll()
        while not self.ended:
            try:
                data = self._socket.recv(RECEIVED, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            self.ended = not data
            yield from self._frames.feed(data)

    def report(self, report: Report) -> None:
        """Tell the server."""
        try:
            self._socket.sendall(frame(report))
        except OSError:
            self.ended = True


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def open_llm(begin: Begin) -> LLM:
    """The LLM that the server asks for. Raises UserError for what cannot be."""
    formats = Formats(begin.weights, begin.activations, begin.cache)
    return LLM(
        begin.model, backend=begin.backend, formats=formats, context=begin.context, max_sequences=begin.max_sequences, memory=begin.memory,
        swap_bytes=begin.swap_bytes, prefixes=begin.prefixes,
        scheduling=None if begin.stretch is None else continuous(begin.max_sequences, begin.stretch),
    )  # fmt: skip


def run(line: Line, heart: Heart, work: Work, vectors: Vectors) -> None:
    """Take orders, step and report, until the server goes."""
    told = 0.0
    was_busy = False
    while True:
        heart.busy = work.busy or vectors.busy
        pieces, embedded = list[Piece](), list[Vector]()
        for order in line.orders(wait=not heart.busy):
            match order:
                case Submit():
                    pieces += work.submit(order)
                case Embed():
                    embedded += vectors.take(order)
                case Abort():
                    work.abort(order.id)
                    vectors.abort(order.id)
        if line.ended:
            return
        heart.busy = work.busy or vectors.busy
        pieces += work.step()
        embedded += vectors.step()
        heart.turns += 1
        begun = work.take_begun()
        if pieces or begun:
            line.report(News(pieces, begun))
        if embedded:
            line.report(Embedded(embedded))
        now = time.monotonic()
        if now - told >= STATS_S or (was_busy and not work.busy):
            line.report(work.stats())
            told = now
        was_busy = work.busy


def serve(line: Line, heart: Heart) -> int:
    """Load what the first order names and serve it; the exit code."""
    began = time.monotonic()
    begin = next((order for order in line.orders(wait=True)), None)
    if not isinstance(begin, Begin):
        return 1
    try:
        llm = open_llm(begin)
        plan = str(llm.memory_plan())
        read = begin.read_bytes_s or streaming_read(llm)  # before the weights are there, which a thread may yet move about
        llm.engine()
        for chunk in llm.stream([[0]], SamplingParams(max_tokens=1)):  # the first step makes what is made once
            if chunk.error is not None:
                raise RuntimeError(f"the first step fails: {chunk.error}")
    except UserError as error:
        line.report(Failed(str(error), True))
        return 2
    except Exception as error:
        traceback.print_exc()
        line.report(Failed(f"{type(error).__name__}: {error}", False))
        return 1
    seconds = time.monotonic() - began
    line.report(Ready(backend=llm.backend, context=llm.context, plan=plan, notice=llm.notice, seconds=seconds, read_bytes_s=read))
    run(line, heart, Work(llm), Vectors(llm))
    return 0


def main() -> None:
    """``python -m hasten.serve.engine_process SOCKET PIPE PARENT``: the descriptors it inherits, and who began it."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # a terminal and systemd send them to all; when to stop is the server's to say
    descriptor, pipe, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    heart = Heart(pipe)
    heart.start()
    try:
        code = serve(Line(descriptor), heart)
    except Exception:
        traceback.print_exc()  # the server tells everyone, and begins another
        code = 1
    sys.stderr.flush()
    os._exit(code)  # at once: nothing here is worth a wait for threads


if __name__ == "__main__":
    main()
