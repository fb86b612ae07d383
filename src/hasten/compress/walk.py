"""Working through a model block by block, so that a run that was killed goes on where it was, to the same bits."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.base import hardware, heap
from hasten.base.errors import ConfigError, UserError
from hasten.compress.blocks import Live, Played, chunks_of, opened, pieces, weights_for
from hasten.compress.data import Text
from hasten.compress.threads import one_torch_thread
from hasten.formats.mapped import release
from hasten.formats.safetensors import SafetensorsFile, layout_of, write
from hasten.formats.weights import Array, Weights
from hasten.model import Model
from hasten.program import Program

VERSION = 2
"""Counts up whenever the same settings come to other numbers: a run of another version is not gone on with."""

Report = Callable[[str, int, int], None]
"""Told what is being done, and how many of how many blocks are done."""


def silent(doing: str, done: int, of: int) -> None:
    """A Report that tells nobody."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Where and how a transform works: in the folder ``work``, with ``threads`` threads, telling ``report``. Results depend on neither."""

    work: Path
    threads: int
    report: Report = silent

    @classmethod
    def at(cls, work: Path, report: Report = silent) -> "Run":
        """In ``work``, on all cores granted."""
        return cls(work, hardware.detect().cpu.cores, report)

    def part(self, name: str) -> "Run":
        """The same in a folder of its own within."""
        return dataclasses.replace(self, work=self.work / name)


@dataclasses.dataclass(frozen=True, slots=True)
class Treated:
    """What was made of a block: ``arrays`` and ``facts`` to keep, and the ``weights`` that the next blocks' inputs are made with."""

    arrays: Mapping[str, Array]
    facts: Mapping[str, Any]
    weights: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A block to be treated: its piece of the Program, its ``weights`` as float32 tensors, and the text that reaches it, if any is used:
    ``played`` as the treated blocks before it give it, ``plain`` as the blocks before it gave it untreated."""

    index: int
    piece: Program
    weights: Mapping[str, Tensor]
    played: Played | None
    plain: Played | None
    threads: int

    def text(self) -> Played:
        """The text that reaches the block. Raises ConfigError where the transform was given none."""
        if self.played is None:
            raise ConfigError("this transform looks at activations, so it needs text to calibrate on")
        return self.played


@dataclasses.dataclass(frozen=True, slots=True)
class Walked:
    """What was kept of every block: files to be mapped, and the facts by weight or value."""

    files: Sequence[SafetensorsFile]
    facts: Mapping[str, Any]


def walk(
    model: Model, settings: msgspec.Struct, text: Text | None, run: Run, treat: Callable[[Block], Treated], *, plain: bool = False
) -> Walked:
    """``treat`` every block in order, each fed what the treated blocks before it made of ``text``; with ``plain``, beside that what they
    made of it untreated.

    Kept in ``run.work``: what was made of each block, and what reaches the next. A later call with the same model, ``settings`` and text
    goes on behind the last block that was finished, and comes to the same bits. Raises UserError where the folder is another run's."""
    if text is not None and any(block.shares is not None for block in model.spec.blocks):
        raise ConfigError(
            "layers share weights, which working block by block would treat twice; round them with rtn, without clip: outputs"
        )
    heap.large_apart()
    key = fingerprint(model, settings, text)
    run.work.mkdir(parents=True, exist_ok=True)
    claim(run.work, key)
    parts = pieces(model.spec, 1 if text is None else text.longest)
    count = len(parts) - 1
    files = [run.work / f"block-{index:04d}.safetensors" for index in range(count)]
    first = next((index for index, file in enumerate(files) if not file.is_file()), count)
    ways = ("live", "plain") if plain else ("live",)
    with one_torch_thread(), torch.no_grad():
        lives = {way: _live(model.weights, parts, text, run, first, way) for way in ways} if text is not None and first < count else {}
        for index in range(first, count):
            run.report(f"block {index}", index, count)
            piece, weights = parts[index + 1], weights_for(parts[index + 1], model.weights)
            chunks = () if text is None else chunks_of(text.windows)
            played = {way: Played(piece, live, chunks, run.threads) for way, live in lives.items()}
            made = treat(Block(index, piece, weights, played.get("live"), played.get("plain"), run.threads))
            if index + 1 < count:
                after = {"live": made.weights, "plain": weights}
                lives = {way: _carry_on(each, after[way], _path(run.work, way, index + 1)) for way, each in played.items()}
            arrays = {name: np.ascontiguousarray(array) for name, array in made.arrays.items()}
            write(files[index], layout_of(arrays), arrays.__getitem__, {"facts": json.dumps(made.facts)})
            for way in ways:
                shutil.rmtree(_path(run.work, way, index), ignore_errors=True)
    run.report("done", count, count)
    for way in ways:
        shutil.rmtree(_path(run.work, way, count - 1), ignore_errors=True)
    kept = [SafetensorsFile.open(file) for file in files]
    return Walked(kept, {name: fact for file in kept for name, fact in json.loads(file.metadata["facts"]).items()})


def fingerprint(model: Model, settings: msgspec.Struct, text: Text | None) -> str:
    """One string for everything the result depends on: the Spec, every weight's numbers, the settings, the text."""
    digest = hashlib.sha256(f"{VERSION} {type(settings).__name__} {torch.__version__}".encode())
    digest.update(msgspec.json.encode(settings, order="sorted"))
    digest.update(msgspec.json.encode(model.spec))
    digest.update(b"" if text is None else text.sha256.encode())
    for name, array in model.weights.arrays():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        release(array)
    return digest.hexdigest()


def claim(work: Path, key: str) -> None:
    """The folder belongs to this run, now or from before."""
    file = work / "run.json"
    if file.is_file():
        if json.loads(file.read_text("utf-8")).get("key") != key:
            raise UserError(f"{work} holds an unfinished run of another model, recipe or text; remove it, or name another folder")
        return
    partial = work / ".run.json.partial"
    if any(path != partial for path in work.iterdir()):
        raise UserError(f"{work} is not empty and holds no run to go on with; name another folder")
    partial.write_text(json.dumps({"key": key}) + "\n", "utf-8")
    partial.rename(file)


def _live(weights: Weights, parts: Sequence[Program], text: Text, run: Run, first: int, way: str) -> Live:
    """What reaches block ``first``: kept from before, or, for the first of all, made of the embedding."""
    directory = _path(run.work, way, first)
    if directory.is_dir():
        return opened(directory, parts[first])
    if first:
        raise UserError(f"{run.work} lacks what block {first} is to be fed, so the run cannot go on; remove it and begin anew")
    run.report("embedding", 0, len(parts) - 1)
    played = Played(parts[0], Live({}), chunks_of(text.windows), run.threads)
    return _carry_on(played, weights_for(parts[0], weights), directory)


def _carry_on(played: Played, weights: Mapping[str, Tensor], directory: Path) -> Live:
    return played.carry_on(weights, cleared(directory))


def cleared(directory: Path) -> Path:
    """The same, with nothing there any more, also of a run that was killed."""
    for left in (directory, directory.with_name(f".{directory.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    return directory


def _path(work: Path, way: str, index: int) -> Path:
    return work / f"{way}-{index:04d}"
