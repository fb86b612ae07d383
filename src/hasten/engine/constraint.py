"""Constraints: which ids may come next, so that an output is what a `Grammar` says.

Grammars are compiled and followed in other processes (`hasten.engine.grammar_worker`): one tastes every new grammar in idle time, each in
a fork of its own, one follows those that went well. A grammar that takes too much time or memory, or crashes its process, fails its own
sequence; what else that process followed is started again where it stood, from the tokens noted here. Nothing here waits unless
`Constraints.wait` is called, so a sequence whose mask is late can sit out a step while its neighbours go on.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UserError, one_line
from hasten.engine.grammar import Grammar
from hasten.engine.grammar_worker import COMPLETE, FAILED, FOLLOWS


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintLimits:
    """What following grammars may take."""

    compile_seconds: float = 1.0
    """Processor time to compile one, and to follow it for a few tokens."""
    step_seconds: float = 0.3
    """Processor time for one token's mask."""
    answer_seconds: float = 1.6
    """Time by the clock for either; a taste that a busy machine has kept from running at all may take ``start_seconds``."""
    start_seconds: float = 30.0
    """Time by the clock until a process has read the tokenizer."""
    bytes: int = 1 << 30
    """Memory of each of the two processes beyond the tokenizer's."""
    known: int = 1024
    """Grammars remembered to have gone well."""
    waiting: int = 1024
    """New grammars that wait for their taste; one more fails its sequence."""


class ConstraintState:
    """Where one sequence stands in its grammar. Made by `Constraints.start`; read after `Constraints.poll` or `Constraints.wait`."""

    def __init__(self, owner: Constraints, number: int, grammar: Grammar) -> None:
        self._owner, self._number, self._grammar = owner, number, grammar
        self._tokens: list[int] = []
        self._awaited = 0  # answers on their way
        self._placed = False  # the process that follows knows it
        self.mask: NDArray[np.uint32] | None = None
        """Bits of the ids that may come next, uint32 [⌈vocab / 32⌉], as the native sampler takes them; the model's ends of text are among
        them where the output may end. None until known, and when `complete` or failed."""
        self.complete = False
        """Nothing more may come: end the sequence."""
        self.error: str | None = None
        """Why the sequence must fail, one line; it can then do nothing more."""

    @property
    def ready(self) -> bool:
        """A mask is there, or the end is known, or an error: the sequence need not wait."""
        return self.error is not None or (self._awaited == 0 and self._placed)

    def advance(self, token: int) -> None:
        """Take the token that was drawn under `mask`; not one that ended the sequence."""
        self._tokens.append(token)
        self._owner._ask(self, "advance", token)

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        del self._tokens[len(self._tokens) - count :]
        self._owner._ask(self, "rollback", count)

    def fork(self) -> ConstraintState:
        """Another sequence that stands at the same place."""
        return self._owner._fork(self)

    def close(self) -> None:
        """Forget the sequence; call it once it has ended."""
        self._owner._drop(self)


