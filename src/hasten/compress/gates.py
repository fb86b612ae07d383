"""What must hold of a compressed model before it is kept."""

import dataclasses
import glob
import secrets
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import CheckpointError, UserError
from hasten.checkpoint import load_directory, save
from hasten.engine.backends import choose_judge, open_scorer
from hasten.formats.linear import ClusteredLinear, QuantizedLinear
from hasten.formats.mapped import release
from hasten.formats.quantized import QuantizedWeight, StaticWeight, is_pruned
from hasten.measure.compare import Comparison
from hasten.model import Model
from hasten.program import Batch, lower
from hasten.program.pages import sequence_bytes

PROBE = 64  # tokens that a reloaded model is compared on

A_CACHE = "the cache of a whole sequence"
PAGE = 16  # tokens of its pages


GROWTH = 1.1
"""What all weights may grow by where the cache is what gets smaller."""


class GateError(UserError):
    """A compressed model is not worth keeping."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shrunk:
    """Bytes ``before`` and ``after`` of ``what`` was made smaller: "rounded weights", or "pruned weights" where none was rounded; where
    shapes changed "blocks", or where those are no smaller A_CACHE."""

    what: str
    before: int
    after: int


def require_smaller(original: Model, model: Model) -> Shrunk:
    """What got smaller. Raises GateError for a stored form that is no smaller than what it stands for, or where nothing is smaller."""
    same = original.spec.blocks == model.spec.blocks and original.spec.width == model.spec.width
    before = after = 0
    for name, weight in model.weights.items():
        if not isinstance(weight, QuantizedWeight):
            continue
        old = original.weights[name].nbytes if same and name in original.weights else 2 * weight.size
        if weight.nbytes >= old:
            raise GateError(
                f"{name} takes {weight.nbytes:,} bytes in {weight.form} and took {old:,}: no smaller; skip it, or take fewer bits"
            )
        before, after = before + old, after + weight.nbytes
    rounded = any(isinstance(weight, QuantizedWeight) and not is_pruned(weight) for weight in model.weights.values())
    shrunk = Shrunk("rounded weights" if rounded else "pruned weights", before, after)
    if not same:
        blocks, cache = (
            Shrunk(what, size(original), size(model)) for what, size in (("blocks", _bytes_of_blocks), (A_CACHE, _bytes_of_cache))
        )
        shrunk = blocks if blocks.after < blocks.before else cache
        if shrunk is cache and model.weights.nbytes > GROWTH * original.weights.nbytes:
            raise GateError(
                f"the cache got smaller, but all weights went from {original.weights.nbytes:,} to {model.weights.nbytes:,} bytes; start "
                f"from a model that is not rounded, and round last"
            )
    if not shrunk.after or shrunk.after >= shrunk.before:
        raise GateError("no weight was made smaller, so there is nothing to save")
    return shrunk


def _bytes_of_blocks(model: Model) -> int:
    return sum(weight.nbytes for name, weight in model.weights.items() if name.startswith("blocks."))


def _bytes_of_cache(model: Model) -> int:
    return sequence_bytes(lower(model.spec, cache="bfloat16"), PAGE)


def require_loss(found: Comparison, most: float) -> None:
    """Raise GateError where the loss rose by more than the share ``most``."""
    if not found.increase <= most:
        raise GateError(
            f"the held-out loss went from {found.base_loss:.4f} to {found.loss:.4f}, {found.increase:+.2%}, and {most:.2%} are allowed; "
            f"take more bits, smaller groups or another method, or allow more"
        )


def save_checked(model: Model, directory: Path, *, overwrite: bool = False) -> None:
    """``save``, but the directory appears only once what was written has been read back and plays to the same logits.

    Raises CheckpointError where it does not."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise CheckpointError(f"{directory} exists and is not empty; choose another directory, or overwrite it on purpose")
    directory.parent.mkdir(parents=True, exist_ok=True)
    own = f".{glob.escape(directory.name)}.*.trial"
    for left in (*directory.parent.glob(own), *directory.parent.glob(f".{own}.*")):  # of a run that was killed, while saving or after
        shutil.rmtree(left, ignore_errors=True)
    trial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.trial")
    try:
        save(model, trial)
        check_written(model, load_directory(trial, model.name))
        if overwrite and directory.exists():
            save(load_directory(trial, model.name), directory, overwrite=True)
        else:
            if directory.exists():
                directory.rmdir()  # empty
            trial.rename(directory)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def check_written(model: Model, read: Model) -> None:
    """Raise CheckpointError where ``read``, from disk, is not ``model``: other codes or scales, other activations, or other logits."""
    for name, weight in model.weights.items():
        other = read.weights[name]
        if not isinstance(weight, QuantizedWeight):
            continue
        if not isinstance(other, QuantizedWeight):
            raise CheckpointError(f"{name} was written in {weight.form} and read back as {other.dtype}; nothing was kept")
        if (weight.form, weight.activations) != (other.form, other.activations):
            found = f"{other.form} × {other.activations}"
            raise CheckpointError(f"{name} was written as {weight.form} × {weight.activations} and read back as {found}; nothing was kept")
        if isinstance(weight, StaticWeight) and isinstance(other, StaticWeight) and weight.input_scale != other.input_scale:
            raise CheckpointError(f"{name} was read back with another scale of activations than was written; nothing was kept")
        if not _equal(written := weight.quantized(), other.quantized()):
            raise CheckpointError(f"{name} was read back with other numbers than were written; nothing was kept")
        release(written.q)
    if _kept(model) != _kept(read):
        raise CheckpointError("the cache's format or scales were read back other than they were written; nothing was kept")
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab, min(PROBE, model.spec.context)).tolist()
    first, second = (_logits(each, tokens) for each in (model, read))
    if not np.array_equal(first, second, equal_nan=True):
        raise CheckpointError(f"what was written gives logits that differ by {np.abs(first - second).max():.3g}; nothing was kept")


def _logits(model: Model, tokens: list[int]) -> NDArray[np.float32]:
    return open_scorer(model, choose_judge(model), len(tokens)).score(Batch.of([tokens]))


def _kept(model: Model) -> tuple[str, dict[str, list[float]]] | None:
    cache = model.cache
    return None if cache is None else (cache.format, {name: scale.load().ravel().tolist() for name, scale in cache.scales.items()})


def _equal(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    pairs = [(a.q, b.q), (a.scales, b.scales), (a.zeros, b.zeros)]
    if isinstance(a, ClusteredLinear) and isinstance(b, ClusteredLinear):
        pairs.append((a.codebook, b.codebook))
    return (
        a.group == b.group
        and type(a) is type(b)
        and all((x is None) == (y is None) and (x is None or y is None or np.array_equal(x, y)) for x, y in pairs)
    )
