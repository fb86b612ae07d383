"""The `hasten` command: its subcommands, and what happens when one fails."""

import errno
import io
import os
import sys
from typing import Annotated

import typer

from hasten.base.errors import UserError
from hasten.cli.bench import bench
from hasten.cli.cache import cache
from hasten.cli.chat import chat
from hasten.cli.compare import compare
from hasten.cli.convert import convert
from hasten.cli.cut import cut, share_weights
from hasten.cli.distill import distill
from hasten.cli.doctor import doctor
from hasten.cli.eval import evaluate
from hasten.cli.export import export
from hasten.cli.generate import generate
from hasten.cli.inspect import inspect
from hasten.cli.prune import prune
from hasten.cli.quantize import apply, quantize
from hasten.cli.serve import serve
from hasten.cli.terminal import fail
from hasten.cli.train import train
from hasten.cli.tune import tune
from hasten.cli.warm import warm

app = typer.Typer(
    name="hasten",
    help="Tell it what quality you must keep; it makes your model as fast as your machine allows, and shows you the measurements.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor)
app.command("inspect")(inspect)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("warm")(warm)
app.command("tune")(tune)
app.command("quantize")(quantize)
app.command("prune")(prune)
app.command("apply")(apply)
app.command("cut")(cut)
app.command("share")(share_weights)
app.command("convert")(convert)
app.command("export")(export)
app.command("train")(train)
app.command("distill")(distill)
app.add_typer(cache, name="cache")
app.add_typer(bench)


def _version(wanted: bool) -> None:
    if wanted:
        from hasten import __version__

        typer.echo(f"hasten {__version__}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130, a reader that went away 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what its encoding cannot say is no reason to fail
    try:
        app(standalone_mode=True)
    except UserError as error:
        fail(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # Point stdout elsewhere so that the interpreter's last flush does not complain too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"the output cannot be written: {error.strerror}; make room")
        sys.exit(2)
