"""Losses over steps, for people: a few lines in a terminal, or a picture."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from hasten.base.errors import MissingExtraError, UserError

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def read_curve(path: Path) -> list[float]:
    """The losses of a training's log. Raises UserError for a file that is none."""
    try:
        return [float(json.loads(line)["loss"]) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no log of losses: {error}") from None


def draw_curve(losses: Sequence[float], width: int = 60, height: int = 8) -> str:
    """Means of equal runs of steps as columns, between the least and the largest of them, which the first and last line name."""
    if not losses:
        return ""
    width = min(width, len(losses))
    edges = [index * len(losses) // width for index in range(width + 1)]
    means = [statistics.fmean(losses[begin:end]) for begin, end in zip(edges, edges[1:])]
    low, high = min(means), max(means)
    span = high - low or 1.0
    filled = [round(8 * height * (mean - low) / span) for mean in means]
    rows = ["".join(_EIGHTHS[min(8, max(0, each - 8 * row))] for each in filled) for row in reversed(range(height))]
    names = [f"{high:8.4f}", *[" " * 8] * (height - 2), f"{low:8.4f}"] if height > 1 else [f"{high:8.4f}"]
    return "\n".join(f"{name} │{row}" for name, row in zip(names, rows)) + f"\n{'':8} └{'─' * width} {len(losses):,} steps"


def picture_curve(losses: Sequence[float], path: Path) -> None:
    """A PNG, or what else matplotlib writes by that name: each loss, and their running mean. Raises MissingExtraError without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(f"a picture in {path}", "report") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token")
    axes.plot(losses, linewidth=0.5, alpha=0.4)
    window = max(1, math.isqrt(len(losses)))
    axes.plot(range(window - 1, len(losses)), [statistics.fmean(losses[end - window : end]) for end in range(window, len(losses) + 1)])
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}; name a .png in a folder that is there") from None
