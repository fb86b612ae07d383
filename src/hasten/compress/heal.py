"""Learning again what compressing cost: a transform that trains, holding whatever was made smaller as it is.

Zeros of sparse weights stay zeros; weights that layers share stay shared, for they are one in the Program."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import torch
from torch import Tensor

from hasten.base.errors import ConfigError, UserError
from hasten.compress.data import usual_length
from hasten.compress.examples import read_examples
from hasten.compress.teachers import teacher_of
from hasten.compress.walk import Run
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight, is_pruned
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import Program
from hasten.train import (
    Batches,
    Divergence,
    Labels,
    Masked,
    Minutes,
    Objective,
    Parameters,
    Plain,
    Settings,
    Soft,
    SoftLabels,
    Steps,
    Trained,
    Work,
    precision_here,
    train,
)

P = TypeVar("P", bound=Parameters)


class Heal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Training for so many ``minutes`` (10 unless given) or ``steps`` of ``tokens``, on ``text`` (see read_examples), towards the
    original's distributions: ``labels`` is the share of the loss that is the text's own; 1 leaves the original out."""

    minutes: float | None = None
    steps: int | None = None
    text: str | None = None
    labels: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = "forward"
    rate: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.8
    weight_decay: float = 0.0
    adamw: bool = False
    tokens: int = 2048
    together: int = 4096
    sequence: int | None = None
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool = False

    def training(self) -> Settings:
        """The trainer's settings. Raises ConfigError for what does not go together."""
        if self.steps is not None and self.minutes is not None:
            raise ConfigError(f"heal has steps {self.steps} and minutes {self.minutes}, which both say how long; give one")
        if not 0 <= self.labels <= 1 or not self.temperature > 0:
            raise ConfigError(f"heal has labels {self.labels} and temperature {self.temperature}; a share and a positive number are needed")
        return Settings(
            budget=Steps(self.steps) if self.steps is not None else Minutes(10.0 if self.minutes is None else self.minutes),
            rate=self.rate, warmup=self.warmup, decay=self.decay, weight_decay=self.weight_decay, muon=not self.adamw,
            together=self.together, recompute=self.recompute,
            precision=precision_here() if self.precision == "auto" else self.precision,
        )  # fmt: skip

    def length(self, model: Model, original: Model) -> int:
        """Tokens of an example, where what has become of ``original`` learns (usual_length, unless given)."""
        return usual_length(model.spec, original.spec) if self.sequence is None else self.sequence


def check_heal(model: Model, settings: Heal) -> None:
    """Raise UserError for settings that teach nothing, or weights that cannot learn."""
    check_trainable(model)
    check_heal_settings(model, settings, "heal")


def check_heal_settings(model: Model, settings: Heal, name: str) -> None:
    """Raise UserError for settings of the transform ``name`` that teach ``model`` nothing."""
    settings.training()
    model.text_tokenizer()
    if settings.text is not None and not Path(settings.text).exists():
        raise UserError(f"no file or folder {settings.text}; name text that is there, or leave it out for the standard library")
    if not 1 <= settings.length(model, model) <= model.spec.context:
        raise ConfigError(f"{name} has sequences of {settings.sequence} tokens; {model.name} accepts 1 to {model.spec.context}")


def heal(model: Model, settings: Heal, original: Model, run: Run) -> Model:
    """``model`` after learning from ``original``, which is played as it is stored: rounded weights with the activations they are meant to
    be fed. Killed, it goes on where it was; other numbers of threads give other last bits."""
    check_trainable(model)
    _, trained, evidence = teach(model, settings, original, run, lambda program: parameters_of(program, model.weights), "healing")
    provenance = (*model.provenance, Provenance("heal", msgspec.to_builtins(settings), evidence))
    return dataclasses.replace(model, weights=learned_into(model.weights, trained.weights), provenance=provenance)


def teach(
    model: Model, settings: Heal, original: Model, run: Run, parameters_for: Callable[[Program], P], doing: str
) -> tuple[P, Trained, dict[str, Any]]:
    """Train what ``parameters_for`` gives for the Program of ``model``, as ``settings`` say: the parameters as they have become, the
    weights they make, and what is to be told of it."""
    sequence = settings.length(model, original)
    text, examples = read_examples(model, None if settings.text is None else Path(settings.text), sequence)
    batches = Batches(examples, max(1, settings.tokens // sequence), settings.seed)
    training, longest = settings.training(), max(len(example.ids) - 1 for example in examples)
    program = training.program(model.spec, longest)
    parameters, objective = parameters_for(program), _objective(settings, training, original, longest, run)

    def report(step: int, steps: int, loss: float) -> None:
        run.report(f"{doing}, loss {loss:.3f}", step, steps)

    trained = train(program, parameters, batches, objective, training, Work(run.work, run.threads, report))
    return parameters, trained, evidence_of(text, batches, training, trained)


def evidence_of(text: str, batches: Batches, training: Settings, trained: Trained) -> dict[str, Any]:
    """What was learned from and how long, for provenance."""
    steps = len(trained.losses)
    return {
        "text": text, "sha256": batches.sha256, "steps": steps, "epochs": round(batches.epochs(steps), 3),
        "precision": training.precision, "seconds": round(trained.seconds, 1), "first_loss": trained.losses[0],
        "last_loss": trained.losses[-1],
    }  # fmt: skip


def check_trainable(model: Model) -> None:
    """Raise ConfigError for weights that are stored rounded: what rounding took cannot be learned back in place."""
    for name, weight in model.weights.items():
        if isinstance(weight, QuantizedWeight | DequantizedWeight) and not is_pruned(weight):
            raise ConfigError(f"{name} is stored quantized, so it cannot be trained as it is; start from the original")


def parameters_of(program: Program, weights: Weights) -> Parameters:
    """Masters of ``weights``, whose zeros stay where they are in those that are pruned."""
    keep: dict[str, Tensor] = {}
    for name in program.params:
        if is_pruned(weights[name]):
            keep[name] = torch.from_numpy(weights[name].load() != 0)
    plain = Plain.of(program, weights)
    return Masked(plain, keep) if keep else plain


def learned_into(weights: Weights, learned: Mapping[str, Tensor]) -> Weights:
    """``weights`` with those that were learned in their place, each in the dtype or the sparse form it had."""
    made: dict[str, Weight] = dict(weights)
    for name, tensor in learned.items():
        before, array = weights[name], tensor.numpy()
        if isinstance(before, QuantizedWeight):
            made[name] = QuantizedWeight.from_array(array, before.form, before.activations)
        else:
            made[name] = in_dtype(array, before.dtype)
    return Weights(made)


def in_dtype(array: Array, dtype: Any) -> Weight:
    """An array as a weight of ``dtype``, rounded to nearest, half to even."""
    made = array if array.dtype == dtype else array.astype(dtype)
    return Weight(made.shape, made.dtype, lambda: made)


def _objective(settings: Heal, training: Settings, original: Model, context: int, run: Run) -> Objective:
    if settings.labels == 1:
        return Labels()
    teacher = teacher_of(original, context, run.threads, training.precision)
    return SoftLabels(teacher, Soft(settings.temperature, settings.divergence), settings.labels)
