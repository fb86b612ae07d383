"""Showing which format each layer of a model was given, where that was chosen layer by layer."""

from collections.abc import Mapping
from typing import Any

from hasten.cli.terminal import visible_line


def print_chosen(evidence: Mapping[str, Any]) -> None:
    """A row a block, a column for each of its weights. ``evidence`` is what a file says, so anything may be in it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    rows: dict[str, dict[str, str]] = {}
    chosen = evidence["chosen"]
    for name, each in chosen.items() if isinstance(chosen, Mapping) else ():
        pieces = str(name)[:200].removesuffix(".weight").split(".")
        form = str(each.get("weights"))[:20] if isinstance(each, Mapping) else "?"
        rows.setdefault(".".join(pieces[:2]), {})[".".join(pieces[2:])] = escape(visible_line(form))
    columns = dict.fromkeys(part for row in rows.values() for part in row)
    bits, kl = evidence.get("bits"), evidence.get("expected_kl")
    if isinstance(bits, float) and isinstance(kl, float):
        console.print(f"{bits:.3f} bits a weight, chosen by layer, expected KL {kl:.4f} nats", markup=False)
    ends = [column.rpartition(".")[2] for column in columns]
    heads = [end if ends.count(end) == 1 else column for column, end in zip(columns, ends)]
    table = Table("", *(escape(visible_line(head)) for head in heads), box=None)
    for block, row in rows.items():
        table.add_row(escape(visible_line(block)), *(row.get(column, "") for column in columns))
    console.print(table)
