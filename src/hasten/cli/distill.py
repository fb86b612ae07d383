"""`hasten distill TEACHER OUT`: a smaller model that learns from a larger one."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.base import hardware
from hasten.base.errors import ConfigError, MissingExtraError
from hasten.cli import options
from hasten.cli.terminal import notify, visible_line
from hasten.cli.train import (
    LEARNING,
    EvalTokensOption,
    GenerateOption,
    Learning,
    OverwriteOption,
    PlotOption,
    TextOption,
    read_spec,
    settings_of,
    text_of,
)

if TYPE_CHECKING:
    from hasten.compress.distill import Distilled, Teaching
    from hasten.compress.students import Pairs
    from hasten.model import Model

DIVERGENCES = ("forward", "reverse", "jensen-shannon")
HIDDEN = ("mse", "cosine")
ATTENTION = ("maps", "relations")


@dataclasses.dataclass(frozen=True, slots=True)
class Choosing:
    """Which student learns."""

    student: Annotated[
        str | None, typer.Option("--student", metavar="MODEL", help="A model that learns on, or a .json file with a Spec to make one of.")
    ] = None
    depth: Annotated[int | None, typer.Option("--depth", help="Cut the student from its teacher: so many blocks, evenly spread.")] = None
    layers: Annotated[str | None, typer.Option("--layers", help="Cut the student from its teacher: these blocks, as 0,2,4,6.")] = None


@dataclasses.dataclass(frozen=True, slots=True)
class Teaches:
    """What the student learns from, and how much each counts."""

    labels: Annotated[float | None, typer.Option("--labels", help="Weight of the text's own loss. [default: 0; 1 with --mutual]")] = None
    soft: Annotated[float, typer.Option("--soft", help="Weight of the distance from the teacher's distribution.")] = 1.0
    temperature: Annotated[float, typer.Option("--temperature", help="Both distributions' temperature there.")] = 1.0
    divergence: Annotated[str, typer.Option("--divergence", help=f"That distance: {', '.join(DIVERGENCES)}.")] = "forward"
    hidden: Annotated[float, typer.Option("--hidden", help="Weight of the distance from the teacher's hidden states.")] = 0.0
    hidden_by: Annotated[str, typer.Option("--hidden-by", help=f"That distance: {', '.join(HIDDEN)}.")] = "mse"
    attention: Annotated[float, typer.Option("--attention", help="Weight of the distance from the teacher's attention.")] = 0.0
    attention_by: Annotated[
        str, typer.Option("--attention-by", help="Compare maps, head by head, or relations of the last pair, for any heads.")
    ] = "maps"
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="Which block of the student is compared with which of the teacher, as 0:1,1:3. [default: evenly]"),
    ] = None
    teacher_weights: Annotated[
        str | None,
        typer.Option("--teacher-weights", help="Play the teacher in this format, as int8, which is faster. [default: as it is stored]"),
    ] = None
    online: Annotated[bool, typer.Option("--online", help="The teacher learns on, from the text, while the student follows.")] = False
    mutual: Annotated[bool, typer.Option("--mutual", help="Teacher and student learn from each other, and from the text.")] = False
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", metavar="MODEL", help="One more that learns beside them with --mutual: a model or a Spec's .json; repeatable."
        ),
    ] = None
    keep: Annotated[Path | None, typer.Option("--keep", help="Write the others that learned, too: DIR/teacher, DIR/peer1 and so on.")] = (
        None
    )


CHOOSING, TEACHES = Choosing(), Teaches()


@options.spread
def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="The model to learn from.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write the student to.")],
    choosing: Choosing = CHOOSING,
    teaches: Teaches = TEACHES,
    text: TextOption = None,
    generate: GenerateOption = None,
    learning: Learning = LEARNING,
    plot: PlotOption = None,
    eval_tokens: EvalTokensOption = 32768,
    overwrite: OverwriteOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Teach a smaller model what a larger one knows: what it says, what it holds inside, or both."""
    from msgspec import structs
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load

    try:
        from hasten.compress.distill import distill as run
        from hasten.compress.learn import Lesson
        from hasten.train import Work, draw_curve, picture_curve
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("distilling a model", "torch") from None

    settings, teaching = settings_of(learning), teaching_of(teaches)
    if teaches.keep is not None and teaching.teacher == "fixed":
        raise ConfigError(f"--keep {teaches.keep} is for others that learn: give --online or --mutual too")
    loaded = load(teacher)
    student, pairs = student_of(loaded, choosing, learning.seed)
    teaching = structs.replace(teaching, pairs=teaching.pairs or pairs)
    peers = [_made(loaded, name, learning.seed + number) for number, name in enumerate(teaches.peer or (), 1)]
    place = learning.work or out.absolute().parent / f".{out.absolute().name}.work"
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("learning", total=None)

        def report(step: int, steps: int, loss: float) -> None:
            progress.update(task, description=f"learning, loss {loss:.3f}", completed=step, total=steps)

        def writing(done: int, documents: int) -> None:
            progress.update(task, description="the teacher is writing", completed=done, total=documents)

        lesson = Lesson(
            settings, text_of(text, generate, loaded, learning.seed, writing), learning.sequence, learning.tokens, learning.seed
        )
        learned = run(
            loaded, student, teaching, lesson, out, Work(place, learning.threads or hardware.detect().cpu.cores, report),
            peers=peers, keep=teaches.keep, overwrite=overwrite, tokens=eval_tokens,
            began=lambda name, tokens: notify(f"{tokens:,} tokens of {name}; unfinished work lies in {place}"),
        )  # fmt: skip
    if plot is not None:
        picture_curve(learned.trained.losses, plot)
    facts = facts_of(teacher, out, loaded, learned)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(draw_curve(learned.trained.losses))
    took = f"{facts['steps']:,} steps in {facts['seconds']:.0f} s"
    typer.echo(visible_line(f"{teacher} → {out}: {took}, loss {facts['first_loss']:.4f} → {facts['last_loss']:.4f}"))
    _print(facts)


