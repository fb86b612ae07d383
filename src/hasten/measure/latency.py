"""How fast a model runs on this machine, and what share of the machine's limit that is, both measured in the same run."""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hasten import _native
from hasten.backends.cpu import CpuBackend, CpuSession
from hasten.backends.cpu.profile import StepProfile
from hasten.base import hardware
from hasten.base.errors import ConfigError, UnsupportedError, one_line
from hasten.checkpoint.random import PREFIX
from hasten.engine.backends import open_session
from hasten.engine.stepper import Sequences, Stepper
from hasten.formats.linear import LinearFormat
from hasten.measure.cost import cache_bytes, operations, read_share, weight_elements
from hasten.measure.roofline import Arithmetic, DeviceArithmetic, DeviceLimits, KnowsItsLimits, Limits, Slice
from hasten.model import Model
from hasten.program import Batch, Formats, Program, lower, ops, unfuse
from hasten.program.pages import MOST_SEQUENCES

PROFILED = 4  # steps that are profiled after those that are timed
PAGE = 16  # tokens, on every backend
WARM = 128  # tokens of a batch that are played before anything is timed

_ARITHMETIC: dict[str, Arithmetic] = {"bf16": "bf16", "int8": "int8", "fp8": "f32", "float32": "f32"}  # of activations
_OF_DEVICE: dict[str, DeviceArithmetic] = {**_ARITHMETIC, "fp8": "fp8"}
_SHORT = {"bfloat16": "bf16", "float16": "f16"}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """``batch`` sequences, each of a prompt of ``prompt`` tokens and ``new`` tokens decoded one by one."""

    batch: int
    prompt: int
    new: int

    @property
    def context(self) -> int:
        """Tokens that each sequence comes to, the profiled steps' among them."""
        return self.prompt + self.new + PROFILED


@dataclasses.dataclass(frozen=True, slots=True)
class Runner:
    """A model made ready once, and how it is stored and fed. ``isa`` is the level of native kernels, what a device's are compiled for, or
    'torch' where torch chooses;
    ``weight_bytes`` are those that a step reads if it reads all experts."""

    session: Any
    program: Program
    model: str
    backend: str
    isa: str
    threads: int
    weights: str
    activations: str
    cache: str
    weight_bytes: int
    open_s: float

    def limits(self, case: Case) -> Limits | DeviceLimits:
        """The machine's limits for this case: a buffer as large as what a step of decoding reads, products as the linear layers take."""
        if isinstance(self.session, KnowsItsLimits):
            return DeviceLimits(self.session, _OF_DEVICE[self.activations], self.bytes_per_step(case)[0])
        level = self.isa if isinstance(self.session, CpuSession) else "best"
        return Limits(self.threads, level, _ARITHMETIC[self.activations], self.bytes_per_step(case)[0])

    def bytes_per_step(self, case: Case) -> tuple[int, int]:
        """Bytes that a step of decoding reads, at the mean context: (weights and cache, cache alone)."""
        cache = statistics.mean(cache_bytes(self.program, [case.prompt + i] * case.batch) for i in range(case.new))
        return round(self.weight_bytes * read_share(self.program, case.batch) + cache), round(cache)


