"""What a run of requests against a server came to. Pure: outcomes in, figures out, under the names and definitions of `vllm bench serve`.

TTFT is from sending to the first chunk that holds output; E2EL to the chunk that ends it; TPOT = (E2EL − TTFT) / (n − 1) for an output of
n > 1 tokens; ITL are the gaps between chunks of output, so where a chunk holds several tokens, ITL is not TPOT. Goodput is requests a
second that met every SLO."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hasten.base.errors import ConfigError, one_line

METRICS: Mapping[str, tuple[str, str]] = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
"""Short and long titles."""

SLO_METRICS = ("ttft", "tpot", "e2el")
"""What a request has one of."""


@dataclass(slots=True)
class Outcome:
    """One request, filled in as its answer comes. Times are seconds of one clock; gaps and lengths in the order of chunks."""

    sent: float
    late: float = 0.0
    """When it was sent, and how far this process was behind when it was due."""
    first: float | None = None
    last: float | None = None
    """When output first came, and when the news of its end."""
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int | None = None
    """As the server counts; None where it does not."""
    chunks: int = 0
    cached: bool = False
    """Answered from a response cache."""
    error: str | None = None
    text: str = ""

    @property
    def tokens(self) -> int:
        """Output tokens as the server counts them, else chunks."""
        return self.chunks if self.output_tokens is None else self.output_tokens

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.error is None and self.first is not None

    def seconds(self, metric: str) -> float | None:
        """``ttft``, ``tpot`` or ``e2el``; None where it has none, as TPOT of one token."""
        if self.first is None or self.last is None:
            return None
        if metric == "ttft":
            return self.first - self.sent
        if metric == "e2el":
            return self.last - self.sent
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


def parse_goodput(given: Sequence[str]) -> dict[str, float]:
    """Milliseconds by metric from ``ttft:200``, ``tpot:50`` …, one or several to a text. Raises ConfigError for what is none."""
    slos = {}
    for one in " ".join(given).replace(",", " ").split():
        name, _, number = one.partition(":")
        try:
            most = float(number)
        except ValueError:
            most = 0.0
        if name not in SLO_METRICS or not most > 0:
            raise ConfigError(f"goodput is {one_line(one)}; accepted: {', '.join(f'{metric}:MS' for metric in SLO_METRICS)}, MS above 0")
        slos[name] = most
    return slos


def parse_metrics(given: str) -> list[str]:
    """Metrics from ``ttft,tpot``. Raises ConfigError for one nobody has."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names or (wrong := [name for name in names if name not in METRICS]):
        raise ConfigError(f"percentile-metrics is {one_line(given if not names else wrong[0])}; accepted: {', '.join(METRICS)}")
    return names


def parse_percentiles(given: str) -> list[float]:
    """Percentiles from ``50,99.9``. Raises ConfigError for what is not between 0 and 100."""
    try:
        found = [float(one) for one in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= one <= 100 for one in found):
        raise ConfigError(f"metric-percentiles is {one_line(given)}; accepted: numbers from 0 to 100, separated by commas")
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values, as NumPy has it; 0 of none."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


def meets(outcome: Outcome, slos: Mapping[str, float]) -> bool:
    """Whether it was answered within every SLO, in milliseconds. What it has none of, it meets."""
    return outcome.ok and all((seconds := outcome.seconds(name)) is None or 1e3 * seconds <= most for name, most in slos.items())


def report(
    outcomes: Sequence[Outcome], duration: float, *, metrics: Sequence[str], percentiles: Sequence[float], slos: Mapping[str, float]
) -> dict[str, Any]:  # fmt: skip
    """The figures by vLLM's names, and beside them ``errors`` by what they said, ``cached`` answers, and how late requests were sent."""
    done = [one for one in outcomes if one.ok]
    failed = [one.error or "the answer holds no output" for one in outcomes if not one.ok]
    output = sum(one.tokens for one in done)
    total = output + sum(one.prompt_tokens for one in done)
    found: dict[str, Any] = {
        "completed": len(done), "failed": len(failed), "errors": {said: failed.count(said) for said in dict.fromkeys(failed)},
        "cached": sum(one.cached for one in done), "counted_by_chunks": sum(one.output_tokens is None for one in done),
        "duration": duration, "total_input_tokens": total - output, "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(meets(one, slos) for one in done) / duration if slos else None,
        "output_throughput": output / duration, "total_token_throughput": total / duration,
        "mean_late_ms": 1e3 * statistics.fmean(one.late for one in outcomes) if outcomes else 0.0,
        "max_late_ms": 1e3 * max((one.late for one in outcomes), default=0.0),
    }  # fmt: skip
    for name in metrics:
        if name == "itl":
            values = [1e3 * gap for one in done for gap in one.gaps]
        else:
            values = [1e3 * seconds for one in done if (seconds := one.seconds(name)) is not None]
        found[f"mean_{name}_ms"] = statistics.fmean(values) if values else 0.0
        found[f"median_{name}_ms"] = percentile(values, 50)
        found[f"std_{name}_ms"] = statistics.pstdev(values) if values else 0.0
        for percent in percentiles:
            found[f"p{percent:g}_{name}_ms"] = percentile(values, percent)
    return found


def table(found: Mapping[str, Any], *, metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """A report for people, in the order and under the labels that `vllm bench serve` prints."""
    width, lines = 50, [f"{' Serving Benchmark Result ':=^50}"]

    def row(label: str, value: float | str, digits: int = 2) -> None:
        shown = value if isinstance(value, str) else f"{value:.{digits}f}"
        lines.append(f"{label:<40} {shown:<10}".rstrip())

    row("Successful requests:", found["completed"], 0)
    row("Failed requests:", found["failed"], 0)
    if found.get("max_concurrency"):
        row("Maximum request concurrency:", found["max_concurrency"], 0)
    if isinstance(found.get("request_rate"), float):
        row("Request rate configured (RPS):", found["request_rate"])
    row("Benchmark duration (s):", found["duration"])
    row("Total input tokens:", found["total_input_tokens"], 0)
    row("Total generated tokens:", found["total_output_tokens"], 0)
    row("Request throughput (req/s):", found["request_throughput"])
    if found["request_goodput"] is not None:
        row("Request goodput (req/s):", found["request_goodput"])
    row("Output token throughput (tok/s):", found["output_throughput"])
    row("Total token throughput (tok/s):", found["total_token_throughput"])
    if found["cached"]:
        row("Answers from a response cache:", found["cached"], 0)
    if found["counted_by_chunks"]:
        row("Outputs counted by chunks:", found["counted_by_chunks"], 0)
    for name in metrics:
        short, long = METRICS[name]
        lines.append(f"{long:-^{width}}")
        row(f"Mean {short} (ms):", found[f"mean_{name}_ms"])
        row(f"Median {short} (ms):", found[f"median_{name}_ms"])
        for percent in percentiles:
            row(f"P{percent:g} {short} (ms):", found[f"p{percent:g}_{name}_ms"])
    lines.append("=" * width)
    lines += [f"{count} × {one_line(said, 200)[1:-1]}" for said, count in found["errors"].items()]
    return "\n".join(lines)
