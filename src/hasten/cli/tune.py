"""`hasten tune`: block sizes measured on a GPU, kept for every later run there."""

import json
from typing import Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.table import print_table


def tune(
    model: options.ModelArgument,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="How linear layers are stored: bf16, int8, int4 …; several, separated by commas, are each tuned."),
    ] = None,
    activations: options.ActivationsOption = None,
    rows: Annotated[
        str, typer.Option("--rows", help="Numbers of rows to measure, separated by commas; those between take the next larger one's.")
    ] = "1,16,64,256,2048",
    as_json: options.JsonOption = False,
) -> None:
    """Time block sizes for the products of a model on the GPU, and keep the best: later runs on that device take them. Takes minutes.

    Of sizes that give a row other bits in another batch none is kept. What a shape is summed in may change, and with it the last bits of
    logits; then as before they are the same in every batch. --json prints one object a product."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load
    from hasten.engine.backends import find_loaded
    from hasten.program import Formats

    formats: list[str | None] = [None] if weights is None else [each.strip() for each in weights.split(",")]
    counted, loaded = sorted(set(options.counts("rows", rows))), load(model)
    backend = find_loaded("cuda", loaded)
    path = backend.tuned_path()
    products = backend.products(loaded, [Formats(each, activations) for each in formats])
    table: list[tuple[str, ...]] = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(products))
        progress.update(task, description=products[0].name if products else "")
        for number, found in enumerate(backend.tune(products, counted), 1):
            progress.update(task, completed=number, description=products[number].name if number < len(products) else "")
            if as_json:
                typer.echo(json.dumps(_facts(found, counted)))
            table += [_line(found, count) for count in counted]
    if not as_json:
        print_table(("product", "rows", "default µs", "µs", "order", "tiles"), table)
        typer.echo(f"kept in {path}")


def _line(found: Any, rows: int) -> tuple[str, ...]:
    (before, after), order, tiles = found.seconds(rows), found.chosen.order, found.chosen.tiles[rows]
    if found.chosen.kernel == "triton":
        cut = (
            f"{order.parts} × {order.step}",
            f"{tiles.out}x{tiles.rows}, {tiles.warps} warps, {tiles.stages} stages{', split' * tiles.split}",
        )
    else:
        cut = found.chosen.kernel, "its own"
    return (
        found.product.name, f"{rows}", "–" if before is None else f"{before * 1e6:,.1f}", f"{after * 1e6:,.1f}",
        *cut,
    )  # fmt: skip


def _facts(found: Any, rows: list[int]) -> dict[str, Any]:
    order, told = found.chosen.order, {}
    for count in rows:
        (before, after), tiles = found.seconds(count), found.chosen.tiles[count]
        told[count] = {
            "default_us": None if before is None else before * 1e6, "us": after * 1e6,
            "tiles": {name: getattr(tiles, name) for name in ("out", "rows", "warps", "stages", "split", "swizzle")},
        }  # fmt: skip
    named = {"step": order.step, "parts": order.parts}
    return {"product": found.product.name, "kernel": found.chosen.kernel, "order": named, "refused": list(found.refused), "rows": told}
