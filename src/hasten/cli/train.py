"""`hasten train SPEC OUT`: a model made from nothing, or one that learns on."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.base import hardware
from hasten.base.errors import ConfigError, MissingExtraError, UserError
from hasten.cli import options
from hasten.cli.terminal import notify, visible_line

if TYPE_CHECKING:
    from hasten.compress.generated import Generated
    from hasten.compress.learn import Learned
    from hasten.model import Model
    from hasten.spec import Spec

PRECISIONS = ("auto", "float32", "bfloat16")

TextOption = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="A file, a folder, or JSONL with a 'text' each, or a 'prompt' and an 'answer', of which the answer is learned. "
        "[default: the standard library less the held-out set]",
    ),
]
GenerateOption = Annotated[
    int | None,
    typer.Option(
        "--generate", min=1, metavar="TOKENS", help="Learn from so many tokens that a model writes: the teacher, else the model itself."
    ),
]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Write the loss curve as a picture, as in loss.png.")]
EvalTokensOption = Annotated[int, typer.Option("--eval-tokens", min=1, help="Tokens of the held-out set to measure, before and after.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in OUT.")]


@dataclasses.dataclass(frozen=True, slots=True)
class Learning:
    """How to learn: options of each command that trains."""

    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps to learn for.")] = None
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Minutes to learn for; the machine's speed then says how many steps. [default: 10]")
    ] = None
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a step.")] = 8192
    together: Annotated[
        int, typer.Option("--together", min=1, help="Tokens of a step that are played at once; fewer take less memory.")
    ] = 4096
    sequence: Annotated[
        int | None, typer.Option("--sequence", min=1, help="Tokens of an example. [default: 512, or the model's context if less]")
    ] = None
    rate: Annotated[float, typer.Option("--rate", help="Learning rate at its highest.")] = 1e-3
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps over which it rises.")] = 0.05
    decay: Annotated[float, typer.Option("--decay", help="Share of the steps, the last ones, over which it falls to 0.")] = 0.5
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of matrices.")] = 0.1
    adamw: Annotated[bool, typer.Option("--adamw", help="AdamW for matrices too, instead of Muon.")] = False
    precision: Annotated[
        str, typer.Option("--precision", help=f"What it computes in: {', '.join(PRECISIONS)}; weights are learned in float32 always.")
    ] = "auto"
    recompute: Annotated[bool, typer.Option("--recompute", help="Play each block twice rather than keep its values.")] = False
    seed: Annotated[int, typer.Option("--seed", help="Chooses the order of examples, and weights that begin from nothing.")] = 0
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="All cores unless given.")] = None
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Where unfinished work lies, to be gone on with after a kill. [default: .OUT.work beside OUT]"),
    ] = None


LEARNING = Learning()


@options.spread
def train(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A model to learn on, or a .json file with a Spec to make one of.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    from_nothing: Annotated[
        bool, typer.Option("--from-nothing", help="Only the Spec and tokenizer of the model; its weights anew.")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="The model whose tokenizer a Spec takes. [default: code-8m]")] = None,
    text: TextOption = None,
    generate: GenerateOption = None,
    written_by: Annotated[
        str | None, typer.Option("--written-by", metavar="MODEL", help="Who writes them. [default: the model itself]")
    ] = None,
    learning: Learning = LEARNING,
    plot: PlotOption = None,
    eval_tokens: EvalTokensOption = 32768,
    overwrite: OverwriteOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train a model on text: further, or from nothing."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load

    try:
        from hasten.compress.learn import Lesson, fresh, learn
        from hasten.train import Work, draw_curve, picture_curve
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("training a model", "torch") from None

    settings = settings_of(learning)
    if spec.endswith(".json") and not from_nothing:
        model: Model = fresh(read_spec(spec), load(tokenizer or "code-8m"), Path(spec).stem, learning.seed)
    elif tokenizer is not None:
        raise ConfigError("--tokenizer goes with a .json file: a model has its own; leave it out")
    else:
        model = load(spec)
        model = fresh(model.spec, model, model.name, learning.seed) if from_nothing else model
    if generate is not None and written_by is None and (from_nothing or spec.endswith(".json")):
        raise ConfigError("what begins from nothing has nothing to write: name who writes with --written-by")
    if generate is None and written_by is not None:
        raise ConfigError(f"--written-by {written_by} says who writes, but not how much: give --generate, too")
    writer = model if written_by is None else load(written_by)
    place = learning.work or out.absolute().parent / f".{out.absolute().name}.work"
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("learning", total=None)

        def report(step: int, steps: int, loss: float) -> None:
            progress.update(task, description=f"learning, loss {loss:.3f}", completed=step, total=steps)

        def writing(done: int, documents: int) -> None:
            progress.update(task, description=f"{writer.name} is writing", completed=done, total=documents)

        source = text_of(text, generate, writer, learning.seed, writing)
        learned = learn(
            model, Lesson(settings, source, learning.sequence, learning.tokens, learning.seed), out,
            Work(place, learning.threads or hardware.detect().cpu.cores, report), overwrite=overwrite, tokens=eval_tokens,
            began=lambda name, tokens: notify(f"{tokens:,} tokens of {name}; unfinished work lies in {place}"),
        )  # fmt: skip
    if plot is not None:
        picture_curve(learned.trained.losses, plot)
    facts = facts_of(spec, out, learned)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(draw_curve(learned.trained.losses))
    took = f"{facts['steps']:,} steps in {facts['seconds']:.0f} s"
    typer.echo(visible_line(f"{spec} → {out}: {took}, loss {facts['first_loss']:.4f} → {facts['last_loss']:.4f}"))
    if learned.before is not None and learned.after is not None:
        before, after = learned.before, learned.after
        typer.echo(
            f"held-out loss {before.loss:.4f} → {after.loss:.4f}   top-1 {before.top1:.4f} → {after.top1:.4f}   ({after.tokens:,} tokens)"
        )


def read_spec(path: str) -> "Spec":
    """The Spec of a .json file. Raises UserError for what is none."""
    from hasten.spec import Spec

    try:
        return Spec.from_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; name a .json file with a Spec, or a model") from None


def text_of(
    text: Path | None, generate: int | None, writer: "Model", seed: int, report: Callable[[int, int], None]
) -> "Path | Generated | None":  # fmt: skip
    """What a Lesson is of. Raises ConfigError where both are given."""
    from hasten.compress.generated import Generated

    if text is not None and generate is not None:
        raise ConfigError(f"--text {text} and --generate {generate} both say what is learned from; give one")
    return text if generate is None else Generated(writer, generate, seed, report=report)


def settings_of(learning: Learning) -> Any:
    """The trainer's settings. Raises ConfigError for what does not go together."""
    from hasten.train import Minutes, Settings, Steps, precision_here

    if learning.steps is not None and learning.minutes is not None:
        raise ConfigError(f"--steps {learning.steps} and --minutes {learning.minutes} both say how long; give one")
    if learning.precision not in PRECISIONS:
        options.refuse("--precision", learning.precision, ", ".join(PRECISIONS))
    budget = Steps(learning.steps) if learning.steps is not None else Minutes(10.0 if learning.minutes is None else learning.minutes)
    precision = precision_here() if learning.precision == "auto" else learning.precision
    return Settings(
        budget=budget, rate=learning.rate, warmup=learning.warmup, decay=learning.decay, weight_decay=learning.weight_decay,
        muon=not learning.adamw, together=learning.together, recompute=learning.recompute,
        precision="bfloat16" if precision == "bfloat16" else "float32",
    )  # fmt: skip


def facts_of(name: str, out: Path, learned: "Learned") -> dict[str, Any]:
    """What was learned, for programs."""
    losses = learned.trained.losses
    facts: dict[str, Any] = {
        "model": name, "out": str(out), "steps": len(losses), "seconds": learned.trained.seconds, "first_loss": losses[0],
        "last_loss": losses[-1], "losses": list(losses),
    }  # fmt: skip
    for when, found in (("before", learned.before), ("after", learned.after)):
        if found is not None:
            facts |= {f"held_out_loss_{when}": found.loss, f"held_out_top1_{when}": found.top1, "held_out_tokens": found.tokens}
    return facts