def teaching_of(teaches: Teaches) -> "Teaching":
    """How the student learns. Raises ConfigError for what does not go together."""
    from hasten.compress.distill import Teaching

    if teaches.online and teaches.mutual:
        raise ConfigError("--online and --mutual both say how the teacher learns; give one")
    for name, value, accepted in (
        ("--divergence", teaches.divergence, DIVERGENCES), ("--hidden-by", teaches.hidden_by, HIDDEN),
        ("--attention-by", teaches.attention_by, ATTENTION),
    ):  # fmt: skip
        if value not in accepted:
            options.refuse(name, value, ", ".join(accepted))
    if teaches.peer and not teaches.mutual:
        raise ConfigError(f"--peer {teaches.peer[0]} learns from the others as they from it: give --mutual too")
    labels = (1.0 if teaches.mutual else 0.0) if teaches.labels is None else teaches.labels
    return Teaching(
        labels=labels, soft=teaches.soft, temperature=teaches.temperature, divergence=teaches.divergence,  # type: ignore[arg-type]
        hidden=teaches.hidden, hidden_by=teaches.hidden_by, attention=teaches.attention,  # type: ignore[arg-type]
        attention_by=teaches.attention_by, pairs=None if teaches.pairs is None else pairs_in(teaches.pairs),  # type: ignore[arg-type]
        teacher="mutual" if teaches.mutual else "online" if teaches.online else "fixed",
        teacher_weights=teaches.teacher_weights,
    )  # fmt: skip


def student_of(teacher: "Model", choosing: Choosing, seed: int) -> tuple["Model", "Pairs | None"]:
    """The student, and the pairs of blocks that follow from how it was cut. Raises ConfigError unless one of the options is given."""
    from hasten.compress.students import cut_depth, pairs_of, spread_layers

    blocks = len(teacher.spec.blocks)
    if sum(given is not None for given in (choosing.student, choosing.depth, choosing.layers)) != 1:
        raise ConfigError(
            f"one student is needed: --student MODEL, --student SPEC.json, --depth of the teacher's {blocks} blocks, or --layers, as 0,2,4"
        )
    if choosing.student is not None:
        return _made(teacher, choosing.student, seed), None
    if choosing.depth is not None:
        layers = spread_layers(blocks, choosing.depth)
    else:
        pieces = [piece.strip() for piece in (choosing.layers or "").split(",")]
        if not all(piece.isascii() and piece.isdecimal() and len(piece) < 6 for piece in pieces):
            options.refuse("--layers", choosing.layers, f"blocks of {teacher.name} in rising order, 0 to {blocks - 1}, as 0,2,4")
        layers = tuple(map(int, pieces))
    return cut_depth(teacher, layers), pairs_of(len(layers), blocks, layers)


def _made(teacher: "Model", name: str, seed: int) -> "Model":
    """A model, or one made of a Spec with the teacher's tokenizer."""
    from hasten.checkpoint import load
    from hasten.compress.learn import fresh

    return fresh(read_spec(name), teacher, Path(name).stem, seed) if name.endswith(".json") else load(name)


def pairs_in(text: str) -> "Pairs":
    """--pairs, parsed."""
    made = []
    for piece in text.split(","):
        both = [each.strip() for each in piece.split(":")]
        if len(both) != 2 or not all(each.isascii() and each.isdecimal() and len(each) < 6 for each in both):
            options.refuse("--pairs", text, "a block of the student and one of the teacher each, from 0, as 0:1,1:3")
        made.append((int(both[0]), int(both[1])))
    return tuple(made)


def facts_of(name: str, out: Path, teacher: "Model", learned: "Distilled") -> dict[str, Any]:
    """What came of it, for programs."""
    losses, student = learned.trained.losses, learned.model
    facts: dict[str, Any] = {
        "teacher": name, "out": str(out), "steps": len(losses), "seconds": learned.trained.seconds, "first_loss": losses[0],
        "last_loss": losses[-1], "losses": list(losses), "parameters": student.weights.parameters, "bytes": student.weights.nbytes,
        "teacher_parameters": teacher.weights.parameters, "teacher_bytes": teacher.weights.nbytes, "retained": learned.retained,
        "held_out_tokens": learned.after.tokens,
    }  # fmt: skip
    for when, found in (("before", learned.before), ("after", learned.after), ("teacher", learned.teacher)):
        facts |= {f"held_out_loss_{when}": found.loss, f"held_out_top1_{when}": found.top1}
    return facts


def _print(facts: dict[str, Any]) -> None:
    typer.echo(
        f"held-out loss {facts['held_out_loss_before']:.4f} → {facts['held_out_loss_after']:.4f}, the teacher's "
        f"{facts['held_out_loss_teacher']:.4f}   ({facts['held_out_tokens']:,} tokens)"
    )
    kept = "nothing to retain" if facts["retained"] is None else f"{facts['retained']:.2%} retained"
    typer.echo(
        f"top-1 {facts['held_out_top1_before']:.4f} → {facts['held_out_top1_after']:.4f}, the teacher's "
        f"{facts['held_out_top1_teacher']:.4f}: {kept}"
    )
    less = facts["bytes"] / facts["teacher_bytes"] - 1
    typer.echo(f"weights {facts['bytes']:,} bytes of the teacher's {facts['teacher_bytes']:,} ({less:+.1%})")
