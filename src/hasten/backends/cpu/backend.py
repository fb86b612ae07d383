"""The native backend as an engine sees it."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten import _native
from hasten.backends.cpu.cache import CachedSequence, CpuState, PageAllocator
from hasten.backends.cpu.compile import Compiled, compile_program, unsupported_ops
from hasten.backends.cpu.profile import StepProfile
from hasten.base import hardware
from hasten.base.errors import ConfigError, UnsupportedError, one_line
from hasten.model import Model
from hasten.program import Batch, LinearFormats, Program, lower, ops

PAGE = 16  # tokens
STEP_TOKENS = 512  # most tokens of one native step; longer batches are played in several
FORMATS = ("bf16", "int8", "int4")


class CpuBackend:
    """``threads`` are all cores granted unless given; ``isa`` forces a lower instruction-set level."""

    name = "cpu"

    def __init__(self, threads: int | None = None, isa: str = "best") -> None:
        self.isa = isa
        self.threads = hardware.detect().cpu.cores if threads is None else threads

    def refusals(self, model: Model) -> tuple[str, ...]:
        """What of ``model`` has no native kernel; empty where it runs here."""
        formats = sorted({f"weights in {weight.format}" for weight in model.weights.values() if weight.format != "dense"})
        return (*unsupported_ops(lower(model.spec)), *formats)

    def session(self, model: Model, context: int | None = None, weights: str | None = None) -> "CpuSession":
        """The model packed for this machine, for sequences of up to ``context`` tokens.

        ``weights`` is how linear layers are stored: bf16 (unless given), or int8 or int4 with activations rounded to int8 per token."""
        weights = weights or "bf16"
        if weights not in FORMATS:
            raise UnsupportedError(f"weights {one_line(weights)} are not supported; accepted are {', '.join(FORMATS)}")
        formats = choose_formats(lower(model.spec, context=context), weights)
        program = lower(model.spec, context=context, formats=formats, cache="bfloat16")
        pages = _page_counts(program)
        compiled = compile_program(
            program, model.weights, _native.ThreadPool(self.threads), isa=self.isa,
            most_tokens=min(STEP_TOKENS, program.context), page=PAGE, pages=pages,
        )  # fmt: skip
        return CpuSession(program, compiled)

    def logits(self, model: Model, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 [T, vocab] of one sequence."""
        batch = Batch.of([token_ids])
        if len(batch.tokens) > model.spec.context:
            raise ConfigError(f"{len(batch.tokens)} tokens are more than the model's context of {model.spec.context}; shorten the input")
        return self.session(model, len(batch.tokens)).score(batch)


def choose_formats(program: Program, weights: str) -> LinearFormats:
    """Every linear layer in ``weights``, the head in int8 where that is narrower, the embedding as it is."""
    if weights == "bf16":
        return LinearFormats()
    linear = [op for op in program.ops if isinstance(op, ops.Linear)]
    return LinearFormats(
        weights={op.weight: "int8" if op.y == "logits" else weights for op in linear}, activations={op.weight: "int8" for op in linear}
    )


