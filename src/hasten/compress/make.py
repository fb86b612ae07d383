"""From a recipe to a directory: checked before, measured after, and kept only where it is worth keeping."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hasten.base.errors import UserError
from hasten.compress.data import Text, cut_text, read_documents, text_of, usual_length
from hasten.compress.evidence import Gate, Timed, with_evidence
from hasten.compress.gates import Shrunk, require_loss, require_smaller, save_checked
from hasten.compress.preflight import Estimate, estimate
from hasten.compress.recipe import Stage, Step, carry_out, check_recipe
from hasten.compress.walk import Run
from hasten.measure import Windows, cut_windows, held_out, read_corpus
from hasten.measure.compare import Comparison, compare, even_windows
from hasten.measure.speed import SpeedTest, measure_speeds, require_room
from hasten.model import Model


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """Where text comes from (None: the interpreter's standard library), and how much of it is looked at: ``samples`` windows of
    ``sequence`` tokens (None: 512, or the model's context where that is less)."""

    path: Path | None = None
    samples: int = 256
    sequence: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """What was made: the model, what of it got smaller (None where only its cache did), and what it is next to the original, where that was
    measured (a model without a tokenizer has no text to be measured on), and how fast it is, or why it was not timed."""

    model: Model
    shrunk: Shrunk | None
    comparison: Comparison | None
    timed: Timed | str


def calibration_text(model: Model, recipe: Sequence[Step], calibration: Calibration) -> Text | None:
    """The text that a recipe looks at, None where none of its steps does. A model without a tokenizer is given random token ids."""
    if not any(step.needs_text for step in recipe):
        return None
    sequence = min(512, model.spec.context) if calibration.sequence is None else calibration.sequence
    if model.tokenizer is None and calibration.path is None:
        random = np.random.default_rng(calibration.seed)
        return text_of("random token ids", random.integers(0, model.spec.vocab, (calibration.samples, sequence)).tolist())
    return cut_text(model, read_documents(calibration.path), samples=calibration.samples, sequence=sequence, seed=calibration.seed)


def make(
    model: Model, recipe: Sequence[Step], directory: Path, *, calibration: Calibration, gate: Gate, run: Run, overwrite: bool = False,
    speed: SpeedTest | None = None, began: Callable[[Estimate], None] | None = None,
) -> Made:  # fmt: skip
    """``model`` through ``recipe`` into ``directory``, which appears only if it passed every gate. ``speed`` says how both are timed, None
    for not at all; ``began`` is told what it will take.

    Killed, it goes on where it was when called again, from ``run.work``; that folder is removed at the end. Raises UserError, before
    anything is begun, for a recipe that cannot work, a directory that is taken, or too little memory or disk; after it, GateError."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise UserError(f"{directory} exists and is not empty; choose another directory, or --overwrite it on purpose")
    check_recipe(model, recipe)
    windows, window = gate_windows(model, gate, usual_length(model.spec, model.spec))
    text = calibration_text(model, recipe, calibration)
    will_take = estimate(model, recipe, text, run.threads)
    will_take.require(run.work)
    if began is not None:
        began(will_take)
    made = carry_out(model, recipe, text, run)
    shrunk = require_smaller(model, made) if any(step.transform.stage is not Stage.MARKS for step in recipe) else None
    found = None
    if windows is not None and usual_length(made.spec, model.spec) != window:
        windows, window = gate_windows(model, gate, usual_length(made.spec, model.spec))
    if windows is not None:
        (found,) = compare(model, [made], windows, window, lambda done, of: run.report("held-out loss", done, of))
        if gate.most is not None:
            require_loss(found, gate.most)
    timed = time_both(model, made, speed, run)
    made = with_evidence(made, shrunk, found, gate, timed if isinstance(timed, Timed) else None)
    save_checked(made, directory, overwrite=overwrite)
    shutil.rmtree(run.work, ignore_errors=True)
    return Made(made, shrunk, found, timed)


def gate_windows(model: Model, gate: Gate, window: int) -> tuple[Windows | None, int]:
    """The windows of ``window`` tokens that the gate measures on, and that length; None where the model has no tokenizer to make them
    with."""
    if model.tokenizer is None:
        return None, window
    corpus = held_out() if gate.path is None else read_corpus(gate.path)
    return even_windows(cut_windows(model, corpus, window), gate.tokens), window


def time_both(model: Model, made: Model, speed: SpeedTest | None, run: Run) -> Timed | str:
    """Tokens a second of both, or why they were not measured: a result is kept though there is no room to time it."""
    if speed is None:
        return "it was not asked for"
    try:
        for each in (model, made):
            require_room([each], "a machine with more shows how fast it is")
    except UserError as error:
        return str(error)
    test = speed.within(model.spec.context)
    return Timed(test, *measure_speeds(model, [made], test, report=lambda done, of: run.report("tokens a second", done, of)))