@dataclasses.dataclass(frozen=True, slots=True)
class Repetition:
    """One timed run of a case and the machine's limits right after it. Overheads are one per profiled step, in microseconds."""

    ttft_s: float
    tpot_s: float
    limit: Slice
    step_overhead_us: tuple[float, ...]
    tape_overhead_us: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Latency:
    """Medians over repetitions.

    ``ttft_ms`` is the time from the prompts to the logits of all sequences, ``tpot_ms`` that of one more token of each. ``mbu`` is the
    bytes a decode step reads over what streaming reads in the same time; ``mfu`` the prompts' operations over what the peak does;
    ``of_limit`` the least time a decode step could take, by bytes or by operations, over what it takes. ``step_overhead_us`` is a step's
    wall time less the slowest thread's time in kernels, Python's included; ``tape_overhead_us`` the same of the native step alone."""

    model: str
    backend: str
    isa: str
    threads: int
    weights: str
    activations: str
    cache: str
    batch: int
    prompt: int
    new: int
    repeats: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    bytes_per_step: int
    cache_bytes_per_step: int
    operations_per_step: int
    prefill_operations: int
    mbu: float
    mfu: float
    of_limit: float
    step_overhead_us: float | None
    tape_overhead_us: float | None
    read_gb_per_s: float
    peak_tops: float
    peak_isa: str
    open_s: float

    @classmethod
    def of(cls, runner: Runner, case: Case, repetitions: Sequence[Repetition]) -> "Latency":
        """The medians; shares are taken within a repetition, so that a machine that slows down does so on both sides."""
        program, median = runner.program, statistics.median
        step_bytes, step_cache = runner.bytes_per_step(case)
        prefill = operations(program, [0] * case.batch, case.prompt, case.batch)
        decode = operations(program, [case.prompt] * case.batch, case.new, case.batch * case.new) // case.new
        ttft, tpot = median(each.ttft_s for each in repetitions), median(each.tpot_s for each in repetitions)
        step_us = [us for each in repetitions for us in each.step_overhead_us]
        tape_us = [us for each in repetitions for us in each.tape_overhead_us]
        return cls(
            model=runner.model, backend=runner.backend, isa=runner.isa, threads=runner.threads, weights=runner.weights,
            activations=runner.activations, cache=runner.cache, batch=case.batch, prompt=case.prompt, new=case.new,
            repeats=len(repetitions), prefill_tokens_per_s=case.batch * case.prompt / ttft, decode_tokens_per_s=case.batch / tpot,
            ttft_ms=1e3 * ttft, tpot_ms=1e3 * tpot, bytes_per_step=step_bytes, cache_bytes_per_step=step_cache,
            operations_per_step=decode, prefill_operations=prefill,
            mbu=median(step_bytes / each.tpot_s / each.limit.read_gb_per_s / 1e9 for each in repetitions),
            mfu=median(prefill / each.ttft_s / each.limit.peak_tops / 1e12 for each in repetitions),
            of_limit=median(each.limit.seconds(step_bytes, decode) / each.tpot_s for each in repetitions),
            step_overhead_us=median(step_us) if step_us else None, tape_overhead_us=median(tape_us) if tape_us else None,
            read_gb_per_s=median(each.limit.read_gb_per_s for each in repetitions),
            peak_tops=median(each.limit.peak_tops for each in repetitions), peak_isa=runner.limits(case).peak_isa, open_s=runner.open_s,
        )  # fmt: skip


def open_runner(
    model: Model, cases: Sequence[Case], *, backend: str = "cpu", weights: str | None = None, activations: str | None = None,
    cache: str | None = None, threads: int | None = None, isa: str = "best",
) -> Runner:  # fmt: skip
    """``model`` ready for every one of ``cases``. ``activations`` and ``cache`` are what they must turn out to be, or None.

    Raises UserError for what the backend does not take, and for cases longer than the model's context; random weights have none to
    respect, but for a table of positions."""
    formats = Formats(weights, activations, cache)
    check_weights([weights])
    context = max(case.context for case in cases)
    check_context(model, context)
    context = max(context, *(_with_pages_for(case) for case in cases))
    level = _level(isa)
    cores = hardware.detect().cpu.cores
    if threads is not None and not (1 <= threads <= cores and (backend == "cpu" or threads == cores)):
        raise ConfigError(f"threads is {threads}; accepted: {f'1 to {cores}' if backend == 'cpu' else f'{cores}, which reference takes'}")
    began = time.perf_counter()
    session: Any
    if backend == "cpu":
        session = CpuBackend(threads, level).session(model, context, formats)
    else:
        session = open_session(model, backend, context, formats)
    open_s = time.perf_counter() - began
    session.settle()
    program: Program = unfuse(session.program)
    found = format_names(program)
    for what, wanted, got in (("activations", activations, found[1]), ("cache", cache, found[2])):
        if wanted is not None and wanted != got:
            raise UnsupportedError(
                f"{what} {one_line(wanted)} are not to be had with weights {found[0]} on backend {backend}; accepted: {got}"
            )
    isa, weight_bytes = "torch", 4 * weight_elements(program)
    if isinstance(session, CpuSession):
        isa, weight_bytes = level, session.compiled.weight_bytes
    elif isinstance(session, KnowsItsLimits):
        isa, weight_bytes = session.isa, session.weight_bytes
    return Runner(session, program, model.name, backend, isa, threads or cores, *found, weight_bytes, open_s)