def _page_counts(program: Program) -> Mapping[str, int]:
    """As many pages as a quarter of free memory holds, and no more than 64 sequences of full length need. They cost nothing till used."""
    budget = (hardware.memory(hardware.ROOT).available or 8 << 30) // 4
    per_token = max(1, sum(group.bytes_per_token() for group in program.states))
    pages = min(64 * -(-program.context // PAGE), max(budget // (per_token * PAGE), -(-program.context // PAGE)))
    return {group.name: pages for group in program.states}


class CpuSession:
    """One compiled Program and its cache."""

    def __init__(self, program: Program, compiled: Compiled) -> None:
        self.program, self.compiled = program, compiled
        self.allocators = [PageAllocator(pool.pages) for pool in compiled.pools]
        self.vocab = program.values["logits"].features[-1]
        self.most_tokens = min(STEP_TOKENS, program.context)

    def start(self, sequences: int) -> CpuState:
        """The state of sequences that have seen nothing."""
        return CpuState(tuple(CachedSequence(self.allocators, PAGE) for _ in range(sequences)))

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [R, vocab] of whole sequences; nothing is carried on."""
        return self.step(batch, self.start(len(batch.offsets) - 1))[0]

    def step(self, batch: Batch, state: CpuState) -> tuple[NDArray[np.float32], CpuState]:
        """Logits float32 [R, vocab] of the rows asked for, and the state afterwards (the same sequences, longer)."""
        return self._step(batch, state, self.compiled.tape.run), state

    def profile(self, batch: Batch, state: CpuState) -> tuple[NDArray[np.float32], CpuState, StepProfile]:
        """A step as ``step`` takes it, and where its time went."""
        tape, played = self.compiled.tape, list[tuple[NDArray[np.int64], int]]()
        began = time.perf_counter_ns()
        logits = self._step(batch, state, lambda *arguments: played.append(tape.profile(*arguments)))
        step_ns = time.perf_counter_ns() - began
        op_ns = np.sum([each for each, _ in played], axis=0)
        return logits, state, StepProfile(tuple(tape.op_names), op_ns, sum(whole for _, whole in played), step_ns)

    def _step(self, batch: Batch, state: CpuState, play: Callable[..., None]) -> NDArray[np.float32]:
        """Play the batch in pieces that a native step takes, each by ``play``."""
        self._check(batch)
        offsets = batch.offsets
        starts = batch.positions[offsets[:-1]] if len(batch.tokens) else batch.positions[:0]
        for index, (sequence, start) in enumerate(zip(state.sequences, starts, strict=True)):
            if sequence.length != start:
                raise ConfigError(f"sequence {index} goes on at position {start}, but {sequence.length} of its tokens are cached")
        logits = np.empty((len(batch.rows), self.vocab), np.float32)
        for begin in range(0, len(batch.tokens), self.most_tokens):
            self._play(batch, state, begin, min(begin + self.most_tokens, len(batch.tokens)), logits, play)
        return logits

    def _check(self, batch: Batch) -> None:
        """The native step refuses these too, but not in words for a user."""
        if len(batch.tokens) and not 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < self.vocab:
            raise ConfigError(f"token id {int(batch.tokens.max())} is outside the vocabulary; accepted are 0 to {self.vocab - 1}")
        if len(batch.positions) and int(batch.positions.max()) >= self.program.context:
            longest = self.program.context
            raise ConfigError(f"position {int(batch.positions.max())} is beyond the context of {longest} tokens; shorten the input")

    def _play(
        self, batch: Batch, state: CpuState, begin: int, end: int, logits: NDArray[np.float32], play: Callable[..., None]
    ) -> None:  # fmt: skip
        """One native step over rows [begin, end) of the batch."""
        first = int(np.searchsorted(batch.offsets, begin, side="right")) - 1
        last = int(np.searchsorted(batch.offsets, end, side="left"))
        offsets = np.clip(batch.offsets[first : last + 1], begin, end) - begin
        positions = batch.positions[begin:end]
        sequences = state.sequences[first:last]
        for sequence, stop in zip(sequences, offsets[1:]):
            sequence.grow(int(positions[stop - 1]) + 1)
        owner = np.repeat(np.arange(len(sequences)), np.diff(offsets))
        slots, tables = [], []
        for group in range(len(self.allocators)):
            width = max(len(sequence.pages[group]) for sequence in sequences)
            table = np.zeros((len(sequences), width), np.int32)
            for row, sequence in enumerate(sequences):
                table[row, : len(sequence.pages[group])] = sequence.pages[group]
            tables.append(table)
            slots.append(table[owner, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE)
        wanted = np.flatnonzero((batch.rows >= begin) & (batch.rows < end))
        made = np.empty((len(wanted), self.vocab), np.float32)
        rows = (batch.rows[wanted] - begin).astype(np.int32)
        play(
            np.ascontiguousarray(batch.tokens[begin:end]),
            np.ascontiguousarray(positions),
            offsets.astype(np.int32),
            rows,
            slots,
            tables,
            made,
        )
        logits[wanted] = made
        for sequence, stop in zip(sequences, offsets[1:]):
            sequence.length = int(positions[stop - 1]) + 1
