"""Converting layer by layer: each from what its keys, values and queries are over a text, its output projection then fitted so that the
layer gives what the unconverted model's gives, fed what the converted layers before it make."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.blocks import Live, Played, chunks_of, pieces, weights_for
from hasten.compress.convert.mixers import attention_of, values_of, with_mixers
from hasten.compress.convert.statistics import Statistics, statistics
from hasten.compress.data import Text
from hasten.compress.threads import one_torch_thread
from hasten.compress.walk import Run, cleared
from hasten.formats.weights import Weight
from hasten.model import Model
from hasten.program import Program, ops
from hasten.spec import Attention, Mixer, Spec

DAMP = 1e-3
"""What is added to the moments of a fit, as a share of their mean: draws the projection to what it was where the text says little."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """The attention of one layer to convert: float32 weights by their names in the Program, what it is like over the text, and the layer
    unconverted with the text that reaches it: ``plain`` through layers as they were, ``live`` through those that are converted."""

    index: int
    mixer: Attention
    weights: Mapping[str, Tensor]
    seen: Statistics
    plain: Played
    live: Played

    @property
    def path(self) -> str:
        """Before the names of its weights."""
        return f"blocks.{self.index}.mixer"

    def weight(self, name: str) -> Tensor:
        """One of its weights in float64."""
        return self.weights[f"{self.path}.{name}"].double()


@dataclasses.dataclass(frozen=True, slots=True)
class Changed:
    """The mixer that a layer gets, with those of its weights that are other than before, by full name."""

    mixer: Mixer
    weights: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """The Spec with every layer converted, the weights that changed, float32, and how much of each layer's output was lost: the error's
    share of its mean square, before and after its projection was fitted."""

    spec: Spec
    weights: Mapping[str, Weight]
    errors: Mapping[str, tuple[float, float]]


def convert_layers(model: Model, layers: Sequence[int], text: Text | None, run: Run, change: Callable[[Layer], Changed], fit: bool) -> Done:
    """Every one of ``layers`` as ``change`` makes it. Killed, it begins anew: a layer takes seconds. Raises ConfigError without text."""
    if text is None:
        raise ConfigError("this transform looks at activations, so it needs text to calibrate on")
    spec, made, errors = model.spec, dict[str, Weight](), dict[str, tuple[float, float]]()
    chunks, count = chunks_of(text.windows), len(model.spec.blocks)
    shutil.rmtree(run.work, ignore_errors=True)
    run.work.mkdir(parents=True)
    with one_torch_thread(), torch.no_grad():
        old = pieces(model.spec, text.longest)
        first = Played(old[0], Live({}), chunks, run.threads).carry_on(weights_for(old[0], model.weights), cleared(run.work / "0"))
        live = plain = first
        for index in range(max(layers) + 1):
            run.report(f"layer {index}", index, count)
            weights = weights_for(old[index + 1], model.weights)
            before = Played(old[index + 1], plain, chunks, run.threads)
            after, become = Played(old[index + 1], live, chunks, run.threads), weights
            if index in layers:
                read, mixer = values_of(old[index + 1], index), attention_of(model.spec, index)
                path = f"blocks.{index}.mixer"
                changed = change(Layer(index, mixer, weights, statistics(before, weights, mixer, read, path), before, after))
                spec = with_mixers(spec, {index: changed.mixer})
                piece = pieces(spec, text.longest)[index + 1]
                become = {name: tensor for name, tensor in {**weights, **changed.weights}.items() if name in piece.params}
                after, new = Played(piece, live, chunks, run.threads), dict(changed.weights)
                if fit:
                    o, errors[f"layer {index}"] = fitted((before, weights), (after, become), index)
                    new[f"{path}.o.weight"] = become[f"{path}.o.weight"] = o
                made.update({name: weight_of(tensor) for name, tensor in new.items()})
            if index < max(layers):
                live = after.carry_on(become, cleared(run.work / f"live-{index + 1}"))
                plain = before.carry_on(weights, cleared(run.work / f"plain-{index + 1}"))
                for done in ("0",) if index == 0 else (f"live-{index}", f"plain-{index}"):
                    shutil.rmtree(run.work / done, ignore_errors=True)
    shutil.rmtree(run.work, ignore_errors=True)
    run.report("done", count, count)
    return Done(spec, made, errors)


def fitted(
    before: tuple[Played, Mapping[str, Tensor]], after: tuple[Played, Mapping[str, Tensor]], index: int
) -> tuple[Tensor, tuple[float, float]]:
    """The output projection float32 of a converted layer, ``after``, that makes good what can be of its difference from ``before``: least
    squares over the text. Where the mixer joins the stream as it is, of the stream behind it, otherwise of what the mixer gives.

    And the error's share of the mixer's mean square, with the projection as it was and as it became."""
    name, out = f"blocks.{index}.mixer.o.weight", _target(before[0].piece, index)
    read = next(op.x for op in after[0].piece.ops if isinstance(op, ops.Linear) and op.weight == name)
    size = len(after[1][name][0])
    square, cross = torch.zeros(size, size, dtype=torch.float64), torch.zeros(len(after[1][name]), size, dtype=torch.float64)
    whole = error = 0.0
    own = f"blocks.{index}.mixer.o"
    for was, now in zip(before[0].outputs(before[1], list({out, own})), after[0].outputs(after[1], list({out, read}))):
        missing, x = was[out] - now[out], now[read]
        square += (x.T @ x).double()
        cross += (missing.T @ x).double()
        whole, error = whole + float(was[own].double().square().sum()), error + float(missing.double().square().sum())
    damped = square + DAMP * square.diagonal().mean().clamp_min(1e-30) * torch.eye(size, dtype=torch.float64)
    step = torch.linalg.solve(damped, cross.T).T
    gained = float(2 * (step * cross).sum() - ((step @ square) * step).sum())
    whole = max(whole, 1e-30)
    return (after[1][name].double() + step).float(), (error / whole, max(0.0, error - gained) / whole)


def _target(piece: Program, index: int) -> str:
    stream = f"blocks.{index}.mixer_out"
    joined = [op for op in piece.ops if isinstance(op, ops.Add) and op.y == stream and f"blocks.{index}.mixer.o" in (op.a, op.b)]
    return stream if joined else f"blocks.{index}.mixer.o"


def weight_of(tensor: Tensor) -> Weight:
    """A float32 weight of these numbers."""
    array = np.ascontiguousarray(tensor.float().numpy())
    return Weight(array.shape, array.dtype, lambda: array)
