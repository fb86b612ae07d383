"""Meter: what an engine's steps read, and how long they took, in kernels and outside them."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.backends.cpu import CpuSession
from hasten.base import hardware
from hasten.engine import LLM, Chunk
from hasten.engine.engine import Engine
from hasten.measure.cost import read_share
from hasten.measure.roofline import Limits
from hasten.program import Batch, Drawer, HostLogits, Logits, Move, PageLists, Program, RecurrentGroup, unfuse
from hasten.spec import Causal

if TYPE_CHECKING:
    from hasten import _native

PROFILE_NS = 250_000_000
"""A step in so much time is profiled, which it takes a few microseconds longer for."""
MOST_READ = 256 << 20
"""Bytes of the largest buffer that the streaming read is measured with: more than processors cache."""


class Meter:
    """Counts from now on what ``engine`` does: it stands between it and its session. Of one that is not native it counts no bytes, and
    profiles no step."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._before = engine, dataclasses.replace(engine.counters)
        session = self._session = engine.session
        engine.session = self
        self._native = session if isinstance(session, CpuSession) else None
        self._due = self._kernel = self._clock = 0
        self._read = None if self._native is None else ReadBytes(unfuse(session.program), self._native.compiled.weight_bytes)
        self.read_bytes = 0
        self.step_ns = 0
        self.profiled_ns = 0
        """Of it, in steps that were profiled."""
        self.kernel_ns = 0
        """Of that, in kernels: the thread's that was longest in them."""

    def counters(self) -> dict[str, int]:
        """The engine's (`hasten.engine.plan.Counters`) and what is counted here, by name."""
        before, now = dataclasses.asdict(self._before), dataclasses.asdict(self._engine.counters)
        found = {name: now[name] - before[name] for name in now}
        own = {"read_bytes": self.read_bytes, "step_ns": self.step_ns, "profiled_ns": self.profiled_ns, "kernel_ns": self.kernel_ns}
        return found | own

    def step(self) -> list[Chunk]:
        """A step of the engine, counted."""
        self._kernel = self._clock = 0
        began = time.perf_counter_ns()
        chunks = self._engine.step()
        took = time.perf_counter_ns() - began - self._clock
        self.step_ns += took
        if self._kernel:
            self.profiled_ns += took
            self.kernel_ns += self._kernel
        return chunks

    # --- as a session

    @property
    def program(self) -> Program:
        """The session's."""
        return self._session.program

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self._session.page

    @property
    def pages(self) -> Mapping[str, int]:
        """How many there are, by state group."""
        return self._session.pages

    @property
    def threads(self) -> "_native.ThreadPool | None":
        """The session's."""
        return self._session.threads

    @property
    def drawer(self) -> Drawer | None:
        """The session's."""
        return self._session.drawer

    def settle(self) -> None:
        """Wait until nothing is under way in the background."""
        self._session.settle()

    def carry_out(self, moves: Sequence[Move]) -> None:
        """Copy pages, swap them out and in."""
        self._session.carry_out(moves)

    def run(self, batch: Batch, pages: Sequence[PageLists]) -> Logits:
        """Logits [R, vocab], as the session gives them."""
        if self._native is None or self._read is None:
            return self._session.run(batch, pages)
        self.read_bytes += self._read.of(batch)
        if (began := time.perf_counter_ns()) < self._due:
            return self._native.run(batch, pages)
        self._due = began + PROFILE_NS
        logits, profile = self._native.profile(batch, pages)
        self._kernel += profile.kernel_ns
        self._clock += time.perf_counter_ns() - began - profile.step_ns  # what looking at the clock took
        return HostLogits(logits)

    def hidden(self, batch: Batch, pages: Sequence[PageLists]) -> NDArray[np.float32]:
        """Hidden states [R, width], as the session gives them; not counted, for they are not of the engine's steps."""
        return self._session.hidden(batch, pages)


class ReadBytes:
    """Bytes that steps of ``program`` read: weights, ``weight_bytes`` for one token, and what its sequences keep, once for each."""

    def __init__(self, program: Program, weight_bytes: int) -> None:
        self._program, self._whole = program, weight_bytes / read_share(program, 1)
        self._weights: dict[int, int] = {}  # by tokens of a step: experts are read by those who choose them
        states = program.states
        self._causal = sum(
            group.bytes_per_token() for group in states if not isinstance(group, RecurrentGroup) and group.visible == Causal()
        )
        self._bounded = [group for group in states if not isinstance(group, RecurrentGroup) and group.visible != Causal()]
        self._fixed = sum(group.bytes_per_sequence() for group in states)

    def of(self, batch: Batch) -> int:
        """Of one step."""
        tokens = len(batch.tokens)
        if (weights := self._weights.get(tokens)) is None:
            weights = self._weights[tokens] = round(self._whole * read_share(self._program, tokens))
        last = batch.positions[batch.offsets[1:] - 1]
        count = len(last)
        total = weights + self._fixed * count + self._causal * (int(last.sum()) + count)
        for group in self._bounded:
            total += group.bytes_per_token() * sum(position - group.oldest_visible(position) + 1 for position in last.tolist())
        return total


def streaming_read(llm: LLM) -> float | None:
    """Bytes a second that this machine reads in a stream of as many as the model's weights are, measured now; None on a backend whose
    steps are not counted in bytes."""
    if llm.backend != "cpu":
        return None
    largest = max(load.weights for load in llm.loads())
    limits = Limits(hardware.detect().cpu.cores, "best", "f32", min(MOST_READ, largest))
    return 1e9 * limits.read_gb_per_s()
