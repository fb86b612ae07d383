"""`hasten quantize MODEL OUT` and `hasten apply RECIPE MODEL OUT`: a smaller model, measured before it is kept."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.base.errors import MissingExtraError, UnsupportedError
from hasten.cli import options
from hasten.cli.chosen import print_chosen
from hasten.cli.terminal import notify, reporter, visible_line

if TYPE_CHECKING:
    from hasten.compress.gates import Shrunk
    from hasten.compress.make import Made
    from hasten.compress.recipe import Step
    from hasten.model import Model, Provenance

METHODS = ("rtn", "gptq", "awq", "smoothquant", "rotate", "codebook", "best")
USUAL = {"smoothquant": "int8", "codebook": "lut4-g64"}
BY_LAYER = ("rtn", "gptq")

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", help="Text to calibrate on: a file, a folder, or JSONL with a 'text' each. [default: the standard library]"),
]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Windows of text to calibrate on.")]
SequenceOption = Annotated[
    int | None, typer.Option("--sequence", min=2, help="Tokens of a window. [default: 512, or the model's context if less]")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Chooses the windows.")]
MaxLossOption = Annotated[float, typer.Option("--max-loss", help="Most percent that the held-out loss may rise.")]
EvenOption = Annotated[bool, typer.Option("--even-if-worse", help="Keep the result whatever its loss.")]
HeldOutOption = Annotated[
    Path | None, typer.Option("--held-out", help="Text to measure the loss on: a file or folder. [default: the held-out standard library]")
]
GateTokensOption = Annotated[int, typer.Option("--gate-tokens", min=1, help="Tokens of it to measure.")]
WorkOption = Annotated[
    Path | None, typer.Option("--work", help="Where unfinished work lies, to be gone on with after a kill. [default: .OUT.work beside OUT]")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="All cores unless given; changes no result but of training.")]
BatchOption = Annotated[str, typer.Option("--batch", help="Sequences at once at which original and result are timed, as 1,8.")]
NoSpeedOption = Annotated[bool, typer.Option("--no-speed", help="Leave timing out.")]
HealOption = Annotated[
    float | None, typer.Option("--heal", help="Then train it for so many minutes towards the original, to learn back what that cost.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in OUT.")]


@dataclasses.dataclass(frozen=True, slots=True)
class Making:
    """What calibrates and measures a result, and where it is worked on: options of each command that compresses."""

    text: TextOption = None
    samples: SamplesOption = 256
    sequence: SequenceOption = None
    seed: SeedOption = 0
    max_loss: MaxLossOption = 5.0
    even_if_worse: EvenOption = False
    held_out: HeldOutOption = None
    gate_tokens: GateTokensOption = 32768
    work: WorkOption = None
    threads: ThreadsOption = None
    batch: BatchOption = "1,8"
    no_speed: NoSpeedOption = False
    overwrite: OverwriteOption = False


MAKING = Making()


@options.spread
def quantize(
    model: options.ModelArgument,
    out: OutArgument,
    method: Annotated[str, typer.Option("--method", help=f"How weights are rounded: {', '.join(METHODS)}.")] = "gptq",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="int8 to int2, fp8, lut4, or a variant: int4-g64. [default: int4-g64; int8 for smoothquant, lut4-g64 for codebook]",
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            help="What the weights are multiplied with: bf16, int8, int8-static, or fp8. [default: bf16; int8 for smoothquant, rotate]",
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Bits a weight over all layers, as stored; each layer takes what serves best of --weights (a list)."),
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="Round the head too, to this format; with it the embedding, where both are one.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="Leave these layers, as 'blocks.0.*'; repeatable.")] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="Have keys and values kept in fp8 or int8 wherever the model is played.")
    ] = None,
    making: Making = MAKING,
    as_json: options.JsonOption = False,
) -> None:
    """Round a model's linear weights: the short form of a recipe. Norms and routers are left as they are, the head unless asked."""
    if method not in METHODS:
        options.refuse("--method", method, ", ".join(METHODS))
    if bits is None:
        steps = short_form(method, weights, activations, skip or [])
    else:
        if method not in BY_LAYER:
            options.refuse("--method", method, f"{', '.join(BY_LAYER)} where --bits are chosen by layer")
        steps = short_form_by_layer(bits, method, weights, activations, skip or [])
    if head is not None:
        last = max(index for index, step in enumerate(steps) if "static" not in step)
        steps[last] = {name: {**settings, "head": head} for name, settings in steps[last].items()}
    if cache is not None:
        steps.append({"cache": {"format": cache}})
    run_recipe(model, steps, out, making, as_json)


