"""`hasten eval MODEL --tasks …`: lm-eval's tasks."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from hasten.cli.table import print_table
from hasten.cli.terminal import notify, reporter, visible_line

if TYPE_CHECKING:
    from hasten.measure.tasks import TaskScore
    from hasten.program import Formats


def evaluate_tasks(
    model: str, tasks: Sequence[str], limit: int | None, shots: int | None, together: int, backend: str, formats: "Formats", as_json: bool
) -> None:
    """Play ``tasks``, each one name or file or several with commas between them, and print their metrics."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load
    from hasten.engine.backends import choose_backend
    from hasten.measure.harness import Harness
    from hasten.measure.tasks import require_lm_eval, run_tasks

    require_lm_eval()
    loaded = load(model)
    backend, notice = choose_backend(loaded, backend, formats)
    notify(notice)
    named = [name for each in tasks for part in each.split(",") if (name := part.strip())]
    began, console = time.perf_counter(), Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        harness = Harness(loaded, backend=backend, formats=formats, together=together, report=reporter(progress))
        scores = run_tasks(harness, named, limit=limit, shots=shots)
    seconds = time.perf_counter() - began
    if as_json:
        facts = {
            "model": model, "tasks": [_facts(each) for each in scores], "limit": limit, "seconds": seconds, "backend": backend,
            **dataclasses.asdict(formats),
        }  # fmt: skip
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(visible_line(f"{model} on {', '.join(named)}{'' if limit is None else f', {limit} examples each'} ({seconds:.1f} s)"))
    print_table(("task", "version", "filter", "shots", "metric", "value", "± error", "better", "examples"), [_row(each) for each in scores])


def _facts(score: "TaskScore") -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in dataclasses.asdict(score).items()
    }


def _row(score: "TaskScore") -> tuple[str, ...]:
    better = {True: "higher", False: "lower", None: ""}[score.higher_is_better]
    return (
        score.task, score.version, score.filter, "–" if score.shots is None else f"{score.shots}", score.metric, f"{score.value:.4f}",
        "–" if score.error is None else f"{score.error:.4f}", better, f"{score.samples}",
    )  # fmt: skip
