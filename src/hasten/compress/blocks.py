"""A model block by block: each a piece of its Program, with its own weights as float32 tensors and the rows that reach it."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.backends.reference import play
from hasten.backends.reference.play import as_tensor
from hasten.compress.sites import Site
from hasten.compress.threads import in_order
from hasten.formats.mapped import release
from hasten.formats.weights import Array, Weights
from hasten.program import Batch, Precision, Program, lower
from hasten.spec import Spec

CHUNK = 2048  # tokens played together, whatever the number of threads

PRODUCT_ROWS = 512
"""Rows of a matrix of second moments that one thread makes at a time."""

Inputs = NDArray[np.int32]


def pieces(spec: Spec, context: int) -> tuple[Program, ...]:
    """The embedding, then each block, in float32: each part's outputs are the next one's inputs. Blocks that read keys and values of one
    before them are in one part with it."""
    return _cut(spec, context)[0]


def tail(spec: Spec, context: int) -> Program:
    """What comes behind the last of ``pieces``, in float32: the last norm and the head, which gives logits."""
    return _cut(spec, context)[1].with_outputs(["logits"])


def _cut(spec: Spec, context: int) -> tuple[tuple[Program, ...], Program]:
    rest, made = lower(spec, context=context, precision=Precision()), []
    for label in ["embedding", *(f"blocks.{index}" for index in range(len(spec.blocks)))]:
        if not rest.can_cut(label):
            continue
        part, rest = rest.cut(label)
        made.append(part.with_outputs(rest.inputs))  # without the exits on the way
    return tuple(made), rest


def weights_for(piece: Program, weights: Weights) -> dict[str, Tensor]:
    """The weights of one piece, float32, in memory of torch's own: sums must not depend on where a file maps them."""
    return {name: _copied(weights.array(name)) for name in piece.params}


def _copied(array: Array) -> Tensor:
    copy = as_tensor(array).float().clone(memory_format=torch.contiguous_format)
    release(array)
    return copy


@dataclasses.dataclass(frozen=True, slots=True)
class Live:
    """What crosses a cut, for all windows laid end to end: ``rows[name]`` is float32 [tokens, features], mapped from disk."""

    rows: Mapping[str, NDArray[np.float32]]


