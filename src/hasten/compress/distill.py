"""Distillation as a whole: a teacher, a student, text, and a directory with what the student has become."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.checkpoint import save
from hasten.compress.heal import check_trainable, evidence_of, learned_into, parameters_of
from hasten.compress.learn import Lesson, check_free, longest, measured, read_lesson
from hasten.compress.students import Pairs, check_pairs, check_together, pairs_of, weights_digest
from hasten.compress.teachers import teacher_of
from hasten.formats.linear import LinearFormat
from hasten.formats.weights import Weights
from hasten.measure import Evaluation
from hasten.model import Model, Provenance
from hasten.program import Program
from hasten.spec import Attention, LatentAttention, Spec
from hasten.train import (
    AttentionMaps,
    Beside,
    Divergence,
    Follows,
    Hidden,
    Joined,
    Learner,
    Measure,
    Parameters,
    Plain,
    Relations,
    Soft,
    Together,
    Trained,
    Work,
    joined,
    of_member,
    projected,
    train,
    untrained,
)

TEACHER, STUDENT = "teacher", "student"
"""What the two are called in the joined Program and in the log."""

RELATION = 32
"""Features of a relation head, at least, where so many are there."""


class Teaching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a student learns: weights of the text's loss (``labels``), of the teacher's distribution at ``temperature`` (``soft``), of its
    hidden states and of its attention, block by block as ``pairs`` say (None: evenly).

    ``teacher`` stays as it is (fixed), learns on, from the text (online), or from the text and its students (mutual). One that stays, and
    is listened to alone, may be played with ``teacher_weights`` in a format that is faster, as int8."""

    labels: float = 0.0
    soft: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = "forward"
    hidden: float = 0.0
    hidden_by: Measure = "mse"
    attention: float = 0.0
    attention_by: Literal["maps", "relations"] = "maps"
    pairs: Pairs | None = None
    teacher: Literal["fixed", "online", "mutual"] = "fixed"
    teacher_weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "soft", "hidden", "attention"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"the weight of {name} is {getattr(self, name)}; accepted is 0 or more")
        Soft(self.temperature, self.divergence)
        if self.teacher_weights is not None:
            LinearFormat.parse(self.teacher_weights)
            if self.teacher != "fixed" or self.hidden or self.attention or not self.soft:
                raise ConfigError(
                    f"teacher_weights is {self.teacher_weights}, for a teacher that stays as it is and of whom only soft labels are asked; "
                    "leave it out"
                )
        if self.labels == self.soft == self.hidden == self.attention == 0:
            raise ConfigError("the weights of labels, soft, hidden and attention are all 0, which teaches nothing; give one of them more")


@dataclasses.dataclass(frozen=True, slots=True)
class Distilled:
    """The student, the others that learned beside it, by name, the losses, and how well teacher and student do on the held-out set:
    ``teacher`` as it was given, the student before and after."""

    model: Model
    beside: Mapping[str, Model]
    trained: Trained
    teacher: Evaluation
    before: Evaluation
    after: Evaluation

    @property
    def retained(self) -> float | None:
        """The student's top-1 accuracy over the teacher's; None where the teacher predicts nothing right."""
        return self.after.top1 / self.teacher.top1 if self.teacher.top1 else None