@options.spread
def apply(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML list of transforms, as '- gptq: {weights: int4-g64}'.")],
    model: options.ModelArgument,
    out: OutArgument,
    making: Making = MAKING,
    as_json: options.JsonOption = False,
) -> None:
    """Take a model through a recipe of transforms."""
    run_recipe(model, recipe, out, making, as_json)


def short_form(method: str, weights: str | None, activations: str | None, skip: Sequence[str]) -> list[dict[str, Any]]:
    """The recipe that `hasten quantize` is short for, as plain data."""
    from hasten.formats.quantized import STATIC

    stored = weights or USUAL.get(method, "int4-g64")
    left: dict[str, Any] = {"skip": list(skip)} if skip else {}
    fed = activations or ("int8" if method in {"smoothquant", "rotate"} else "bf16")
    rounding = {"weights": stored, "activations": "int8" if fed == STATIC else fed, **left}
    return [*_rounding(method, rounding, left), *([{"static": left}] if fed == STATIC else [])]


def _rounding(method: str, rounding: dict[str, Any], left: dict[str, Any]) -> list[dict[str, Any]]:
    match method:
        case "rtn":
            return [{"rtn": rounding}]
        case "gptq":
            return [{"gptq": {**rounding, "clip": "outputs"}}]
        case "awq":
            return [{"awq": {"weights": rounding["weights"], **left}}, {"rtn": {**rounding, "clip": "outputs"}}]
        case "smoothquant":
            return [{"smoothquant": left}, {"rtn": rounding}]
        case "codebook":
            return [{"codebook": rounding}]
        case "rotate":
            return [{"rotate": {}}, {"gptq": {**rounding, "clip": "outputs"}}]
        case _:
            return [{"gptq": {**rounding, "clip": "outputs", "descend": 4, "aim": "plain"}}]


def short_form_by_layer(
    bits: float, method: str, weights: str | None, activations: str | None, skip: Sequence[str]
) -> list[dict[str, Any]]:
    """The same where bits are chosen by layer, of the formats that ``weights`` lists."""
    rounding: dict[str, Any] = {"bits": bits, "activations": activations or "bf16", **({"skip": list(skip)} if skip else {})}
    if weights is not None:
        rounding["choices"] = [each.strip() for each in weights.split(",")]
    return [{"mixed": {**rounding, "method": method, "clip": "none" if method == "rtn" else "outputs"}}]


def healing(minutes: float | None) -> list[dict[str, Any]]:
    """The part of a recipe that `--heal` is short for."""
    return [] if minutes is None else [{"heal": {"minutes": minutes}}]


