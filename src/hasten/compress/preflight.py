"""What a recipe will take, told before it starts."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from hasten.backends.reference import ReferenceBackend
from hasten.base import hardware
from hasten.base.errors import UserError
from hasten.compress.block_qat import BlockQat
from hasten.compress.blocks import CHUNK, pieces
from hasten.compress.convert.linear import LinearLayers
from hasten.compress.data import Text
from hasten.compress.heal import Heal
from hasten.compress.mixed import Mixed
from hasten.compress.pruning import Pruning
from hasten.compress.recipe import Step
from hasten.compress.rounding import Rounding, Uniform
from hasten.compress.sites import Layers, sites_of
from hasten.model import Model
from hasten.program import Program, lower, ops

WORKING = 350 << 20
"""Bytes of Python, torch and everything else that does not grow with the model."""


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of memory at the most, and of disk in the work folder."""

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"about {self.memory / 2**30:.1f} GiB of memory and {self.disk / 2**30:.1f} GiB of disk for work"

    def require(self, folder: Path) -> None:
        """Raise UserError where memory or the disk that ``folder`` is to lie on has less."""
        available = hardware.memory(hardware.ROOT).available
        if available is not None and self.memory > available:
            raise UserError(
                f"this takes about {self.memory / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB are free; "
                f"take fewer threads or samples, or a machine with more"
            )
        free = hardware.free_disk(folder)
        if free is not None and self.disk > free:
            raise UserError(
                f"{folder}: work takes about {self.disk / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; name another --work"
            )


def estimate(model: Model, recipe: Sequence[Step], text: Text | None, threads: int) -> Estimate:
    """One block's weights four times over (as they are, as they become, and being rounded), the moments of its widest input with their
    factors, a chunk of text a thread; or the embedding, or the result and the original as they are measured, where that is larger. On
    disk, codes, bf16 of what is pruned, and the inputs of two blocks, in two ways.

    Where bits are chosen by layer, once more for every choice; on disk, the inputs of all blocks, of the windows that are measured on."""
    parts = pieces(model.spec, 2 if text is None else text.longest)
    backend = ReferenceBackend()
    most = stored = rows = all_rows = 0
    choices = max((len(step.settings.forms) for step in recipe if isinstance(step.settings, Mixed)), default=0)
    for piece in parts:
        weights = 4 * sum(math.prod(shape) for shape in piece.params.values())
        sites = sites_of(piece, Layers())
        stored += sum(math.prod(piece.params[site.weight]) for site in sites)
        memory = weights * (4 + choices if sites else 1)
        if text is not None:
            memory += (threads + 1) * backend.arena_bytes(piece, min(CHUNK, text.tokens))
            crossing = sum(math.prod(piece.values[name].features) for name in piece.outputs)
            rows, all_rows = max(rows, crossing), all_rows + crossing
            widest = max((piece.params[site.weight][-1] for site in sites), default=0)
            experts = max((math.prod(piece.params[site.weight][:-2]) for site in sites), default=1)
            memory += 8 * widest**2 * (2 * experts + 3)
            if any(isinstance(step.settings, LinearLayers) for step in recipe):
                memory += threads * _features(piece, text.longest)
            if any(isinstance(step.settings, BlockQat) for step in recipe):  # what all of the text is to give, masters and their moments
                memory += 4 * text.tokens * crossing + 4 * weights
        most = max(most, memory)
    rounding = any(isinstance(step.settings, Rounding) for step in recipe)
    windows = max((step.settings.measure for step in recipe if isinstance(step.settings, Mixed)), default=0)
    measured = 0 if text is None else 4 * sum(map(len, text.windows[:windows])) * (all_rows + 2 * rows)
    prunings = sum(isinstance(step.settings, Pruning) for step in recipe)  # of which each keeps bf16, zeros too
    disk = 2 * stored * prunings + (stored * 5 // 4 if rounding else 0) + max(measured, 0 if text is None else 16 * text.tokens * rows)
    learning = [_learning(model, step.settings) for step in recipe if isinstance(step.settings, Heal)]
    return Estimate(
        WORKING + max(most, _played(model, recipe), *(each.memory for each in learning)), max(disk, *(each.disk for each in learning), 0)
    )


def _features(piece: Program, length: int) -> int:
    """Weights of both attentions over a window, below the diagonal, with as much in passing, and the features of its queries."""
    return sum(8 * op.heads * length * (length + 8 * op.head_dim) for op in piece.ops if isinstance(op, ops.Attend))


def _learning(model: Model, settings: Heal) -> Estimate:
    """Float32 masters with what they are played with, their gradients, two moments and the original; the values of the tokens that are
    played at once, and twice those of their logits. On disk, masters and moments."""
    program = settings.training().program(model.spec, settings.length(model, model))
    size = sum(math.prod(shape) for shape in program.params.values())
    values = sum(math.prod(value.features) for value in program.values.values())
    tokens = max(settings.together, settings.length(model, model))
    if settings.recompute:
        values //= max(1, len(model.spec.blocks) // 2)
    return Estimate(4 * (6 * size + tokens * (values + 3 * model.spec.vocab)), 12 * size)


def _played(model: Model, recipe: Sequence[Step]) -> int:
    """Bytes of the result as it is played to be checked, and of the original where there is text to measure both on."""
    uniform = [step.settings.form for step in recipe if isinstance(step.settings, Uniform)]
    mixed = [form for step in recipe if isinstance(step.settings, Mixed) for form in step.settings.forms]
    bits = max((form.bits for form in (*uniform, *mixed)), default=16)
    before = [model.weights[site.weight] for site in sites_of(lower(model.spec), Layers())]
    whole = model.weights.nbytes
    made = whole - sum(weight.nbytes for weight in before) + sum(weight.size * bits // 8 for weight in before)
    return made + (whole if model.tokenizer is not None else 0)
