"""How the time of a step and the memory of a process grow with the context of one sequence."""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np

from hasten.backends.cpu import CpuSession
from hasten.backends.cpu.backend import PAGE
from hasten.base import hardware
from hasten.base.errors import ConfigError, UnsupportedError, UserError
from hasten.engine.stepper import Sequences, Stepper
from hasten.measure.latency import Runner
from hasten.program import Batch, KvGroup, LatentGroup, ops
from hasten.spec import Causal

_COMPUTED = 512  # most tokens of the sequence that are computed; the pages of the rest are copies of theirs
_ROUNDS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class ContextPoint:
    """A step of one more token of a sequence of ``context`` tokens: its median time, and memory when the sequence had grown so far.

    All in bytes: ``weight_bytes`` of products and tables, ``arena_bytes`` of a step's values, ``cache_bytes`` of the sequence's pages, and
    ``planned_bytes``, their sum; ``resident_bytes`` is what the process took beyond what it had before the model was opened, None where
    the system does not tell."""

    model: str
    weights: str
    activations: str
    cache: str
    isa: str
    threads: int
    context: int
    tpot_ms: float
    weight_bytes: int
    arena_bytes: int
    cache_bytes: int
    planned_bytes: int
    resident_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """y ≈ ``at_zero`` + ``slope`` · x by least squares: R², and the largest distance from it as a share of y."""

    at_zero: float
    slope: float
    r2: float
    worst: float

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> "Line":
        """The line through three points or more. Raises ConfigError for fewer, through which some line always goes."""
        if len({*x}) < 3:
            raise ConfigError(f"a straight line needs three points or more to be told from another, not {len({*x})}")
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        slope, at_zero = (float(each) for each in np.polyfit(xs, ys, 1))
        off = ys - (at_zero + slope * xs)
        spread = float(((ys - ys.mean()) ** 2).sum())
        return cls(at_zero, slope, 1.0 - float((off**2).sum()) / spread if spread else 1.0, float(np.abs(off / ys).max()))


def context_points(runner: Runner, contexts: Sequence[int], steps: int, before: int | None) -> Iterator[ContextPoint]:
    """One sequence, grown through ``contexts``, then timed at them in turn, ``steps`` steps three times at each. ``before`` is what the
    process took before the model was opened.

    Its keys and values lie in pages of their own, but only the first tokens are computed: the other pages are copies, so that a long
    context takes no long prefill. Raises UnsupportedError where that cannot be: another backend than cpu, windows, recurrent state."""
    session, groups = runner.session, runner.program.states
    if not isinstance(session, CpuSession) or not all(isinstance(g, KvGroup | LatentGroup) and g.visible == Causal() for g in groups):
        raise UnsupportedError(f"{runner.model}: contexts are measured on backend cpu, for models whose every layer sees all positions")
    stepper, ordered = Stepper(session), sorted(set(contexts))
    state = stepper.start(1)
    tables = sum(2 * math.prod(runner.program.params[op.weight]) for op in runner.program.ops if isinstance(op, ops.Embed))
    residents = []
    for context in ordered:
        _grow(stepper, session, state, context)
        _timed(stepper, state, context)
        residents.append(hardware.resident_bytes())
    times: list[list[float]] = [[] for _ in ordered]
    for _ in range(_ROUNDS):
        for context, its in zip(ordered, times):
            its += [_timed(stepper, state, context) for _ in range(steps)]
    for context, resident, its in zip(ordered, residents, times):
        cached = sum(group.bytes_per_token() for group in groups) * PAGE * -(-(context + 1) // PAGE)
        weights, arena = runner.weight_bytes + tables, session.compiled.arena_bytes
        yield ContextPoint(
            model=runner.model, weights=runner.weights, activations=runner.activations, cache=runner.cache, isa=runner.isa,
            threads=runner.threads, context=context, tpot_ms=1e3 * statistics.median(its), weight_bytes=weights, arena_bytes=arena,
            cache_bytes=cached, planned_bytes=weights + arena + cached,
            resident_bytes=None if resident is None or before is None else resident - before,
        )  # fmt: skip


def _grow(stepper: Stepper, session: CpuSession, state: Sequences, context: int) -> None:
    """Fill the sequence up to ``context`` tokens. Raises UserError where the cache has no room for them and one more."""
    (sequence,) = state.sequences
    if sequence.length < (computed := min(context, _COMPUTED)):
        ids = np.random.default_rng(0).integers(0, session.vocab, _COMPUTED)[sequence.length : computed].tolist()
        stepper.step(Batch.of([ids], [sequence.length], rows="last"), state)
    if not stepper.cache.grow(sequence.pages, context + 1):
        raise UserError(f"a context of {context} tokens and one more is longer than the cache of {session.pages} pages")
    whole = sequence.length // PAGE
    for pool, pages in zip(session.compiled.pools, sequence.pages.tables, strict=True):
        for index in range(whole, len(pages)) if context > sequence.length else ():
            pool.copy_page(pages[index % whole], pages[index])
    sequence.pages.length = context


def _timed(stepper: Stepper, state: Sequences, context: int) -> float:
    """Seconds of one more token after ``context``; the next one takes its place."""
    (sequence,) = state.sequences
    sequence.pages.length = context
    batch = Batch.of([[1]], [context], rows="last")
    began = time.perf_counter()
    stepper.step(batch, state)
    return time.perf_counter() - began
