"""`hasten export MODEL OUT`: a model for other tools."""

import json

import typer

from hasten.cli import options
from hasten.cli.quantize import OutArgument, OverwriteOption


def export(model: options.ModelArgument, out: OutArgument, overwrite: OverwriteOption = False, as_json: options.JsonOption = False) -> None:
    """Write a model as transformers loads it, giving the same logits: what only hasten stores is written by what it means.

    Weights without their zeros become plain bfloat16, formats that compressed-tensors cannot say float32; layers that share matrices get
    copies, products of two factors one matrix. Activations are not rounded for such weights any more. What is loaded elsewhere stays as
    it is."""
    from hasten.checkpoint import exported, load, save

    original = load(model)
    made = exported(original)
    save(made, out, overwrite=overwrite)
    changed = made.provenance[-1].evidence
    before, after = changed["bytes"]
    if as_json:
        family = made.source.family if made.source else None
        typer.echo(json.dumps({"out": str(out), "family": family, "weights": changed["weights"], "stored": changed["stored"],
                               "bytes_before": before, "bytes": after}))  # fmt: skip
        return
    stored = f", stored in {', '.join(changed['stored'])} before" if changed["stored"] else ""
    said = f"{changed['weights']} weights by what they mean{stored}" if changed["weights"] else "every weight as it was stored"
    typer.echo(f"{out}: {said}; {before / 1e6:,.1f} MB became {after / 1e6:,.1f} MB, which transformers loads")