def distill(
    teacher: Model, student: Model, teaching: Teaching, lesson: Lesson, directory: Path, work: Work, *, peers: Sequence[Model] = (),
    keep: Path | None = None, overwrite: bool = False, began: Callable[[str, int], None] | None = None, tokens: int = 32768,
) -> Distilled:  # fmt: skip
    """Teach ``student`` what ``teacher`` knows, into ``directory``, beside ``peers`` where the teacher is mutual: then each of them learns
    from every other. Those that learned beside it go into folders of ``keep`` by their names. The other arguments are those of `learn`.

    Killed, it goes on where it was when called again, from ``work.folder``, which is removed at the end. Raises UserError, before anything
    is begun, for models that cannot learn from one another, as well as what `learn` refuses."""
    check_free(directory, overwrite)
    if keep is not None:
        if teaching.teacher == "fixed":
            raise ConfigError(f"{keep} is for others that learn; let the teacher be online or mutual")
        check_free(keep, overwrite=False)
    models = {TEACHER: teacher, STUDENT: student, **{f"peer{number}": peer for number, peer in enumerate(peers, 1)}}
    shorter = _checked(models, teaching)
    blocks, others = len(student.spec.blocks), len(teacher.spec.blocks)
    teaching = msgspec.structs.replace(teaching, pairs=teaching.pairs or pairs_of(blocks, others))
    together, projections = _plan(
        {name: lesson.settings.program(model.spec, shorter.spec.context) for name, model in models.items()},
        student.spec,
        teacher.spec,
        teaching,
    )
    fixed = {TEACHER} if teaching.teacher == "fixed" else set()
    if fixed and together.taps_of(TEACHER) == ("logits",):  # what it says is all that counts, so it need not be differentiated through
        outside = {TEACHER: teacher_of(teacher, lesson.length(shorter), work.threads, lesson.settings.precision, teaching.teacher_weights)}
        together = dataclasses.replace(together, outside=outside)
    text, batches = read_lesson(shorter, lesson, work.folder)
    if began is not None:
        began(text, sum(example.learned for example in batches.examples))
    inside = {name: model for name, model in models.items() if together.taps_of(name)}
    programs = {name: lesson.settings.program(model.spec, longest(batches)) for name, model in inside.items()}
    played = {**programs, STUDENT: projected(programs[STUDENT], projections)}
    program = joined({name: each.with_outputs(together.taps_of(name)) for name, each in played.items()})
    parameters = _parameters(programs, inside, played[STUDENT], fixed, lesson.seed)
    trained = train(program, parameters, batches, together, lesson.settings, work)
    made = {
        name: dataclasses.replace(model, weights=_learned(model, programs[name], of_member(name, trained.weights)))
        for name, model in models.items()
        if name not in fixed
    }
    scores = [found for each in (teacher, student, made[STUDENT]) if (found := measured(each, tokens)) is not None]
    settings = {**lesson.said(shorter), **msgspec.to_builtins(teaching), "peers": [peer.name for peer in peers]}
    evidence = {**evidence_of(text, batches, lesson.settings, trained), "teacher": teacher.name, "teacher_sha256": weights_digest(teacher)}
    made = {
        name: dataclasses.replace(each, provenance=(*each.provenance, Provenance("distill", {**settings, "as": name}, evidence)))
        for name, each in made.items()
    }
    result = Distilled(made.pop(STUDENT), made, trained, *scores)
    result = dataclasses.replace(result, model=_with_evidence(result, teacher.weights.nbytes))
    partial = work.folder / "beside"  # what is whole there appears under its name last of all
    for name, each in result.beside.items() if keep is not None else ():
        save(each, partial / name, overwrite=True)
    save(result.model, directory, overwrite=overwrite)
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        if keep.exists():
            keep.rmdir()  # empty
        shutil.move(partial, keep)
    shutil.rmtree(work.folder, ignore_errors=True)
    return result


def _checked(models: Mapping[str, Model], teaching: Teaching) -> Model:
    """The model with the shortest context. Raises UserError for models that cannot learn from one another."""
    if len(models) > 2 and teaching.teacher != "mutual":
        raise ConfigError(f"{len(models) - 2} peers learn from one another, so the teacher is mutual too; say so, or leave them out")
    for name, model in models.items():
        if name != TEACHER:
            check_together(model, models[TEACHER])
        if name != TEACHER or teaching.teacher != "fixed":
            check_trainable(model)
    return min(models.values(), key=lambda model: model.spec.context)


def _plan(programs: Mapping[str, Program], student: Spec, teacher: Spec, teaching: Teaching) -> tuple[Together, dict[str, tuple[str, int]]]:
    """What each member learns, and the projections of the student's values that it takes."""
    features, projections, pairs = [], {}, teaching.pairs or ()
    if teaching.hidden or teaching.attention:
        check_pairs(pairs, len(student.blocks), len(teacher.blocks))
    if teaching.hidden:
        taps: list[tuple[str, str]] = []
        for own, other in pairs:
            tap = block_output(programs[STUDENT], own)
            if student.width != teacher.width:
                projections[f"projection.{len(taps)}"] = (tap, teacher.width)
                tap = f"projection.{len(taps)}"
            taps.append((tap, block_output(programs[TEACHER], other)))
        features.append(Follows("hidden", teaching.hidden, Hidden(tuple(taps), teaching.hidden_by), (TEACHER,)))
    if teaching.attention:
        distance = _maps(student, teacher, pairs) if teaching.attention_by == "maps" else _relations(programs, pairs)
        features.append(Follows("attention", teaching.attention, distance, (TEACHER,)))
    return Together(_learners(list(programs), tuple(features), teaching)), projections


