"""`hasten cache list|clear`: the packed weights kept on disk between starts."""

import datetime
import json
from typing import TYPE_CHECKING, Any

import typer

from hasten.cli.options import JsonOption
from hasten.cli.terminal import visible_line

if TYPE_CHECKING:
    from hasten.backends.cpu.packed import PackedCache

cache = typer.Typer(help="Packed weights, kept on disk so that the next start reads what the first one made.", no_args_is_help=True)


@cache.command("list")
def list_files(as_json: JsonOption = False) -> None:
    """What is kept, the last used first. HASTEN_CACHE says where, HASTEN_CACHE_SIZE how much (0: nothing)."""
    found = _cache()
    facts = {"directory": None, "limit": 0, "bytes": 0, "files": []} if found is None else describe(found)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


@cache.command("clear")
def clear(as_json: JsonOption = False) -> None:
    """Remove everything that is kept. Processes that run go on; the next start packs anew."""
    found = _cache()
    files, size = (0, 0) if found is None else found.clear()
    if as_json:
        typer.echo(json.dumps({"directory": None if found is None else str(found.directory), "files": files, "bytes": size}))
    else:
        typer.echo(f"{files} files removed, {size:,} bytes")


def describe(found: "PackedCache") -> dict[str, Any]:
    """What `list --json` prints."""
    from hasten.backends.cpu.packed import TABLE

    kept = found.kept()
    return {
        "directory": str(found.directory),
        "limit": found.limit,
        "bytes": sum(one.size for one in kept),
        "files": [
            {
                "file": one.path.name,
                "model": None if one.header is None else one.header.model,
                "weights": [] if one.header is None else sorted({wanted.format for wanted in one.header.key.weights} - {TABLE}),
                "isa": None if one.header is None else one.header.key.isa,
                "bytes": one.size,
                "used": datetime.datetime.fromtimestamp(one.used, datetime.UTC).isoformat(timespec="seconds"),
            }
            for one in kept
        ],
    }


def _cache() -> "PackedCache | None":
    from hasten.backends.cpu.packed import PackedCache

    return PackedCache.of_user()


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if facts["directory"] is None:
        typer.echo("nothing is kept: there is no home to keep it in; set HASTEN_CACHE to a directory")
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{facts['directory']}: {facts['bytes']:,} of at most {facts['limit']:,} bytes", markup=False)
    if not facts["files"]:
        return
    table = Table("model", "weights", "kernels", "bytes", "last used (UTC)", box=None)
    table.columns[3].justify = "right"
    for one in facts["files"]:
        used = one["used"][:16].replace("T", " ")
        if one["model"] is None:
            table.add_row("(of another version)", "", "", f"{one['bytes']:,}", used)
        else:
            table.add_row(escape(visible_line(one["model"])), " ".join(one["weights"]), one["isa"], f"{one['bytes']:,}", used)
    console.print(table)