class Constraints:
    """Follows grammars for sequences of one model. One thread at a time; close it when done.

    ``tokenizer`` is a ``tokenizer.json``; masks are for ``vocab`` ids; ``end_ids`` end the model's texts and come where a grammar is
    content (without any, a sequence ends where nothing more may come). Processes start with the first sequence."""

    def __init__(self, tokenizer: Path, vocab: int, end_ids: Sequence[int], limits: ConstraintLimits | None = None) -> None:
        self.limits = limits or ConstraintLimits()
        self._words = -(-vocab // 32)
        settings = {
            "tokenizer": str(tokenizer), "words": self._words, "end_ids": list(end_ids), "bytes": self.limits.bytes,
            "compile_seconds": self.limits.compile_seconds, "step_seconds": self.limits.step_seconds,
            "answer_seconds": self.limits.answer_seconds, "start_seconds": self.limits.start_seconds,
        }  # fmt: skip
        self._taster = _Worker(settings | {"tastes": True}, self.limits)
        self._follower = _Worker(settings | {"tastes": False}, self.limits)
        self._known: OrderedDict[Grammar, None] = OrderedDict()
        self._tasted: dict[Grammar, dict[int, ConstraintState]] = {}  # who waits for the taste of a grammar, which the first alone is at
        self._states: dict[int, ConstraintState] = {}
        self._next = 0

    def start(self, grammar: Grammar) -> ConstraintState:
        """A sequence that has seen nothing. It is not ready yet."""
        state = self._new(grammar)
        if grammar in self._known:
            self._known.move_to_end(grammar)
            self._place(state)
        elif grammar not in self._tasted and len(self._tasted) >= self.limits.waiting:
            state.error = f"{len(self._tasted)} new grammars wait to be compiled, and no more may; try again later"
        else:
            self._tasted.setdefault(grammar, {})[state._number] = state
            self._taste_next()
        return state

    def poll(self) -> None:
        """Take what has been answered, without waiting."""
        while answer := self._taster.answer():
            self._take_taste(*answer)
        while answer := self._follower.answer():
            self._take_mask(*answer)
        if culprit := self._taster.trouble():
            grammar = self._taster.asked[0] if self._taster.asked else None
            self._taster.restart(culprit)
            if isinstance(grammar, Grammar):
                self._fail_grammar(grammar, culprit)
        self._taste_next()
        if culprit := self._follower.trouble():
            first = self._follower.asked[0] if self._follower.asked else None
            self._follower.restart(culprit)
            if isinstance(first, int) and first in self._states:
                self._states[first].error = f"the output's grammar {culprit}; simplify it"
            self._place_all()
        self._taster.flush()
        self._follower.flush()

    def wait(self, seconds: float, states: Sequence[ConstraintState] | None = None) -> bool:
        """Poll until all of ``states`` (every sequence unless given) are ready, for so long at most; whether they are."""
        end = time.monotonic() + seconds
        while True:
            self.poll()
            waiting = [state for state in (self._states.values() if states is None else states) if not state.ready]
            left = end - time.monotonic()
            if not waiting or left <= 0:
                return not waiting
            poller = select.poll()
            for worker in (self._taster, self._follower):
                worker.watch(poller)
            poller.poll(min(left, 0.05) * 1000)

    def close(self) -> None:
        """End the processes. Sequences still there fail."""
        for state in self._states.values():
            state.error = state.error or "the engine was closed"
        self._states.clear()
        self._tasted.clear()
        self._taster.stop()
        self._follower.stop()

    def _new(self, grammar: Grammar) -> ConstraintState:
        state = ConstraintState(self, self._next, grammar)
        self._states[self._next] = state
        self._next += 1
        return state

    def _place(self, state: ConstraintState) -> None:
        """Have the sequence followed, from all of its tokens."""
        state._placed = True
        self._request(state, ["start", state._number, state._grammar.kind, state._grammar.text, state._tokens])

    def _place_all(self) -> None:
        for state in self._states.values():
            if state._placed and state.error is None:
                state._awaited = 0
                self._place(state)

    def _ask(self, state: ConstraintState, name: str, number: int) -> None:
        if state.error is None:
            self._request(state, [name, state._number, number])

    def _request(self, state: ConstraintState, operation: list[Any]) -> None:
        state.mask, state.complete = None, False
        if self._follower.died_idle():
            self._follower.stop()
            self._place_all()  # this one among them, from all of its tokens
            return
        try:
            self._follower.ask(operation, state._number)
        except UserError as error:  # there is no process, and who asks next tries to begin one again
            state.error = str(error)
        else:
            state._awaited += 1

    def _fork(self, state: ConstraintState) -> ConstraintState:
        new = self._new(state._grammar)
        new._tokens, new.error = list(state._tokens), state.error
        if state.error is None and state._placed:
            new._placed = True
            self._request(new, ["fork", state._number, new._number])
        elif state.error is None:
            self._tasted[state._grammar][new._number] = new
        return new

    def _drop(self, state: ConstraintState) -> None:
        if self._states.pop(state._number, None) is None:
            return
        if not state._placed:
            waiting = self._tasted.get(state._grammar, {})
            waiting.pop(state._number, None)
            if not waiting and state._grammar not in self._taster.asked:
                self._tasted.pop(state._grammar, None)
        elif self._follower.running:
            self._follower.ask(["drop", state._number], None)

    def _taste_next(self) -> None:
        """Have the first of the new grammars tasted, unless one is: who leaves before its turn takes none of the taster's time."""
        if self._taster.asked:
            return
        if self._taster.died_idle():
            self._taster.stop()
        self._tasted = {grammar: waiting for grammar, waiting in self._tasted.items() if waiting}
        if (grammar := next(iter(self._tasted), None)) is None:
            return
        try:
            self._taster.ask(["taste", grammar.kind, grammar.text], grammar)
        except UserError as error:
            self._fail_all(grammar, str(error))

    def _take_taste(self, grammar: Grammar, status: bytes, text: bytes) -> None:
        if status == FAILED:
            self._fail_grammar(grammar, f"is refused: {_reason(text)}")
            return
        self._known[grammar] = None
        if len(self._known) > self.limits.known:
            self._known.popitem(last=False)
        for state in self._tasted.pop(grammar, {}).values():
            self._place(state)

    def _take_mask(self, number: int, status: bytes, body: bytes) -> None:
        if (state := self._states.get(number)) is None:
            return
        state._awaited -= 1
        if state._awaited or state.error is not None:
            return
        if status == FOLLOWS:
            state.mask = np.frombuffer(body, "<u4").astype(np.uint32, copy=False)
        elif status == COMPLETE:
            state.complete = True
        else:
            state.error = f"the output's grammar cannot be followed: {_reason(body)}"

    def _fail_grammar(self, grammar: Grammar, reason: str) -> None:
        self._fail_all(grammar, f"{grammar.kind} {one_line(grammar.text, 60)} {reason}")

    def _fail_all(self, grammar: Grammar, error: str) -> None:
        for state in self._tasted.pop(grammar, {}).values():
            state.error = error


def _reason(text: bytes) -> str:
    """The first lines of a library's message, on one line."""
    words = " ".join(text.decode("utf-8", "replace").split("\n<state>")[0].split())
    return words if len(words) <= 300 else words[:299] + "…"


class _Worker:
    """One process, the operations it has not read yet and who waits for which answer."""

    def __init__(self, settings: dict[str, Any], limits: ConstraintLimits) -> None:
        self._settings, self._limits = settings, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize | None = None  # type: ignore[type-arg]
        self._fresh()

    def _fresh(self) -> None:
        self.asked: deque[Any] = deque()  # who asked, oldest first
        self.unsent = bytearray()
        self._received = bytearray()
        self._greeted = self._ended = False
        self._since = 0.0  # when the oldest became the oldest

    @property
    def running(self) -> bool:
        return self._process is not None

    def watch(self, poller: select.poll) -> None:
        """Have ``poller`` tell when an answer can be read, or what is unsent be sent."""
        if self._process is None:
            return
        poller.register(self._out, select.POLLIN)
        if self.unsent:
            poller.register(self._in, select.POLLOUT)

    def ask(self, operation: list[Any], who: Any) -> None:
        """Send an operation; ``who`` comes back with its answer, None if it has none.

        Raises UserError, with nothing asked, where a process must begin and cannot."""
        if self._process is None:
            self._begin()
        if who is not None:
            if not self.asked:
                self._since = time.monotonic()
            self.asked.append(who)
        body = json.dumps([operation]).encode()
        self.unsent += struct.pack("<I", len(body)) + body
        self.flush()

    def flush(self) -> None:
        """Send what the pipe takes."""
        while self.unsent and not self._ended:
            try:
                del self.unsent[: os.write(self._in, self.unsent)]
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._ended = True

    def answer(self) -> tuple[Any, bytes, bytes] | None:
        """The next answer: who asked, how things stand, and what belongs to it."""
        while self._process is not None:
            if len(self._received) >= 4:
                (length,) = struct.unpack_from("<I", self._received)
                if len(self._received) >= 4 + length:
                    body = bytes(self._received[4 : 4 + length])
                    del self._received[: 4 + length]
                    self._since = time.monotonic()
                    if self._greeted:
                        return self.asked.popleft(), body[:1], body[1:]
                    if body[:1] == FAILED:
                        raise UserError(f"this tokenizer cannot be held to a grammar: {_reason(body[1:])}; leave the grammar out")
                    self._greeted = True
                    continue
            try:
                piece = os.read(self._out, 1 << 20)
            except BlockingIOError:
                return None
            if not piece:
                self._ended = True
                return None
            self._received += piece
        return None

    def died_idle(self) -> bool:
        """Whether the process ended while nothing was asked of it, so that no operation is to blame."""
        return self._process is not None and not self.asked and self._process.poll() is not None

    def trouble(self) -> str:
        """Why this process must be started again, or nothing."""
        if self._process is None:
            return ""
        if self._ended:
            return "takes too much time or memory"
        allowed = self._limits.answer_seconds if self._greeted else self._limits.start_seconds
        if self._settings["tastes"]:
            allowed = self._limits.start_seconds + self._limits.answer_seconds  # it keeps time itself, and answers
        late = bool(self.asked) and time.monotonic() - self._since > allowed
        return f"takes more than {allowed:g} seconds" if late else ""

    def restart(self, reason: str) -> None:
        """End the process; the next operation starts another."""
        greeted = self._greeted
        self.stop()
        if not greeted:
            raise UserError(f"the process that follows grammars does not start: it {reason}; is llguidance installed?")

    def stop(self) -> None:
        """End the process and forget what was asked of it."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None
        self._fresh()

    def _begin(self) -> None:
        program = str(Path(__file__).with_name("grammar_worker.py"))
        command = [sys.executable, "-P", program, json.dumps(self._settings)]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        except OSError as error:  # no more processes or files may be had now
            raise UserError(f"the process that follows grammars cannot begin: {error}; try again later") from None
        self._stop = weakref.finalize(self, _end, self._process)
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a pipe was asked for")
        self._in, self._out = stdin.fileno(), stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