def _maps(student: Spec, teacher: Spec, pairs: Pairs) -> AttentionMaps:
    made = []
    for own, other in pairs:
        ours, theirs = student.blocks[own].mixer, teacher.blocks[other].mixer
        if not (isinstance(ours, Attention | LatentAttention) and isinstance(theirs, Attention | LatentAttention)):
            continue
        if ours.heads != theirs.heads:
            raise ConfigError(
                f"block {own} has {ours.heads} heads and the teacher's block {other} has {theirs.heads}, so their attention maps cannot be "
                "compared; compare relations"
            )
        made.append((f"blocks.{own}.mixer.map", f"blocks.{other}.mixer.map"))
    if not made:
        raise ConfigError("no pair of blocks has attention on both sides, so there are no maps to compare; leave attention out")
    return AttentionMaps(tuple(made))


def _relations(programs: Mapping[str, Program], pairs: Pairs) -> Relations:
    """Of the deepest pair with queries, keys and values on both sides, as MiniLM has it."""
    own, other = programs[STUDENT].values, programs[TEACHER].values
    paths = [(f"blocks.{i}.mixer", f"blocks.{j}.mixer") for i, j in pairs]
    found = [pair for pair in paths if all(f"{pair[0]}.{kind}" in own and f"{pair[1]}.{kind}" in other for kind in ("q", "k", "v"))]
    if not found:
        raise ConfigError("no pair of blocks has attention on both sides, so there are no relations to compare; leave attention out")
    mine, theirs = found[-1]
    widths = [values[f"{path}.{kind}"].features[-1] for values, path in ((own, mine), (other, theirs)) for kind in ("q", "k", "v")]
    most = max(1, min(widths) // RELATION)
    return Relations((found[-1],), max(count for count in range(1, most + 1) if math.gcd(*widths) % count == 0))


def _learners(names: Sequence[str], features: tuple[Follows, ...], teaching: Teaching) -> tuple[Learner, ...]:
    soft = Soft(teaching.temperature, teaching.divergence)
    mutual = teaching.teacher == "mutual"
    made = []
    for name in names:
        others = tuple(other for other in names if other != name) if mutual else (TEACHER,)
        follows = (Follows("soft", teaching.soft, soft, others),) if teaching.soft else ()
        if name == STUDENT:
            made.append(Learner(name, teaching.labels, (*follows, *features)))
        elif mutual:
            made.append(Learner(name, teaching.labels, follows))
        elif teaching.teacher == "online":
            made.append(Learner(name, 1.0))
    return tuple(made)


def _parameters(
    programs: Mapping[str, Program], models: Mapping[str, Model], projected_student: Program, fixed: Collection[str], seed: int
) -> Parameters:
    """Those of every member, and those of the student's projections, which begin from nothing."""
    members: dict[str, Parameters] = {}
    for name, program in programs.items():
        weights = models[name].weights
        members[name] = Plain.of(program, weights, program.params) if name in fixed else parameters_of(program, weights)
    fresh = {name: shape for name, shape in projected_student.params.items() if name not in programs[STUDENT].params}
    if fresh:
        begun = untrained(dataclasses.replace(projected_student, params=fresh), seed)
        members[STUDENT] = Beside(members[STUDENT], Plain.of(projected_student, begun))
    return Joined(members)


def _learned(model: Model, program: Program, weights: Mapping[str, Tensor]) -> Weights:
    """The weights of ``model`` as they were learned, without what served learning alone."""
    return learned_into(model.weights, {name: weights[name] for name in program.params})


def block_output(program: Program, block: int) -> str:
    """The value that block number ``block`` hands on."""
    (layer,) = (layer for layer in program.layers if layer.label == f"blocks.{block}")
    return program.ops[layer.stop - 1].outputs[0]


def _with_evidence(found: Distilled, teacher_bytes: int) -> Model:
    """The student, whose last step of history says what came of it."""
    *history, last = found.model.provenance
    evidence = {"bytes": found.model.weights.nbytes, "teacher_bytes": teacher_bytes, "retained": found.retained}
    for when, each in (("before", found.before), ("after", found.after), ("teacher", found.teacher)):
        evidence |= {f"held_out_loss_{when}": each.loss, f"held_out_top1_{when}": each.top1}
    said = msgspec.structs.replace(last, evidence={**last.evidence, **evidence})
    return dataclasses.replace(found.model, provenance=(*history, said))