def run_recipe(name: str, recipe: Path | list[dict[str, Any]], out: Path, making: Making, as_json: bool) -> None:
    """Take the model ``name`` through a recipe into ``out``, and print what came of it: a table, or JSON."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load

    try:
        from hasten.compress.evidence import Gate
        from hasten.compress.make import Calibration, make
        from hasten.compress.recipe import read_recipe, recipe_of
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("compressing a model", "torch") from None
    from hasten.base import hardware
    from hasten.compress.walk import Run
    from hasten.measure.speed import SpeedTest

    speed = None if making.no_speed else SpeedTest(tuple(options.counts("batch", making.batch)), prompt=64, new=8)
    steps: Sequence[Step] = read_recipe(recipe) if isinstance(recipe, Path) else recipe_of(recipe, "options")
    loaded = load(name)
    place = making.work or out.absolute().parent / f".{out.absolute().name}.work"
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        run = Run(place, making.threads or hardware.detect().cpu.cores, reporter(progress))
        made = make(
            loaded, steps, out, run=run, overwrite=making.overwrite, speed=speed,
            calibration=Calibration(making.text, making.samples, making.sequence, making.seed),
            gate=Gate(None if making.even_if_worse else making.max_loss / 100, making.held_out, making.gate_tokens),
            began=lambda takes: notify(f"{takes}; unfinished work lies in {place}"),
        )  # fmt: skip
    facts = _facts(name, out, steps, loaded, made)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _print(facts)


def _facts(name: str, out: Path, steps: Sequence["Step"], loaded: "Model", made: "Made") -> dict[str, Any]:
    import msgspec

    from hasten.checkpoint import exported, unread_elsewhere

    unread = unread_elsewhere(made.model)
    if unread:
        with contextlib.suppress(UnsupportedError):
            exported(made.model)
            unread += f"; hasten export {out} writes one that it loads"
    found, timed, shrunk = made.comparison, made.timed, made.shrunk
    return {
        "model": name,
        "out": str(out),
        "recipe": [{step.transform.name: msgspec.to_builtins(step.settings)} for step in steps],
        **({} if shrunk is None else _shares(shrunk)),
        "base_bytes": loaded.weights.nbytes,
        "bytes": made.model.weights.nbytes,
        "left": next((dict(step.evidence["left"]) for step in reversed(made.model.provenance) if "left" in step.evidence), {}),
        "unread_elsewhere": unread,
        "chosen": [dict(step.evidence) for step in made.model.provenance if "chosen" in step.evidence],
        "cache_bytes_per_token": _cache_bytes(made.model.provenance[len(loaded.provenance) :]),
        "cache": None if made.model.cache is None else made.model.cache.format,
        **({} if found is None else {**dataclasses.asdict(found), "increase": found.increase}),
        **({"not_timed": timed} if isinstance(timed, str) else {"speed": dataclasses.asdict(timed), "not_faster": timed.not_faster()}),
    }


def _print(facts: dict[str, Any]) -> None:
    names = ", ".join(key for step in facts["recipe"] for key in step)
    typer.echo(visible_line(f"{facts['model']} → {facts['out']} by {names}"))
    typer.echo(_shrunk(facts))
    if facts["cache_bytes_per_token"]:
        before, after = facts["cache_bytes_per_token"]
        typer.echo(f"cache {before:,} → {after:,} bytes a token, kept in bf16")
    if facts["cache"] is not None:
        typer.echo(f"keys and values are kept in {facts['cache']} wherever the model is played, unless --cache asks for another format")
    if "loss" in facts:
        typer.echo(
            f"held-out loss {facts['base_loss']:.4f} → {facts['loss']:.4f} ({facts['increase']:+.2%})   KL {facts['kl']:.4f} nats   "
            f"top-1 agreement {facts['agreement']:.4f}   ({facts['tokens']:,} tokens)"
        )
    else:
        typer.echo("the model has no tokenizer, so there is no text to measure its loss on: it was not measured")
    if "speed" in facts:
        _print_speed(facts["speed"], facts["not_faster"])
    else:
        typer.echo(visible_line(f"tokens a second were not measured: {facts['not_timed']}"))
    for why, left in facts["left"].items():
        typer.echo(visible_line(f"left as they were, {left['weights']} of {left['bytes']:,} bytes: {why}"))
    for evidence in facts["chosen"]:
        print_chosen(evidence)
    if facts["unread_elsewhere"]:
        typer.echo(visible_line(f"transformers does not load what was written: {facts['unread_elsewhere']}"))
    typer.echo("read back from disk: the same codes, and the same logits in the engine")


def _cache_bytes(steps: Sequence["Provenance"]) -> list[int] | None:
    """Before the first step that changed what a token keeps, and after the last; None where none did."""
    found = [step.evidence["cache_bytes_per_token"] for step in steps if "cache_bytes_per_token" in step.evidence]
    return [found[0][0], found[-1][1]] if found else None


def _shares(shrunk: "Shrunk") -> dict[str, Any]:
    return {
        "smaller": shrunk.what, "smaller_bytes_before": shrunk.before, "smaller_bytes": shrunk.after,
        "smaller_share": shrunk.after / shrunk.before,
    }  # fmt: skip


def _shrunk(facts: dict[str, Any]) -> str:
    if "smaller" not in facts:
        return f"no weight was made smaller; all weights {facts['bytes']:,} bytes"
    return (
        f"{facts['smaller']} {facts['smaller_bytes_before']:,} → {facts['smaller_bytes']:,} bytes ({facts['smaller_share']:.3f}); "
        f"all weights {facts['base_bytes']:,} → {facts['bytes']:,}"
    )


def _print_speed(speed: dict[str, Any], not_faster: Sequence[str]) -> None:
    test, original, made = speed["test"], speed["original"], speed["made"]
    typer.echo(
        f"tokens a second, {original['weights']} × {original['activations']} → {made['weights']} × {made['activations']}, median of "
        f"{test['rounds']} rounds in turn, {made['isa']}, {made['threads']} threads"
    )
    for before, after in zip(original["rows"], made["rows"]):
        phases = (
            f"{phase} {before[f'{phase}_tokens_per_s']:,.1f} → {after[f'{phase}_tokens_per_s']:,.1f} ({after[phase]['median']:.2f} ×)"
            for phase in ("prefill", "decode")
        )
        typer.echo(f"  batch {after['batch']}: {', '.join(phases)}")
    for line in not_faster:
        typer.echo(line)
