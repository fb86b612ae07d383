"""The native backend as an engine sees it."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten import _native
from hasten.backends.cpu.cache import CachedSequence, CpuState, PageAllocator
from hasten.backends.cpu.compile import IN_CHAINS, Compiled, compile_program, unsupported_ops
from hasten.base import hardware
from hasten.base.errors import ConfigError
from hasten.model import Model
from hasten.program import Batch, Formats, Program, fuse, linear_formats, lower
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


def native_program(spec: Spec, context: int | None = None, formats: Formats | None = None) -> Program:
    """What a session compiles: the Program with formats chosen and ops fused. Raises UnsupportedError for formats nobody has."""
    formats = formats or Formats()
    linear = linear_formats(lower(spec, context=context), dataclasses.replace(formats, weights=formats.weights or "bf16"))
    return fuse(lower(spec, context=context, formats=linear, cache=formats.cache or "bfloat16"), IN_CHAINS)


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

    def start(self, sequences: int) -> CpuState:
        """The state of sequences that have seen nothing."""
        return CpuState(tuple(CachedSequence(self.allocators, PAGE) for _ in range(sequences)))

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [R, vocab] of whole sequences; nothing is carried on."""
        return self.step(batch, self.start(len(batch.offsets) - 1))[0]

    def step(self, batch: Batch, state: CpuState) -> tuple[NDArray[np.float32], CpuState]:
        """Logits float32 [R, vocab] of the rows asked for, and the state afterwards (the same sequences, longer).

        Raises ConfigError for a batch that does not go on from ``state``, or asks for what is not there; nothing is changed then."""
        sequences, bounds = state.sequences, batch.offsets.tolist()
        if len(bounds) - 1 != len(sequences):
            raise ConfigError(f"a batch of {len(bounds) - 1} sequences does not go on from a state of {len(sequences)}")
        lengths = []
        for index, sequence in enumerate(sequences):
            start, stop = sequence.length, sequence.length + bounds[index + 1] - bounds[index]
            if batch.positions[bounds[index]] != start:
                said = int(batch.positions[bounds[index]])
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
            self.compiled.tape.run(batch.tokens, batch.positions, batch.offsets, batch.rows, tables, logits)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for sequence, length in zip(sequences, lengths):
            sequence.length = length
        return logits, state