@dataclasses.dataclass(frozen=True, slots=True)
class Moments:
    """Over all ``rows`` a site reads: ``square`` Σ x·xᵀ float64 [in, in]; ``mean`` and ``largest`` of |x|, float32 [in]; ``cross``
    Σ u·xᵀ float64 [in, in], u what the site would read had nothing been rounded, where that was asked for."""

    square: Tensor
    mean: Tensor
    largest: Tensor
    rows: int
    cross: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Played:
    """One piece with the text that reaches it: ``chunks`` are runs of windows, each with the rows it begins and ends at."""

    piece: Program
    live: Live
    chunks: Sequence[tuple[Batch, int, int]]
    threads: int

    def outputs(self, weights: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The values of ``names`` chunk by chunk, as ``weights`` make them."""
        program = self.piece.with_outputs(names)
        needed = {name: weights[name] for name in program.params}

        def one(chunk: tuple[Batch, int, int]) -> dict[str, Tensor]:
            batch, begin, end = chunk
            with torch.inference_mode():
                given = {name: torch.from_numpy(np.array(self.live.rows[name][begin:end])) for name in program.inputs}
                return play(program, needed, batch, given=given)[0]

        return in_order(one, self.chunks, self.threads)

    def moments(
        self, weights: Mapping[str, Tensor], sites: Sequence[Site], plain: "tuple[Played, Mapping[str, Tensor]] | None" = None
    ) -> dict[Site, list[Moments]]:
        """The moments of what each site reads; sites that read the same value share them. One entry, or one per expert.

        ``plain`` is the same piece with the text that would reach it, and the weights it would have, had nothing been rounded: it gives
        ``cross``, but for experts, who may be chosen otherwise then."""
        wanted = list(dict.fromkeys((site.x, site.experts, self._experts(site)) for site in sites))
        sums = {key: [_Sum(self.piece.values[key[0]].features[-1], self.threads) for _ in range(key[2])] for key in wanted}
        names = list(dict.fromkeys(name for x, experts, _ in wanted for name in (x, experts) if name is not None))
        others = itertools.repeat(None) if plain is None else plain[0].outputs(plain[1], names)
        crosses: dict[str, Tensor] = {}
        for values, other in zip(self.outputs(weights, names), others):
            for key in wanted:
                x, experts, _ = key
                for expert, total in enumerate(sums[key]):
                    total.add(values[x].flatten(0, -2) if experts is None else _rows_of(expert, values[x], values[experts]))
                if other is not None and experts is None:
                    product = (other[x].flatten(0, -2).T @ values[x].flatten(0, -2)).double()
                    crosses[x] = crosses[x] + product if x in crosses else product
        made = {
            key: [dataclasses.replace(total.moments(), cross=crosses.get(key[0]) if key[1] is None else None) for total in totals]
            for key, totals in sums.items()
        }
        return {site: made[site.x, site.experts, self._experts(site)] for site in sites}

    def _experts(self, site: Site) -> int:
        return 1 if site.experts is None else self.piece.params[site.weight][0]

    def carry_on(self, weights: Mapping[str, Tensor], directory: Path) -> Live:
        """Play the piece and keep what it hands on in ``directory``, which appears whole or not at all."""
        return keep(self.outputs(weights, self.piece.outputs), self.piece, self.chunks[-1][2], directory)


def keep(outputs: Iterator[dict[str, Tensor]], piece: Program, tokens: int, directory: Path) -> Live:
    """What ``piece`` hands on, chunk by chunk, written to ``directory``."""
    staging = directory.with_name(f".{directory.name}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    files = {
        name: np.lib.format.open_memmap(staging / f"{index}.npy", mode="w+", dtype=np.float32, shape=(tokens, *piece.values[name].features))
        for index, name in enumerate(piece.outputs)
    }
    begin = 0
    for values in outputs:
        for name, file in files.items():
            file[begin : begin + len(values[name])] = values[name].numpy()
        begin += len(values[piece.outputs[0]])
    for file in files.values():
        file.flush()
    staging.rename(directory)
    return opened(directory, piece)


def opened(directory: Path, piece: Program) -> Live:
    """What ``piece`` once handed on, from ``directory``."""
    return Live({name: np.load(directory / f"{index}.npy", mmap_mode="r", allow_pickle=False) for index, name in enumerate(piece.outputs)})


def chunks_of(windows: Sequence[Sequence[int]]) -> tuple[tuple[Batch, int, int], ...]:
    """Windows in order, as many together as CHUNK tokens hold, at least one; no logits are asked for."""
    made: list[tuple[Batch, int, int]] = []
    together: list[Sequence[int]] = []
    begin = size = 0
    for window in (*windows, None):
        if together and (window is None or size + len(window) > CHUNK):
            made.append((Batch.of(together, rows="none"), begin, begin + size))
            begin, size, together = begin + size, 0, []
        if window is not None:
            together.append(window)
            size += len(window)
    return tuple(made)


def _rows_of(expert: int, x: Tensor, experts: Tensor) -> Tensor:
    """The rows that one expert reads: of x [T, in] those of its tokens, of x [T, A, in] its own."""
    chosen = experts == expert
    return x[chosen.any(-1)] if x.dim() == 2 else x[chosen]


class _Sum:
    """Moments as they grow. Every product is made whole by one thread, in float32 over one chunk, and added in float64."""

    def __init__(self, size: int, threads: int) -> None:
        self._square = torch.zeros(size, size, dtype=torch.float64)
        self._sum, self._largest, self._rows, self._threads = torch.zeros(size, dtype=torch.float64), torch.zeros(size), 0, threads

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        x = x.contiguous()

        def one(begin: int) -> None:
            stop = begin + PRODUCT_ROWS
            self._square[begin:stop, begin:] += x[:, begin:stop].T @ x[:, begin:]

        for _ in in_order(one, range(0, x.shape[1], PRODUCT_ROWS), self._threads):
            pass
        size = x.abs()
        self._sum += size.sum(0, dtype=torch.float64)
        self._largest = torch.maximum(self._largest, size.amax(0))
        self._rows += len(x)

    def moments(self) -> Moments:
        square = self._square
        for begin in range(0, len(square), PRODUCT_ROWS):  # what lies above the diagonal, below it; in place, for it is large
            stop = begin + PRODUCT_ROWS
            own = square[begin:stop, begin:stop]
            own.copy_(own.triu() + own.triu(1).T)
            square[stop:, begin:stop] = square[begin:stop, stop:].T
        return Moments(square, (self._sum / max(1, self._rows)).float(), self._largest, self._rows)
