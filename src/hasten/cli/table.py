"""Tables in plain text, whatever the terminal's width."""

import re
from collections.abc import Sequence

import typer

from hasten.cli.terminal import visible_line

_NUMBER = re.compile(r"[+-]?\d|–|$")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Words to the left, numbers to the right; '–' stands for a number that is not there."""
    lines = [[visible_line(cell) for cell in line] for line in (header, *rows)]
    for line in lines:
        cells = []
        for column, cell in enumerate(line):
            width = max(len(each[column]) for each in lines)
            numbers = all(_NUMBER.match(each[column]) for each in lines[1:])
            cells.append(cell.rjust(width) if numbers else cell.ljust(width))
        typer.echo("  ".join(cells).rstrip())
