"""Training as a whole: a model to begin with, text, and a directory with what was learned and how well."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hasten.base.errors import ConfigError, UserError
from hasten.checkpoint import save
from hasten.compress.examples import read_examples
from hasten.compress.heal import check_trainable, in_dtype, learned_into, parameters_of
from hasten.engine.backends import choose_backend
from hasten.formats.weights import DTYPES, Weights
from hasten.measure import Evaluation, cut_windows, held_out, score_windows
from hasten.model import Model, Provenance
from hasten.program import lower
from hasten.spec import Spec
from hasten.train import Batches, Labels, Settings, Trained, Work, train, untrained


@dataclasses.dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned from, and how: text (see read_examples), ``tokens`` a step in examples of ``sequence`` (None: 512, or the model's
    context where that is less)."""

    settings: Settings
    text: Path | None = None
    sequence: int | None = None
    tokens: int = 8192
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """The model, the losses of its steps, and its held-out loss before and after (None for a model without a tokenizer)."""

    model: Model
    trained: Trained
    before: Evaluation | None
    after: Evaluation | None


def fresh(spec: Spec, like: Model, name: str, seed: int) -> Model:
    """A model of ``spec`` that has learned nothing, bfloat16, with the tokenizer of ``like`` and its token that ends a text.

    Raises ConfigError for a tokenizer that makes ids it has no rows for."""
    tokenizer = like.text_tokenizer()
    largest = max(tokenizer.vocabulary.values())
    if largest >= spec.vocab:
        raise ConfigError(
            f"the tokenizer makes ids up to {largest} and the Spec has a vocabulary of {spec.vocab}; take one that goes with it"
        )
    arrays = untrained(lower(spec), seed)
    weights = Weights({key: in_dtype(array, DTYPES["bfloat16"]) for key, array in arrays.items()})
    source = like.source if spec == like.spec else None
    return Model(name=name, spec=spec, weights=weights, tokenizer=tokenizer, generation=like.generation, source=source)


def learn(
    model: Model, lesson: Lesson, directory: Path, work: Work, *, overwrite: bool = False, began: Callable[[str, int], None] | None = None,
    tokens: int = 32768,
) -> Learned:  # fmt: skip
    """Train ``model`` on text, into ``directory``. ``began`` is told what the text is called and how many tokens it has;
    ``tokens`` of the held-out set are measured on, before and after.

    Killed, it goes on where it was when called again, from ``work.folder``, which is removed at the end. Raises UserError, before anything
    is begun, for a directory that is taken, weights that cannot be trained, or text that teaches nothing."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise UserError(f"{directory} exists and is not empty; choose another directory, or --overwrite it on purpose")
    check_trainable(model)
    sequence = min(512, model.spec.context) if lesson.sequence is None else lesson.sequence
    text, examples = read_examples(model, lesson.text, sequence)
    batches = Batches(examples, max(1, lesson.tokens // sequence), lesson.seed)
    if began is not None:
        began(text, sum(example.learned for example in examples))
    program = lesson.settings.program(model.spec, max(len(example.ids) for example in examples))
    trained = train(program, parameters_of(program, model.weights), batches, Labels(), lesson.settings, work)
    made = dataclasses.replace(model, weights=learned_into(model.weights, trained.weights))
    before, after = (_evaluate(each, tokens) for each in (model, made))
    evidence: dict[str, Any] = {
        "text": text, "sha256": batches.sha256, "steps": len(trained.losses), "epochs": round(batches.epochs(len(trained.losses)), 3),
        "seconds": round(trained.seconds, 1), "first_loss": trained.losses[0], "last_loss": trained.losses[-1],
    }  # fmt: skip
    for when, found in (("before", before), ("after", after)):
        if found is not None:
            evidence |= {f"held_out_loss_{when}": found.loss, f"held_out_top1_{when}": found.top1}
    settings = {**msgspec.to_builtins(lesson.settings), "sequence": sequence, "tokens": lesson.tokens, "seed": lesson.seed}
    made = dataclasses.replace(made, provenance=(*model.provenance, Provenance("train", settings, evidence)))
    save(made, directory, overwrite=overwrite)
    shutil.rmtree(work.folder, ignore_errors=True)
    return Learned(made, trained, before, after)


def _evaluate(model: Model, tokens: int) -> Evaluation | None:
    if model.tokenizer is None:
        return None
    window = min(512, model.spec.context)
    windows = cut_windows(model, held_out(), window, tokens)
    return Evaluation.of([*score_windows(model, windows, window=window, backend=choose_backend(model)[0])])
