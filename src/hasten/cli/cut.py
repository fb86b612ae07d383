"""`hasten cut MODEL OUT` and `hasten share MODEL OUT`: fewer parts, or fewer numbers in them, measured before they are kept."""

from typing import Annotated, Any

import typer

from hasten.base.errors import ConfigError
from hasten.cli import options
from hasten.cli.quantize import MAKING, HealOption, Making, OutArgument, healing, run_recipe


@options.spread
def cut(
    model: options.ModelArgument,
    out: OutArgument,
    layers: Annotated[str | None, typer.Option("--layers", help="Whole layers: a share, as 25%, or how many.")] = None,
    width: Annotated[str | None, typer.Option("--width", help="Features of the residual stream: a share, as 25%.")] = None,
    heads: Annotated[str | None, typer.Option("--heads", help="Query heads: a share.")] = None,
    kv_heads: Annotated[str | None, typer.Option("--kv-heads", help="Key/value heads, each with its query heads: a share.")] = None,
    neurons: Annotated[str | None, typer.Option("--neurons", help="Neurons of feed-forwards: a share.")] = None,
    heal: HealOption = None,
    making: Making = MAKING,
    as_json: options.JsonOption = False,
) -> None:
    """Cut parts out of a model, those it lacks least, and mend what stays: the short form of a recipe."""
    steps: list[dict[str, Any]] = []
    if layers is not None:
        steps.append({
            "cut_layers": {"count": int(layers)} if layers.isascii() and layers.isdigit() else {"share": share("--layers", layers)}
        })
    for name, text, settings in (
        ("cut_width", width, {}), ("cut_heads", heads, {}), ("cut_heads", kv_heads, {"kind": "kv"}), ("cut_neurons", neurons, {}),
    ):  # fmt: skip
        if text is not None:
            option = "--kv-heads" if settings else f"--{name.removeprefix('cut_')}"
            steps.append({name: {"share": share(option, text), **settings}})
    if not steps:
        raise ConfigError("nothing is to be cut; give --layers, --width, --heads, --kv-heads or --neurons, as in --neurons 25%")
    run_recipe(model, [*steps, *healing(heal)], out, making, as_json)


@options.spread
def share_weights(
    model: options.ModelArgument,
    out: OutArgument,
    every: Annotated[int | None, typer.Option("--every", help="So many layers side by side have one set of matrices.")] = None,
    rank: Annotated[str | None, typer.Option("--rank", help="Matrices as products of two that have a share fewer numbers, as 30%.")] = None,
    heal: HealOption = None,
    making: Making = MAKING,
    as_json: options.JsonOption = False,
) -> None:
    """Have layers share their matrices, or matrices be of low rank: the short form of a recipe."""
    steps: list[dict[str, Any]] = [] if rank is None else [{"rank": {"share": share("--rank", rank)}}]
    steps += [] if every is None else [{"share": {"every": every}}]
    if not steps:
        raise ConfigError("nothing is to be shared; give --every, as in --every 2, or --rank, as in --rank 30%")
    run_recipe(model, [*steps, *healing(heal)], out, making, as_json)


def share(option: str, text: str) -> float:
    """A share between 0 and 1 of a text such as 25% or 0.25. Ends the program with a message for anything else."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        found = float(number) / (100 if percent else 1)
    except ValueError:
        found = -1.0
    if not 0 < found < 1:
        options.refuse(option, text, "a share between 0 and 1, as 25% or 0.25")
    return found
