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
from hasten.compress.generated import Generated, generate_text
from hasten.compress.heal import check_trainable, evidence_of, in_dtype, learned_into, parameters_of
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
    text: Path | Generated | None = None
    sequence: int | None = None
    tokens: int = 8192
    seed: int = 0

    def length(self, model: Model) -> int:
        """Tokens of an example for ``model``."""
        return min(512, model.spec.context) if self.sequence is None else self.sequence

    def said(self, model: Model) -> dict[str, Any]:
        """The settings, for provenance."""
        return {**msgspec.to_builtins(self.settings), "sequence": self.length(model), "tokens": self.tokens, "seed": self.seed}


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
    check_free(directory, overwrite)
    check_trainable(model)
    text, batches = read_lesson(model, lesson, work.folder)
    if began is not None:
        began(text, sum(example.learned for example in batches.examples))
    program = lesson.settings.program(model.spec, longest(batches))
    trained = train(program, parameters_of(program, model.weights), batches, Labels(), lesson.settings, work)
    made = dataclasses.replace(model, weights=learned_into(model.weights, trained.weights))
    before, after = (measured(each, tokens) for each in (model, made))
    evidence = evidence_of(text, batches, lesson.settings, trained)
    for when, found in (("before", before), ("after", after)):
        if found is not None:
            evidence |= {f"held_out_loss_{when}": found.loss, f"held_out_top1_{when}": found.top1}
    made = dataclasses.replace(made, provenance=(*model.provenance, Provenance("train", lesson.said(model), evidence)))
    save(made, directory, overwrite=overwrite)
    shutil.rmtree(work.folder, ignore_errors=True)
    return Learned(made, trained, before, after)


def check_free(directory: Path, overwrite: bool) -> None:
    """Raise UserError for a directory that is taken."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise UserError(f"{directory} exists and is not empty; choose another directory, or --overwrite it on purpose")


def read_lesson(model: Model, lesson: Lesson, folder: Path) -> tuple[str, Batches]:
    """What the text is called, and what each step learns; text that is generated lies in ``folder``. Raises UserError as read_examples."""
    sequence = lesson.length(model)
    if isinstance(lesson.text, Generated):
        name, examples = lesson.text.name, read_examples(model, generate_text(lesson.text, folder, sequence), sequence)[1]
    else:
        name, examples = read_examples(model, lesson.text, sequence)
    return name, Batches(examples, max(1, lesson.tokens // sequence), lesson.seed)


def longest(batches: Batches) -> int:
    """Tokens of the longest example that are played: all but its last."""
    return max(len(example.ids) - 1 for example in batches.examples)


def measured(model: Model, tokens: int) -> Evaluation | None:
    """How well ``model`` predicts so many tokens of the held-out set; None where it has no tokenizer."""
    if model.tokenizer is None:
        return None
    window = min(512, model.spec.context)
    windows = cut_windows(model, held_out(), window, tokens)
    return Evaluation.of([*score_windows(model, windows, window=window, backend=choose_backend(model)[0])])