def _with_pages_for(case: Case) -> int:
    """A context whose cache, which is made for MOST_SEQUENCES sequences, has pages for more of this case's."""
    pages = -(-case.context // PAGE) * max(0, case.batch - MOST_SEQUENCES)
    return case.context + -(-pages // MOST_SEQUENCES) * PAGE


def check_weights(formats: Sequence[str | None]) -> None:
    """Raise UnsupportedError for a format nobody knows, before any model is packed."""
    for each in formats:
        if each is not None:
            LinearFormat.parse(each)


def check_context(model: Model, context: int) -> None:
    """Raise ConfigError where sequences of ``context`` tokens are too long for ``model``."""
    if context <= model.spec.context:
        return
    if not model.name.startswith(PREFIX) or any(isinstance(op, ops.EmbedPositions) for op in lower(model.spec).ops):
        raise ConfigError(
            f"prompt and new tokens and {PROFILED} profiled ones come to {context}; {model.name} accepts up to {model.spec.context}"
        )


class Trial:
    """A case on a runner that nothing else uses meanwhile, ready to be timed again and again: the first of its tokens have been played to
    warm up, on a device all of them, which compiles and captures by the size of a step. Prompts are seeded random ids."""

    def __init__(self, runner: Runner, case: Case) -> None:
        vocab = runner.program.values["logits"].features[-1]
        ids = np.random.default_rng(0).integers(0, vocab, (case.batch, case.context)).tolist()
        self.case, self._session = case, Stepper(runner.session)
        self._prompt = Batch.of([each[: case.prompt] for each in ids], rows="last")
        self._steps = [
            Batch.of([each[position : position + 1] for each in ids], [position] * case.batch, rows="last")
            for position in range(case.prompt, case.context)
        ]
        short = min(case.prompt, -(-WARM // case.batch))
        state = self._session.start(case.batch)
        for start, stop in ((0, short), (short, short + 1)):
            warm = Batch.of([each[start:stop] for each in ids], [start] * case.batch, rows="last")
            _, state = self._session.step(warm, state)
        if isinstance(runner.session, KnowsItsLimits):
            self.time()
        runner.session.settle()

    def time(self) -> tuple[float, float, Sequences]:
        """Seconds from the prompts to the logits of all sequences, seconds of one more token of each, and the sequences."""
        state = self._session.start(self.case.batch)
        began = time.perf_counter()
        _, state = self._session.step(self._prompt, state)
        times = [time.perf_counter() - began]
        for step in self._steps[: self.case.new]:
            _, state = self._session.step(step, state)
            times.append(time.perf_counter() - began)
        return times[0], float(np.polyfit(np.arange(self.case.new + 1), times, 1)[0]), state

    def profiles(self, state: Sequences) -> Iterator[StepProfile]:
        """Where the time of the steps after those went, on a native session."""
        for step in self._steps[self.case.new :]:
            _, state, profile = self._session.profile(step, state)
            yield profile


def repetitions(runners: Sequence[Runner], case: Case, repeats: int) -> Iterator[list[Repetition]]:
    """``repeats`` rounds, in each of which every one of ``runners`` is timed once, each round in the other order; slices of the limits
    between them."""
    limits, trials = [runner.limits(case) for runner in runners], [Trial(runner, case) for runner in runners]
    for round_ in range(repeats):
        found: dict[int, Repetition] = {}
        for place in range(len(runners)) if round_ % 2 == 0 else reversed(range(len(runners))):
            ttft_s, tpot_s, state = trials[place].time()
            profiles = list(trials[place].profiles(state)) if isinstance(runners[place].session, CpuSession) else []
            found[place] = Repetition(
                ttft_s, tpot_s, limits[place].slice(), tuple(each.overhead_ns / 1e3 for each in profiles),
                tuple((each.tape_ns - each.kernel_ns) / 1e3 for each in profiles),
            )  # fmt: skip
        yield [found[place] for place in range(len(runners))]


def _level(isa: str) -> str:
    try:
        return _native.isa_level(isa)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def format_names(program: Program) -> tuple[str, str, str]:
    """(weights, activations, cache) as they are: those of the linear layers, the head's aside."""
    linear = [op for op in program.ops if isinstance(op, ops.Linear | ops.ExpertLinear)]
    body = [op for op in linear if op.y != "logits"] or linear
    weights = {_short(program.values[op.x].dtype) if op.weight_format == "dense" else op.weight_format for op in body}
    fed = {_short(program.values[op.x].dtype) for op in body}
    kept = {_short(group.format) for group in program.states}
    rounded = next((each for each in ("int8", "fp8") if each in fed), None)
    return "+".join(sorted(weights)), rounded or "+".join(sorted(fed)), "+".join(sorted(kept)) or "none"


def _short(dtype: str) -> str:
    return _SHORT.get(dtype, dtype)
