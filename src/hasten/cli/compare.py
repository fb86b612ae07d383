"""`hasten compare BASE MODEL…`: bytes, loss, divergence, agreement and tokens a second, side by side."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.table import print_table
from hasten.cli.terminal import notify, visible_line

if TYPE_CHECKING:
    from hasten.measure.compare import Comparison
    from hasten.measure.size import Size
    from hasten.measure.speed import Speed, Speeds
    from hasten.model import Model

FEWER = "compare fewer models at once"


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """One model of the table; ``played`` is (weights, activations, cache)."""

    name: str
    size: "Size"
    played: tuple[str, str, str]
    quality: "Comparison | None"
    speed: "Speeds | None"

    def findings(self, base: "_Row") -> list[str]:
        """A line for each way in which it is no better than ``base``."""
        lines = []
        if self.size.bytes > base.size.bytes:
            lines.append(f"does not pay: {self.name} is bigger, {self.size.bytes:,} bytes where {base.name} takes {base.size.bytes:,}")
        if (found := self.quality) is not None and found.worse:
            over = found.over_documents
            spread = "one document, so no spread" if over is None else f"± {over.increase.error:.2%}, beyond its spread over documents"
            lines.append(f"worse: the loss of {self.name} is {found.increase:+.2%} over that of {base.name} ({spread})")
        if self.speed is not None:
            lines += [f"does not pay: {self.name} is {line} the speed of {base.name}" for line in self.speed.lines("slower")]
        return lines

    def facts(self, base: "_Row") -> dict[str, Any]:
        """What --json prints."""
        quality = None if self.quality is None else {**dataclasses.asdict(self.quality), "increase": self.quality.increase}
        return {
            "model": self.name, **dataclasses.asdict(self.size), "bits_per_linear_weight": self.size.bits_per_linear_weight,
            "bytes_of_base": self.size.bytes / base.size.bytes,
            "linear_bytes_of_base": self.size.linear_bytes / base.size.linear_bytes if base.size.linear_bytes else None,
            "weights": self.played[0], "activations": self.played[1], "cache": self.played[2], "quality": quality,
            "speed": None if self.speed is None else dataclasses.asdict(self.speed), "findings": self.findings(base),
        }  # fmt: skip


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the others are compared with; as MODEL of the other commands.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more to compare with it.")],
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to score: a file or a folder. [default: the held-out standard library]")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most tokens to score.")] = 32768,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Tokens predicted per window. [default: 512, or the shortest context if less]")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time them, or leave that out.")] = True,
    batch: Annotated[str, typer.Option("--batch", help="Sequences at once, one or several, separated by commas.")] = "1,8",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option("--new", min=1, help="Tokens to decode after each prompt.")] = 16,
    rounds: Annotated[int, typer.Option("--rounds", min=5, help="Times each model is timed, in turn with the others.")] = 5,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads to time on; all cores granted unless given.")] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Models side by side with the one they came from. Those without a tokenizer are compared by bytes and speed alone."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load
    from hasten.engine.backends import choose_backend
    from hasten.measure.compare import compare as compare_quality
    from hasten.measure.compare import shared_windows
    from hasten.measure.latency import check_context
    from hasten.measure.size import Size
    from hasten.measure.speed import SpeedTest, measure_speeds, played_as, require_room
    from hasten.measure.text import held_out, read_corpus

    test = SpeedTest(tuple(options.counts("batch", batch)), prompt, new, rounds)
    names = [base, *models]
    loaded = [load(name) for name in names]
    for each in loaded:
        notify(choose_backend(each)[1])
        if speed:
            check_context(each, test.cases()[0].context)
    scored = _with_text(loaded)
    facts: dict[str, Any] = {"base": base}
    quality: dict[int, Comparison] = {}
    speeds: list[Speeds | None] = [None] * len(loaded)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        if scored:
            others = [loaded[place] for place in scored]
            window = min(512, *(each.spec.context for each in (loaded[0], *others))) if window is None else window
            corpus = held_out() if text is None else read_corpus(text)
            windows = shared_windows(loaded[0], others, corpus, window, limit)
            require_room([loaded[0], *others], FEWER)
            task = progress.add_task(f"scoring {windows.tokens:,} tokens", total=windows.tokens)
            found = compare_quality(loaded[0], others, windows, window, lambda done, _: progress.update(task, completed=done))
            quality = dict(zip(scored, found))
            facts |= {
                "text": corpus.name, "sha256": corpus.sha256, "documents": len({*windows.documents}), "tokens": windows.tokens,
                "window": window,
            }  # fmt: skip
        if speed:
            for each in loaded:
                require_room([each], "leave speed out with --no-speed")
            clock = progress.add_task("timing in turn", total=None)
            speeds[:] = measure_speeds(
                loaded[0], loaded[1:], test, threads, lambda done, of: progress.update(clock, completed=done, total=of)
            )
            facts["speed_test"] = dataclasses.asdict(test)
    rows = [
        _Row(name, Size.of(each), played_as(each), quality.get(place), speeds[place])
        for place, (name, each) in enumerate(zip(names, loaded))
    ]
    findings = [line for row in rows[1:] for line in row.findings(rows[0])]
    unscored = _unscored(names, loaded, scored)
    if as_json:
        facts |= {"models": [row.facts(rows[0]) for row in rows], "not_scored": unscored, "findings": findings}
        typer.echo(json.dumps(facts, indent=2))
        return
    _print(rows, facts)
    for line in (*unscored, *findings):
        typer.echo(visible_line(line))


def _with_text(models: Sequence["Model"]) -> list[int]:
    """Places of the models that can be scored against the first, which needs a tokenizer as they do."""
    if models[0].tokenizer is None:
        return []
    return [place for place, each in enumerate(models) if place and each.tokenizer is not None]


def _unscored(names: Sequence[str], models: Sequence["Model"], scored: Sequence[int]) -> list[str]:
    if models[0].tokenizer is None:
        return [f"{names[0]} has no tokenizer, so there is no text to score: compared by bytes and speed alone"]
    left = [names[place] for place in range(1, len(models)) if place not in scored]
    return [f"{name} has no tokenizer, so there is no text to score it on: compared by bytes and speed alone" for name in left]


def _print(rows: Sequence[_Row], facts: dict[str, Any]) -> None:
    """Two tables, of what they are and of how fast."""
    if "tokens" in facts:
        typer.echo(visible_line(
            f"{facts['text']}: {facts['documents']} documents, {facts['tokens']:,} tokens, windows of {facts['window']}; "
            "± is the standard error over documents"
        ))  # fmt: skip
    print_table(
        (
            "model",
            "weights",
            "activations",
            "bytes",
            "of base",
            "linear bytes",
            "bits a weight",
            "loss",
            "increase",
            "KL",
            "top-1 agreement",
        ),
        [_size_and_quality(row, rows) for row in rows],
    )
    if (first := rows[0].speed) is None:
        return
    test = facts["speed_test"]
    typer.echo()
    typer.echo(
        f"tokens a second after prompts of {test['prompt']}, {test['new']} decoded: medians of {test['rounds']} rounds in turn, and ratios "
        f"to the base (with the interval that holds the median at 90 %); {first.isa}, {first.threads} threads"
    )
    print_table(
        ("model", "weights", "activations", "batch", "prefill", "of base", "decode", "of base"),
        [
            (row.name, row.speed.weights, row.speed.activations, *_speed(each))
            for row in rows if row.speed is not None for each in row.speed.rows
        ],
    )  # fmt: skip


def _size_and_quality(row: _Row, rows: Sequence[_Row]) -> tuple[str, ...]:
    base, found = rows[0], row.quality
    cells = (
        row.name, *row.played[:2], f"{row.size.bytes:,}", f"{row.size.bytes / base.size.bytes:.3f}", f"{row.size.linear_bytes:,}",
        "–" if (bits := row.size.bits_per_linear_weight) is None else f"{bits:.2f}",
    )  # fmt: skip
    if row is base:
        own = next((each.quality for each in rows if each.quality is not None), None)
        return (*cells, "–" if own is None else _with_errors(own)[0], "–", "–", "–")
    return (*cells, *(("–",) * 4 if found is None else _with_errors(found)[1:]))


def _with_errors(found: "Comparison") -> tuple[str, ...]:
    """The base's loss, the model's, its increase, divergence and agreement; each with its standard error where there is one."""
    cells = (
        f"{found.base_loss:.4f}", f"{found.loss:.4f}", f"{found.increase:+.2%}", f"{found.kl:.4f}", f"{found.agreement:.4f}",
    )  # fmt: skip
    if (over := found.over_documents) is None:
        return cells
    errors = (
        f"{over.base_loss.error:.4f}", f"{over.loss.error:.4f}", f"{over.increase.error:.2%}", f"{over.kl.error:.4f}",
        f"{over.agreement.error:.4f}",
    )  # fmt: skip
    return tuple(f"{cell} ± {error}" for cell, error in zip(cells, errors))


def _speed(row: "Speed") -> tuple[str, ...]:
    return (
        f"{row.batch}", f"{row.prefill_tokens_per_s:,.1f}", "–" if row.prefill is None else str(row.prefill),
        f"{row.decode_tokens_per_s:,.1f}", "–" if row.decode is None else str(row.decode),
    )  # fmt: skip
