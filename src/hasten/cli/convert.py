"""`hasten convert MODEL OUT`: attention that keeps less of each token, measured before it is kept."""

from typing import Annotated, Any

import typer

from hasten.base.errors import ConfigError
from hasten.cli import options
from hasten.cli.quantize import MAKING, HealOption, Making, OutArgument, healing, run_recipe


@options.spread
def convert(
    model: options.ModelArgument,
    out: OutArgument,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", help="Key/value heads a layer, which divide those there are; 1 is multi-query attention.")
    ] = None,
    latent: Annotated[
        int | None, typer.Option("--latent", help="Multi-head latent attention: features of the row that stands for keys and values.")
    ] = None,
    rope_dim: Annotated[
        int | None, typer.Option("--rope-dim", help="With --latent: rotated features beside the row. [default: half a head's]")
    ] = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens that a query sees, its own among them.")] = None,
    linear: Annotated[
        bool, typer.Option("--linear", help="Linear attention, a state of fixed size, in the later half of the layers, or --layers.")
    ] = False,
    share_kv: Annotated[
        bool, typer.Option("--share-kv", help="Every second layer, or --layers, reads keys and values of one before it.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="Only these, counted from 0, as 0,2. [default: all; --linear: the later half; --share-kv: every second]",
        ),
    ] = None,
    heal: HealOption = None,
    making: Making = MAKING,
    as_json: options.JsonOption = False,
) -> None:
    """Have a model's attention keep less of each token: the short form of a recipe. Give one of --kv-heads, --latent,
    --window, --linear and --share-kv."""
    run_recipe(model, [*short_form(kv_heads, latent, rope_dim, window, linear, share_kv, layers), *healing(heal)], out, making, as_json)


def short_form(
    kv_heads: int | None,
    latent: int | None,
    rope_dim: int | None,
    window: int | None,
    linear: bool,
    share_kv: bool,
    layers: str | None,
) -> list[dict[str, Any]]:
    """The recipe that `hasten convert` is short for, as plain data. Raises ConfigError unless exactly one conversion is asked for."""
    asked = {
        "kv_heads": {"count": kv_heads},
        "latent": {"rank": latent, **({} if rope_dim is None else {"rope_dim": rope_dim})},
        "window": {"size": window},
    }
    given: dict[str, dict[str, Any]] = {name: settings for name, settings in asked.items() if next(iter(settings.values())) is not None}
    given |= {name: {} for name, wanted in (("linear_attention", linear), ("share_kv", share_kv)) if wanted}
    if len(given) != 1:
        raise ConfigError(f"{len(given)} conversions are asked for; give one of --kv-heads, --latent, --window, --linear and --share-kv")
    if rope_dim is not None and latent is None:
        raise ConfigError(f"--rope-dim is {rope_dim}, which goes with --latent only")
    ((name, settings),) = given.items()
    return [{name: {**settings, **({} if layers is None else {"layers": _layers(layers)})}}]


def _layers(text: str) -> list[int]:
    found = [int(each) if each.strip().isascii() and each.strip().isdigit() else -1 for each in text.split(",")]
    if min(found) < 0 or max(found) > 1 << 16:
        options.refuse("--layers", text, "whole numbers of 0 or more, separated by commas")
    return found
