"""`hasten prune MODEL OUT`: fewer weights, rounded too where asked, measured before they are kept."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.quantize import MAKING, HealOption, Making, OutArgument, healing, run_recipe, short_form

METHODS = ("magnitude", "wanda", "sparsegpt")


@options.spread
def prune(
    model: options.ModelArgument,
    out: OutArgument,
    method: Annotated[str, typer.Option("--method", help=f"How the weights that go are chosen: {', '.join(METHODS)}.")] = "sparsegpt",
    sparsity: Annotated[
        str, typer.Option("--sparsity", help="The share of weights that go, or how many of how many stay: 50%, 2:4.")
    ] = "50%",
    weights: Annotated[
        str | None, typer.Option("--weights", help="Round what stays: int8, int4 or a variant: int4-g64. [default: it stays bf16]")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option("--activations", help="What rounded weights are multiplied with: bf16, int8, or int8-static. [default: bf16]"),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="Leave these layers, as 'blocks.0.*'; repeatable.")] = None,
    heal: HealOption = None,
    making: Making = MAKING,
    as_json: options.JsonOption = False,
) -> None:
    """Take away part of a model's linear weights and store the rest with a mask: the short form of a recipe."""
    if method not in METHODS:
        options.refuse("--method", method, ", ".join(METHODS))
    if activations is not None and weights is None:
        options.refuse("--activations", activations, "what weights are rounded for: give --weights")
    run_recipe(model, pruning_steps(method, sparsity, weights, activations, skip or [], heal), out, making, as_json)


def pruning_steps(
    method: str, sparsity: str, weights: str | None, activations: str | None, skip: Sequence[str], heal: float | None = None
) -> list[dict[str, Any]]:
    """The recipe that `hasten prune` is short for, as plain data. Raises UnsupportedError for weights that no pruned one is rounded to."""
    from hasten.formats.linear import LinearFormat

    steps: list[dict[str, Any]] = [{method: {"sparsity": sparsity, **({"skip": list(skip)} if skip else {})}}, *healing(heal)]
    if weights is not None:
        LinearFormat.parse(weights).as_sparse()  # told now, rather than when pruning is done
        steps += short_form("gptq", weights, activations, skip)
    return steps
