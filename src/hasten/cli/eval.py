"""`hasten eval MODEL`: loss, perplexity and top-1 accuracy over text."""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.base.errors import ConfigError
from hasten.cli import options
from hasten.cli.tasks import evaluate_tasks
from hasten.cli.terminal import notify, visible_line


def evaluate(
    model: options.ModelArgument,
    text: Annotated[
        Path | None, typer.Argument(metavar="[TEXT]", help="A text file or a folder; the held-out standard library unless given.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", help="Tokens predicted per window; no context is carried over. [default: 512, or the model's context if less]"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Stop after this many tokens; with --tasks, examples of each task.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="lm-eval tasks instead of text: names or YAML files, separated by commas; repeatable."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Examples in each prompt of --tasks. [default: as the task says]")
    ] = None,
    together: Annotated[int, typer.Option("--together", min=1, help="Sequences of --tasks that are played at once.")] = 16,
    backend: options.BackendOption = "auto",
    weights: options.WeightsOption = None,
    activations: options.ActivationsOption = None,
    cache: options.CacheOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Token loss (nats), perplexity and top-1 accuracy; or the metrics of lm-eval's tasks."""
    from hasten.program import Formats

    if tasks:
        if text is not None or window is not None:
            raise ConfigError("--tasks bring their own text, so give no TEXT and no --window with them")
        evaluate_tasks(model, tasks, limit, shots, together, backend, Formats(weights, activations, cache), as_json)
        return
    if shots is not None:
        raise ConfigError("--shots says how many examples stand in the prompts of --tasks; give those, or leave it out")
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load
    from hasten.engine.backends import choose_backend
    from hasten.measure import Evaluation, cut_windows, held_out, read_corpus, score_windows

    loaded = load(model)
    formats = Formats(weights, activations, cache).meant_for(loaded.cache)
    backend, notice = choose_backend(loaded, backend, formats)
    notify(notice)
    window = min(512, loaded.spec.context) if window is None else window
    corpus = held_out() if text is None else read_corpus(text)
    windows = cut_windows(loaded, corpus, window, limit)
    began, scores = time.perf_counter(), []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"scoring {windows.tokens:,} tokens", total=windows.tokens)
        for score in score_windows(loaded, windows, window=window, backend=backend, formats=formats):
            scores.append(score)
            progress.advance(task, score.tokens)
    seconds = time.perf_counter() - began
    result = Evaluation.of(scores)
    facts: dict[str, Any] = {
        "model": model, "text": corpus.name, "sha256": corpus.sha256, "documents": len(corpus.documents),
        "skipped": corpus.skipped, "window": window, "loss": result.loss,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,  # JSON has no infinity
        "top1": result.top1, "tokens": result.tokens, "seconds": seconds,
        "backend": backend, "weights": weights, "activations": activations, "cache": formats.cache,
    }  # fmt: skip
    if text is None and limit is None:
        facts |= compare_with_card(model, corpus.sha256, result.loss)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    skipped = f", {corpus.skipped} files skipped that are not UTF-8" if corpus.skipped else ""
    counted = f"{len(corpus.documents)} documents, {result.tokens:,} tokens, windows of {window}{skipped}"
    typer.echo(visible_line(f"{model} on {corpus.name} ({counted})"))
    typer.echo(f"loss {result.loss:.4f} nats   perplexity {result.perplexity:.3f}   top-1 {result.top1:.4f}   ({seconds:.1f} s)")
    if "card_loss" in facts:
        typer.echo(f"the card says {facts['card_loss']:.4f} on the same text; difference {facts['card_difference']:+.4f}")
    elif facts.get("card_text") == "differs":
        typer.echo("the card's figure is for another Python version's standard library, so it does not compare")


def compare_with_card(model: str, sha256: str, loss: float) -> dict[str, Any]:
    """What a bundled model's card says of the same text; that the text differs; or nothing, for models without a card."""
    from hasten.checkpoint import BUNDLED, bundled_directory

    if model not in BUNDLED:
        return {}
    card = json.loads((bundled_directory(model) / "card.json").read_text("utf-8"))
    if card["held_out_sha256"] != sha256:
        return {"card_text": "differs"}
    return {"card_text": "same", "card_loss": card["held_out_loss"], "card_difference": loss - card["held_out_loss"]}
