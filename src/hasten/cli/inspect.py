"""`hasten inspect MODEL`: what a model is made of."""

import json
import time
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.base.errors import ConfigError, one_line
from hasten.cli.chosen import print_chosen
from hasten.cli.options import ActivationsOption, CacheOption, JsonOption, ModelArgument, WeightsOption
from hasten.cli.terminal import visible_line

if TYPE_CHECKING:
    from hasten.model import Model
    from hasten.program import Program


def inspect(
    model: ModelArgument,
    program: Annotated[bool, typer.Option("--program", help="Print the ops the model lowers to.")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="Print the ops as the native backend plays them, joined.")] = False,
    weights: WeightsOption = None,
    activations: ActivationsOption = None,
    spec: Annotated[bool, typer.Option("--spec", help="Print the Spec as JSON.")] = False,
    load_all: Annotated[bool, typer.Option("--load", help="Read (or make) every weight, and say how long that took.")] = False,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Spec, bytes by part, cache cost, provenance."""
    from hasten.checkpoint import load
    from hasten.formats.cache import cache_format
    from hasten.program import Formats, lower

    if (weights, activations) != (None, None) and not fused:
        raise ConfigError("--weights and --activations choose formats of the native backend's program; give --fused to print that")
    loaded = load(model)
    formats = Formats(weights, activations, cache).meant_for(loaded.cache)
    cache = formats.cache or "bf16"
    lowered = lower(loaded.spec, cache=cache_format(cache))
    if fused:
        from hasten.backends.cpu import native_program

        typer.echo(native_program(loaded.spec, formats=formats, weights=loaded.weights).text(), nl=False)
        return
    if program:
        typer.echo(lowered.text(), nl=False)
        return
    if spec:
        typer.echo(loaded.spec.to_json().decode())
        return
    facts = {**describe(loaded, lowered), "cache": cache}
    if load_all:
        from rich.console import Console

        began = time.perf_counter()
        with Console(stderr=True).status(f"loading {loaded.weights.nbytes:,} bytes …"):
            arrays = [array for _, array in loaded.weights.arrays()]
        for array in arrays:
            array.reshape(-1)[:: max(1, 4096 // array.itemsize)].max(initial=0)  # a mapped page is read when it is touched
        facts["load_seconds"] = round(time.perf_counter() - began, 3)
        facts["loaded_tensors"] = len(arrays)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def describe(model: "Model", program: "Program") -> dict[str, Any]:
    """What `--json` prints."""
    import msgspec

    from hasten.checkpoint import layout_of
    from hasten.formats.quantized import stored_as
    from hasten.program import RecurrentGroup, most_seen

    parts: dict[str, dict[str, int]] = {}
    for name, weight in model.weights.items():
        part = parts.setdefault(_part(name), {"parameters": 0, "bytes": 0})
        part["parameters"] += weight.size
        part["bytes"] += weight.nbytes
    seen: dict[Any, int] = {}  # tokens that are kept, None for all → bytes of each
    for group in program.states:
        if not isinstance(group, RecurrentGroup):
            seen[most_seen(group.visible)] = seen.get(most_seen(group.visible), 0) + group.bytes_per_token()
    return {
        "model": model.name,
        "family": model.source.family if model.source else "hasten",
        "layout": layout_of(model),
        "parameters": model.weights.parameters,
        "bytes": model.weights.nbytes,
        "vocabulary": model.spec.vocab,
        "width": model.spec.width,
        "context": model.spec.context,
        "blocks": [
            {
                "count": len(list(same)),
                "mixer": _kind(block.mixer),
                "feed_forward": _kind(block.feed_forward),
                "wiring": _kind(block.wiring),
            }
            for block, same in groupby(model.spec.blocks)
        ],
        "parts": parts,
        "cache_bytes_per_token": seen.pop(None, 0),
        "cache_windows": [{"tokens": tokens, "bytes_per_token": each} for tokens, each in sorted(seen.items())],
        "state_bytes_per_sequence": sum(group.bytes_per_sequence() for group in program.states),
        "tokenizer": model.tokenizer is not None,
        "formats": sorted({stored_as(weight) for weight in model.weights.values()}),
        "dequantized": _dequantized(model),
        "provenance": msgspec.to_builtins(model.provenance),
    }


def _dequantized(model: "Model") -> dict[str, str]:
    """By weight: why what is stored quantized is not played as it is stored."""
    from hasten.formats.quantized import DequantizedWeight, QuantizedWeight

    found = {}
    for name, weight in model.weights.items():
        if isinstance(weight, DequantizedWeight):
            found[name] = f"stored in {weight.stored}, played in bf16: {weight.reason}"
        elif isinstance(weight, QuantizedWeight) and not weight.form.has_name:
            found[name] = f"stored in {weight.form}, played in bf16: no kernel has that format"
    return found


def _part(name: str) -> str:
    """Where a weight counts in the table: the parts of all blocks together, the ends by themselves."""
    pieces = name.split(".")
    if pieces[0] != "blocks":
        return pieces[0]
    part = pieces[2].removesuffix("_norm").removesuffix("_post")
    return part if part == pieces[2] else f"{part} norms"


def _kind(part: object) -> str:
    """A part in a few words: its kind and its whole-number sizes."""
    if part is None:
        return "none"
    fields = {name: getattr(part, name) for name in getattr(part, "__struct_fields__", ())}
    sizes = ", ".join(f"{name} {value}" for name, value in fields.items() if isinstance(value, int) and not isinstance(value, bool))
    flags = ", ".join(name for name, value in fields.items() if value is True)
    kinds = ", ".join(
        f"{type(value).__name__}" for name, value in fields.items() if name in {"position", "visible", "rotary"} and value is not None
    )
    return f"{type(part).__name__}({', '.join(text for text in (sizes, kinds, flags) if text)})"


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    size = f"{facts['parameters']:,} parameters, {facts['bytes']:,} bytes ({', '.join(facts['formats'])})"
    console.print(f"[bold]{escape(visible_line(facts['model']))}[/]  {escape(visible_line(facts['family']))}, {size}")
    tokenizer = "a tokenizer" if facts["tokenizer"] else "no tokenizer"
    console.print(f"vocabulary {facts['vocabulary']:,}, width {facts['width']:,}, context {facts['context']:,}, {tokenizer}")
    for block in facts["blocks"]:
        console.print(f"{block['count']} × {block['mixer']} + {block['feed_forward']}, {block['wiring'].split('(')[0]}", markup=False)
    cache, state = facts["cache_bytes_per_token"], facts["state_bytes_per_sequence"]
    windows = "".join(f", {each['bytes_per_token']:,} of each of the last {each['tokens']:,}" for each in facts["cache_windows"])
    console.print(f"cache {cache:,} bytes a token{windows} ({facts['cache']})" + (f", state {state:,} bytes a sequence" if state else ""))
    table = Table("part", "parameters", "bytes", "share", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, part in facts["parts"].items():
        table.add_row(name, f"{part['parameters']:,}", f"{part['bytes']:,}", f"{part['bytes'] / facts['bytes']:.1%}")
    console.print(table)
    for why, names in groupby(sorted(facts["dequantized"], key=facts["dequantized"].get), facts["dequantized"].get):
        first, *others = names
        console.print(f"{first}{f' and {len(others)} more' if others else ''} {why}", markup=False)
    for step in facts["provenance"]:
        shown = {name: value for name, value in step["evidence"].items() if name != "chosen"}
        evidence = f" {one_line(shown, 1000)}" if shown else ""
        console.print(f"made by {visible_line(step['transform'][:80])} {one_line(step['settings'], 1000)}{evidence}", markup=False)
        if "chosen" in step["evidence"]:
            print_chosen(step["evidence"])
    if "load_seconds" in facts:
        console.print(f"all {facts['loaded_tensors']} weights in memory in {facts['load_seconds']} s")
