"""The trainer: steps of play, differentiate, update, which a killed training goes on with to the same losses."""

import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hasten.backends.reference import play
from hasten.base import hardware, heap
from hasten.base.errors import ConfigError, UserError
from hasten.program import Batch, Precision, Program, lower
from hasten.spec import Spec
from hasten.train.batches import Batches, Example
from hasten.train.objectives import Objective
from hasten.train.optimizers import Optimizers
from hasten.train.parameters import Parameters
from hasten.train.schedule import Schedule
from hasten.train.state import Progress, keep, take_up

VERSION = 3
"""Counts up whenever the same settings come to other numbers."""

REHEARSED = 3
"""Steps that are timed, and learn nothing, before minutes become steps; the first is not counted."""

STATE, LOSSES = "state.safetensors", "losses.jsonl"


class Steps(msgspec.Struct, frozen=True, tag="steps"):
    """So many steps."""

    count: int


class Minutes(msgspec.Struct, frozen=True, tag="minutes"):
    """As many steps as this machine takes in so many minutes, found once, before the first: from then on, it is Steps."""

    minutes: float


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to learn. ``rate`` is AdamW's learning rate; ``norm`` bounds the gradient's; ``together`` are the tokens that are played at
    once, of a step's; ``recompute`` trades a second forward pass of every block for the memory of its values."""

    budget: Steps | Minutes
    rate: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.5
    weight_decay: float = 0.1
    norm: float = 1.0
    muon: bool = True
    together: int = 4096
    recompute: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        Schedule(self.warmup, self.decay)
        amount = self.budget.count if isinstance(self.budget, Steps) else self.budget.minutes
        if not 0 < amount < math.inf:
            raise ConfigError(f"{amount} steps or minutes teach nothing; accepted is more than 0")
        for name in ("rate", "norm", "together"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; accepted is more than 0")

    def program(self, spec: Spec, context: int) -> Program:
        """What is played: ``spec`` in this precision, the residual stream and logits in float32."""
        return lower(spec, context=context, precision=Precision("float32", self.precision, "float32"))


def precision_here() -> Literal["float32", "bfloat16"]:
    """bfloat16 where this processor multiplies it faster: with tiles, and with AVX-512 on processors of AMD, whose products of it take half
    the time of float32's; on an Emerald Rapids without tiles they take twice that."""
    cpu = hardware.detect().cpu
    return "bfloat16" if "amx_bf16" in cpu.features or ("avx512_bf16" in cpu.features and "AMD" in cpu.brand) else "float32"


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Where and how to work: state and losses go to ``folder``, every ``every_s`` seconds and at the end; ``report`` is told of each step:
    how many of how many are done, and its loss. Other numbers of threads give other last bits."""

    folder: Path
    threads: int
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None
    every_s: float = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """What was learned: the weights, float32, the loss of each step, and the seconds it took."""

    weights: Mapping[str, Tensor]
    losses: Sequence[float]
    seconds: float


def train(program: Program, parameters: Parameters, batches: Batches, objective: Objective, settings: Settings, work: Work) -> Trained:
    """Learn until the budget is used, or go on with what ``work.folder`` holds, to the same losses as if nothing had happened.

    Raises UserError where the folder is another training's, and where the loss is no longer a number."""
    with heap.large_kept():
        return _train(program, parameters, batches, objective, settings, work)


def _train(program: Program, parameters: Parameters, batches: Batches, objective: Objective, settings: Settings, work: Work) -> Trained:
    key = _key(program, parameters, batches, objective, settings, work)
    work.folder.mkdir(parents=True, exist_ok=True)
    optimizers = _optimizers(parameters, settings)
    schedule = Schedule(settings.warmup, settings.decay)
    parts = _parts(program.with_outputs(objective.taps), settings.recompute)
    losses: list[float] = []
    with _threads(work.threads):
        done = take_up(work.folder / STATE, key, parameters.masters, optimizers)
        if done is None:
            steps = _steps(parts, parameters, batches, objective, settings)
            done = Progress(0, steps, 0.0)
            keep(work.folder / STATE, key, done, parameters.masters, optimizers)
        losses += _cut_losses(work.folder / LOSSES, done.step)
        began, kept = time.monotonic() - done.seconds, time.monotonic()
        with open(work.folder / LOSSES, "a", encoding="utf-8") as log:
            for step in range(done.step, done.steps):
                share = schedule.at(step, done.steps)
                found = _update(parts, parameters, batches.at(step), objective, settings, optimizers, share)
                if not math.isfinite(found["loss"]):
                    raise UserError(
                        f"the loss of step {step} is {found['loss']}; lower the learning rate, which was {settings.rate * share:.3g}"
                    )
                losses.append(found["loss"])
                seconds = time.monotonic() - began
                log.write(json.dumps({"step": step, **found, "rate": settings.rate * share, "seconds": round(seconds, 3)}) + "\n")
                if step + 1 == done.steps or time.monotonic() - kept >= work.every_s:
                    log.flush()
                    os.fsync(log.fileno())
                    keep(work.folder / STATE, key, Progress(step + 1, done.steps, seconds), parameters.masters, optimizers)
                    kept = time.monotonic()
                work.report(step + 1, done.steps, found["loss"])
        with torch.no_grad():
            weights = {name: tensor.detach().float() for name, tensor in parameters.weights().items()}
        return Trained(weights, losses, time.monotonic() - began)


def _update(
    parts: Sequence[Program], parameters: Parameters, examples: Sequence[Example], objective: Objective, settings: Settings,
    optimizers: Optimizers, share: float,
) -> dict[str, float]:  # fmt: skip
    """One step at ``share`` of the learning rate; the losses, and the gradient's norm. Where the loss is no number, nothing moves."""
    found = _learn(parts, parameters, examples, objective, settings)
    if math.isfinite(found["loss"]):
        found["norm"] = float(torch.nn.utils.clip_grad_norm_(list(parameters.masters.values()), settings.norm))
        optimizers.step(share)
    return found


def _learn(
    parts: Sequence[Program], parameters: Parameters, examples: Sequence[Example], objective: Objective, settings: Settings
) -> dict[str, float]:
    """Leave the gradient of the mean loss over ``examples`` with the masters; give the losses."""
    played = parameters.weights()
    dtype = getattr(torch, settings.precision)
    leaves = {name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for name, tensor in played.items()}
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    sums: dict[str, Tensor] = {}
    parts_of_loss: dict[str, float] = {}
    total = 0.0
    learned = sum(example.learned for example in examples)
    for together in _passes(examples, settings.together):
        batch = Batch.of([list(example.ids[:-1]) for example in together])
        values = _forward(parts, leaves, batch, settings.recompute)
        loss = objective(values, batch, together)
        gradients = torch.autograd.grad(loss.total / learned, [leaves[name] for name in wanted], allow_unused=True)
        for name, gradient in zip(wanted, gradients):
            if gradient is not None:
                sums[name] = gradient.float() if name not in sums else sums[name] + gradient
        total += float(loss.total.detach())
        for name, part in loss.parts.items():
            parts_of_loss[name] = parts_of_loss.get(name, 0.0) + float(part)
    reached = [name for name in wanted if name in sums]
    torch.autograd.backward([played[name] for name in reached], [sums[name] for name in reached])
    return {"loss": total / learned, **{name: part / learned for name, part in parts_of_loss.items()}}


def _forward(parts: Sequence[Program], weights: Mapping[str, Tensor], batch: Batch, recompute: bool) -> dict[str, Tensor]:
    """All outputs of the parts, one after the other."""
    values: dict[str, Tensor] = {}
    for part in parts:
        used, given = {name: weights[name] for name in part.params}, {name: values[name] for name in part.inputs}

        def one(given: Mapping[str, Tensor], part: Program = part, used: Mapping[str, Tensor] = used) -> dict[str, Tensor]:
            return play(part, used, batch, given=given)[0]

        values |= checkpoint(one, given, use_reentrant=False) if recompute else one(given)
    return values


def _parts(program: Program, cut: bool) -> tuple[Program, ...]:
    """The Program, in pieces of a layer each where it is to be cut, or of several where one reads what another keeps."""
    if not cut:
        return (program,)
    made, rest = [], program
    for layer in program.layers[:-1]:
        if rest.can_cut(layer.label):
            part, rest = rest.cut(layer.label)
            made.append(part)
    return (*made, rest)


def _passes(examples: Sequence[Example], tokens: int) -> Iterator[tuple[Example, ...]]:
    """In order, as many together as ``tokens`` hold, at least one."""
    together: list[Example] = []
    for example in examples:
        if together and sum(len(each.ids) for each in together) + len(example.ids) > tokens:
            yield tuple(together)
            together = []
        together.append(example)
    yield tuple(together)


def _optimizers(parameters: Parameters, settings: Settings) -> Optimizers:
    return Optimizers(parameters, rate=settings.rate, decay=settings.weight_decay, muon=settings.muon)


def _steps(parts: Sequence[Program], parameters: Parameters, batches: Batches, objective: Objective, settings: Settings) -> int:
    """How many steps the budget is; where that takes some to tell, they teach nothing and leave nothing behind."""
    if isinstance(settings.budget, Steps):
        return settings.budget.count
    times, optimizers = [], _optimizers(parameters, settings)
    for step in range(REHEARSED + 1):
        began = time.monotonic()
        _update(parts, parameters, batches.at(step), objective, settings, optimizers, 0.0)
        times.append(time.monotonic() - began)
    for master in parameters.masters.values():
        master.grad = None  # of a step whose loss was no number
    return max(1, round(60 * settings.budget.minutes / statistics.median(times[1:])))


def _key(
    program: Program, parameters: Parameters, batches: Batches, objective: Objective, settings: Settings, work: Work
) -> str:  # fmt: skip
    """One string for everything that the losses depend on."""
    digest = hashlib.sha256(f"{VERSION} {torch.__version__} {work.threads} {batches.size} {batches.seed} {batches.sha256}".encode())
    digest.update(msgspec.json.encode(settings) + program.text().encode() + objective.key.encode())
    masters = parameters.masters
    with torch.no_grad():  # what is fixed, masked or rounded is no master, and counts
        others = [(name, each) for name, each in parameters.weights().items() if each is not masters.get(name)]
    for name, tensor in (*sorted(masters.items()), *sorted(others, key=lambda each: each[0])):
        digest.update(name.encode() + np.ascontiguousarray(tensor.detach().float().numpy()).data)
    return digest.hexdigest()


def _cut_losses(path: Path, steps: int) -> list[float]:
    """The losses of the first ``steps`` steps; those of later ones, which will come again, are removed from the file."""
    lines = path.read_text("utf-8").splitlines(keepends=True)[:steps] if path.is_file() else []
    if len(lines) != steps:
        raise UserError(
            f"{path} has {len(lines)} losses of {steps} steps, so the training cannot go on; remove {path.parent} and begin anew"
        )
    path.write_text("".join(lines), "utf-8")
    return [json.loads(line)["loss"] for line in lines]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
