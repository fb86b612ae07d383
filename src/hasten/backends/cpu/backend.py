"""The native backend as an engine sees it."""

import functools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten import _native
from hasten.backends.cpu.compile import IN_CHAINS, Compiled, arena_bytes, compile_program, unsupported_ops
from hasten.backends.cpu.packed import PackedCache, PackedWeights
from hasten.backends.cpu.profile import StepProfile
from hasten.backends.cpu.rows import format_of
from hasten.base import hardware
from hasten.base.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.formats.cache import cache_format
from hasten.formats.weights import Weight
from hasten.model import Model
from hasten.program import (
    Batch,
    CopyPage,
    Formats,
    HostLogits,
    Move,
    PageLists,
    Program,
    SwapIn,
    SwapOut,
    first_pages,
    fuse,
    hidden_states,
    linear_formats,
    lower,
    ops,
    page_counts,
    parts_of,
    unfuse,
)
from hasten.spec import Spec

PAGE = 16  # tokens
STEP_TOKENS = 512  # most tokens of one native step; longer batches are played in several


class CpuBackend:
    """``threads`` are all cores granted unless given; ``isa`` forces a lower instruction-set level."""

    name = "cpu"
    page = PAGE

    def __init__(self, threads: int | None = None, isa: str = "best") -> None:
        self.isa = isa
        self.threads = hardware.detect().cpu.cores if threads is None else threads

    def refusals(self, model: Model) -> tuple[str, ...]:
        """What of ``model`` has no native kernel; empty where it runs here."""
        return unsupported_ops(lower(model.spec))

    def program(self, model: Model, context: int | None = None, formats: Formats | None = None) -> Program:
        """What a session would play."""
        return native_program(model.spec, context, (formats or Formats()).meant_for(model.cache), model.weights)

    def weight_bytes(self, program: Program) -> int:
        """Bytes that the weights of ``program`` take here: linear layers in their format, tables in bf16, all else in float32."""
        found: dict[tuple[str, str], float] = {}
        for op in (part for whole in program.ops for part in parts_of(whole)):
            match op:
                case ops.Linear() | ops.HeadLinear() | ops.ExpertLinear():
                    form = format_of(op)
                    bits = form.bits + 32 / form.group if form.group else form.bits
                    found[op.weight, str(form)] = math.prod(program.params[op.weight]) * bits / 8
                case ops.Embed():
                    found[op.weight, "table"] = math.prod(program.params[op.weight]) * 2
                case _:
                    found.update({(name, "float32"): math.prod(program.params[name]) * 4 for name in op.params})
        return round(sum(found.values()))

    def arena_bytes(self, program: Program, tokens: int) -> int:
        """Bytes of the values of a step of ``tokens`` tokens, its logits left out."""
        return arena_bytes(program, min(tokens, STEP_TOKENS, program.context))

    def drawing_bytes(self, program: Program, sequences: int) -> int:
        """None besides rows of logits: the engine draws."""
        return 0

    def free_bytes(self) -> int:
        """Bytes that weights, caches and arenas may take together."""
        return hardware.free_bytes()

    def session(
        self, model: Model, context: int | None = None, formats: Formats | None = None, cache_bytes: int | None = None
    ) -> "CpuSession":
        """The model packed for this machine, for sequences of up to ``context`` tokens; as its weights are stored, in bf16 where that is
        plainly, unless ``formats`` says otherwise.

        ``cache_bytes`` is how much its pages may take together, a quarter of free memory unless given; no page costs anything till used."""
        program = self.program(model, context, formats)
        pages = page_counts(program, PAGE, self.free_bytes() // 4 if cache_bytes is None else cache_bytes)
        threads = _native.ThreadPool(self.threads)
        packed = PackedWeights(threads, _native.isa_level(self.isa), model.name, model.weights.origin, PackedCache.of_user())
        tape_of = functools.partial(
            compile_program, weights=model.weights, packed=packed, pool=threads, isa=self.isa,
            most_tokens=min(STEP_TOKENS, program.context), page=PAGE, pages=pages,
        )  # fmt: skip
        return CpuSession(program, tape_of(program), threads, tape_of)

    def logits(self, model: Model, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 [T, vocab] of one sequence."""
        batch = Batch.of([token_ids])
        if len(batch.tokens) > model.spec.context:
            raise ConfigError(f"{len(batch.tokens)} tokens are more than the model's context of {model.spec.context}; shorten the input")
        return self.session(model, len(batch.tokens)).score(batch)


def native_program(
    spec: Spec, context: int | None = None, formats: Formats | None = None, weights: Mapping[str, Weight] | None = None
) -> Program:
    """What a session compiles: the Program with formats chosen, as ``weights`` are stored unless asked for, and ops fused. Raises
    UnsupportedError for formats nobody has, and activations in fp8, of which there are no native kernels."""
    formats = formats or Formats()
    linear = linear_formats(lower(spec, context=context), formats, weights, plain="bf16", without=("fp8",))
    return fuse(lower(spec, context=context, formats=linear, cache=cache_format(formats.cache or "bf16")), IN_CHAINS)


class CpuSession:
    """One compiled Program and its pages of ``page`` tokens, of which ``pages`` says how many there are by state group. Which of them
    holds what is the caller's business. ``threads`` play its steps, and are free between them."""

    page = PAGE
    drawer = None
    """The engine draws."""

    def __init__(
        self, program: Program, compiled: Compiled, threads: _native.ThreadPool, tape_of: Callable[..., Compiled] | None = None
    ) -> None:  # fmt: skip
        self._tape_of: Callable[..., Compiled] | None = tape_of
        self._hidden: tuple[_native.Tape, int] | None = None  # and the width of its rows
        self.program, self.compiled, self.threads = program, compiled, threads
        self.pages = {group.name: pool.pages for group, pool in zip(program.states, compiled.pools, strict=True)}
        self.vocab = program.values["logits"].features[-1]
        self._outside: list[dict[int, NDArray[np.uint8]]] = [{} for _ in compiled.pools]  # by group: what was swapped out, by place
        self._scoring = threading.Lock()

    def settle(self) -> None:
        """Wait until no weights are on their way to other memory or to disk, as whoever measures must."""
        self.compiled.store.settle()

    def carry_out(self, moves: Sequence[Move]) -> None:
        """Copy pages, swap them out and in, in this order."""
        for move in moves:
            pool, outside = self.compiled.pools[move.group], self._outside[move.group]
            match move:
                case CopyPage():
                    pool.copy_page(move.source, move.target)
                case SwapOut():
                    outside[move.place] = np.empty(pool.page_bytes, np.uint8)
                    pool.read_page(move.source, outside[move.place])
                case SwapIn():
                    pool.write_page(move.target, outside.pop(move.place))

    def run(self, batch: Batch, pages: Sequence[PageLists]) -> HostLogits:
        """Logits float32 [R, vocab] of the rows asked for; what the batch's sequences keep goes to their ``pages``.

        Raises ConfigError for what is out of range or does not fit together; nothing is changed then. Raises CheckpointError where
        somebody changed the file that the weights were mapped from."""
        return HostLogits(self._play(batch, pages, self.compiled.tape.run))

    def hidden(self, batch: Batch, pages: Sequence[PageLists]) -> NDArray[np.float32]:
        """Hidden states float32 [R, width] after the last norm, of the rows asked for; kept is the same as by ``run``. The first time
        compiles a tape, of the same weights and pages. Raises ConfigError for a batch of more than 512 tokens, or the context's."""
        if self._hidden is None:
            self._hidden = self._compile_hidden()
        tape, width = self._hidden
        most = min(
            STEP_TOKENS, self.program.context
        )  # what the tape plays at once: it would place a second part's rows by the logits' width
        if len(batch.tokens) > most:
            raise ConfigError(f"a batch of {len(batch.tokens)} tokens; hidden states are of at most {most} at a time")
        rows = self._play(batch, pages, tape.run)  # the tape counts rows as wide as logits, and fills the beginning of them
        return rows.reshape(-1)[: len(rows) * width].reshape(len(rows), width).copy()

    def _compile_hidden(self) -> tuple[_native.Tape, int]:
        program = fuse(hidden_states(unfuse(self.program)), IN_CHAINS)
        width = program.values[program.outputs[0]].features[-1]
        if self._tape_of is None or width > self.vocab:
            raise UnsupportedError("this session plays logits alone; --backend reference has hidden states of any model")
        return self._tape_of(program, pools=self.compiled.pools).tape, width

    def profile(self, batch: Batch, pages: Sequence[PageLists]) -> tuple[NDArray[np.float32], StepProfile]:
        """The same, and where its time went."""
        tape, played = self.compiled.tape, [(0, 0)]
        op_ns = np.zeros((tape.ops, tape.threads), np.int64)

        def play(*arguments: Any) -> None:
            played[0] = tape.profile(*(*arguments, op_ns))

        began = time.perf_counter_ns()
        logits = self._play(batch, pages, play)
        step_ns = time.perf_counter_ns() - began
        tape_ns, clock_ns = played[0]
        return logits, StepProfile(tuple(tape.op_names), op_ns, tape_ns, step_ns - clock_ns)

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [R, vocab] of whole sequences, in pages from the first on: nothing that was kept in a page outlives this."""
        pages = first_pages(self.program, batch, PAGE, self.pages)
        with self._scoring:
            return self._play(batch, pages, self.compiled.tape.run)

    def _play(self, batch: Batch, pages: Sequence[PageLists], play: Callable[..., Any]) -> NDArray[np.float32]:
        if self.compiled.store.changed:
            raise CheckpointError("the file of packed weights was changed while it was in use; start again")
        logits = np.empty((len(batch.rows), self.vocab), np.float32)
        try:
            play(batch.tokens, batch.positions, batch.offsets, batch.rows, [_native.PageTable(each) for each in pages], logits)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return logits
