"""The native backend as an engine sees it."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten import _native
from hasten.backends.cpu.cache import CachedSequence, CpuState, PageAllocator, PagedGroup
from hasten.backends.cpu.compile import IN_CHAINS, Compiled, compile_program, unsupported_ops
from hasten.backends.cpu.packed import PackedCache, PackedWeights
from hasten.backends.cpu.profile import StepProfile
from hasten.base import hardware
from hasten.base.errors import CheckpointError, ConfigError
from hasten.formats.cache import cache_format
from hasten.model import Model
from hasten.program import Batch, Formats, KvGroup, LatentGroup, Program, fuse, linear_formats, lower
from hasten.spec import Spec

PAGE = 16  # tokens
STEP_TOKENS = 512  # most tokens of one native step; longer batches are played in several


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

    def session(self, model: Model, context: int | None = None, formats: Formats | None = None) -> "CpuSession":
        """The model packed for this machine, for sequences of up to ``context`` tokens; in bf16 unless ``formats`` says otherwise."""
        program = native_program(model.spec, context, formats)
        pages = _page_counts(program)
        threads = _native.ThreadPool(self.threads)
        packed = PackedWeights(threads, _native.isa_level(self.isa), model.name, model.weights.origin, PackedCache.of_user())
        compiled = compile_program(
            program, model.weights, packed, threads, isa=self.isa,
            most_tokens=min(STEP_TOKENS, program.context), page=PAGE, pages=pages,
        )  # fmt: skip
        return CpuSession(program, compiled, threads)

    def logits(self, model: Model, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 [T, vocab] of one sequence."""
        batch = Batch.of([token_ids])
        if len(batch.tokens) > model.spec.context:
            raise ConfigError(f"{len(batch.tokens)} tokens are more than the model's context of {model.spec.context}; shorten the input")
        return self.session(model, len(batch.tokens)).score(batch)


def native_program(spec: Spec, context: int | None = None, formats: Formats | None = None) -> Program:
    """What a session compiles: the Program with formats chosen and ops fused. Raises UnsupportedError for formats nobody has."""
    formats = formats or Formats()
    linear = linear_formats(lower(spec, context=context), dataclasses.replace(formats, weights=formats.weights or "bf16"))
    return fuse(lower(spec, context=context, formats=linear, cache=cache_format(formats.cache or "bf16")), IN_CHAINS)


def _page_counts(program: Program) -> Mapping[str, int]:
    """As many pages as a quarter of free memory holds, and no more than 64 sequences of full length need. They cost nothing till used."""
    budget = (hardware.memory(hardware.ROOT).available or 8 << 30) // 4
    per_token = max(1, sum(group.bytes_per_token() for group in program.states))
    pages = min(64 * -(-program.context // PAGE), max(budget // (per_token * PAGE), -(-program.context // PAGE)))
    return {group.name: pages for group in program.states}


class CpuSession:
    """One compiled Program and its cache. ``threads`` play its steps, and are free between them."""

    def __init__(self, program: Program, compiled: Compiled, threads: _native.ThreadPool) -> None:
        self.program, self.compiled, self.threads = program, compiled, threads
        self.allocators = [PageAllocator(pool.pages) for pool in compiled.pools]
        kept = [group for group in program.states if isinstance(group, KvGroup | LatentGroup)]  # in the order of the pools
        self._groups = [
            PagedGroup(allocator, pool.copy_page, group.oldest_visible)
            for allocator, pool, group in zip(self.allocators, compiled.pools, kept, strict=True)
        ]
        self.vocab = program.values["logits"].features[-1]

    def start(self, sequences: int) -> CpuState:
        """The state of sequences that have seen nothing."""
        return CpuState(tuple(CachedSequence(self._groups, PAGE) for _ in range(sequences)))

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [R, vocab] of whole sequences; nothing is carried on."""
        return self.step(batch, self.start(len(batch.offsets) - 1))[0]

    def step(self, batch: Batch, state: CpuState) -> tuple[NDArray[np.float32], CpuState]:
        """Logits float32 [R, vocab] of the rows asked for, and the state afterwards (the same sequences, longer).

        Raises ConfigError for a batch that does not go on from ``state``, or asks for what is not there; nothing is changed
        then. Raises CheckpointError where somebody changed the file that the weights were mapped from."""
        return self._step(batch, state, self.compiled.tape.run), state

    def profile(self, batch: Batch, state: CpuState) -> tuple[NDArray[np.float32], CpuState, StepProfile]:
        """A step as ``step`` takes it, and where its time went."""
        tape, played = self.compiled.tape, [(0, 0)]
        op_ns = np.zeros((tape.ops, tape.threads), np.int64)

        def play(*arguments: Any) -> None:
            played[0] = tape.profile(*(*arguments, op_ns))

        began = time.perf_counter_ns()
        logits = self._step(batch, state, play)
        step_ns = time.perf_counter_ns() - began
        tape_ns, clock_ns = played[0]
        return logits, state, StepProfile(tuple(tape.op_names), op_ns, tape_ns, step_ns - clock_ns)

    def _step(self, batch: Batch, state: CpuState, play: Callable[..., Any]) -> NDArray[np.float32]:
        sequences, bounds = state.sequences, batch.offsets.tolist()
        if len(bounds) - 1 != len(sequences):
            raise ConfigError(f"a batch of {len(bounds) - 1} sequences does not go on from a state of {len(sequences)}")
        if self.compiled.store.changed:
            raise CheckpointError("the file of packed weights was changed while it was in use; start again")
        lengths = []
        for index, sequence in enumerate(sequences):
            start, stop = sequence.length, sequence.length + bounds[index + 1] - bounds[index]
            if (said := batch.positions.item(bounds[index])) != start:
                raise ConfigError(f"sequence {index} goes on at position {said}, but {start} of its tokens are cached")
            if stop > self.program.context:
                longest = self.program.context
                raise ConfigError(f"position {stop - 1} is beyond the context of {longest} tokens; shorten the input")
            lengths.append(stop)
        for sequence, length in zip(sequences, lengths):
            sequence.grow(length)
        logits = np.empty((len(batch.rows), self.vocab), np.float32)
        tables = [sequence.table for sequence in sequences]
        try:
            play(batch.tokens, batch.positions, batch.offsets, batch.rows, tables, logits)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for sequence, length in zip(sequences, lengths):
            sequence.length = length
            sequence.release()
        return logits
