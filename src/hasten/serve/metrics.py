"""Metrics: what `/metrics` says, in Prometheus' text format, under the names that dashboards of inference servers know.

Every name is explained in ``docs/metrics.md``."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from hasten.base.errors import ConfigError, one_line
from hasten.serve.counts import Counts
from hasten.serve.histogram import Histogram
from hasten.serve.log import Log
from hasten.serve.supervisor import Supervisor

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "hasten_"
_PREFIX = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,63}")
_PAGE = os.sysconf("SC_PAGESIZE")

Family = TypeVar("Family", CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily)


def check_prefix(prefix: str) -> None:
    """Raise ConfigError for what no metric's name may begin with."""
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(f"--metrics-prefix {one_line(prefix)}: it begins with a letter, then come letters, digits, _ and :, 64 at most")


class Metrics(Collector):
    """All that is known of one server, gathered when somebody asks. ``model`` is what clients call it, and a label of everything that is
    the model's; ``prefix`` begins every name. ``caches`` are the response caches' counts by kind, with ``hits`` and ``misses``."""

    def __init__(
        self, counts: Counts, supervisor: Supervisor, log: Log, *, model: str, prefix: str = PREFIX,
        caches: Mapping[str, Callable[[], Mapping[str, int]]] | None = None,
    ) -> None:  # fmt: skip
        self._counts, self._supervisor, self._log, self._model, self._prefix = counts, supervisor, log, model, prefix
        self._caches = caches or {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """Of this moment."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """One family after another, as prometheus_client asks for them."""
        yield from self._requests()
        yield from self._engine()
        yield from self._steps()
        yield from self._server()

    def _requests(self) -> Iterator[Metric]:
        counts = self._counts
        yield self._counter("prompt_tokens", "Tokens of prompts that were answered.", counts.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens that were generated for clients.", counts.output_tokens)
        ended = self._family(CounterMetricFamily, "request_success", "Outputs that have ended, by why.", "finished_reason")
        for reason, outputs in counts.ended.items():
            ended.add_metric([self._model, reason], outputs)
        yield ended
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From the request to the first token of an output.", counts.first_token),
            ("inter_token_latency_seconds", "Between news of an output and the next.", counts.inter_token),
            ("request_time_per_output_token_seconds", "Of an output, after its first token: a token's mean time.", counts.per_token),
            ("e2e_request_latency_seconds", "From the request to the end of an output.", counts.whole),
            ("request_queue_time_seconds", "An output's wait for a slot in the batch.", counts.queue),
            ("request_prefill_time_seconds", "From the slot to the first token.", counts.prefill),
            ("request_decode_time_seconds", "From the first token to the last.", counts.decode),
            ("request_prompt_tokens", "Tokens of an output's prompt.", counts.prompt_lengths),
            ("request_generation_tokens", "Tokens of an output.", counts.output_lengths),
        ):
            yield self._histogram(name, text, histogram)

    def _engine(self) -> Iterator[Metric]:
        stats, totals = self._supervisor.stats, self._supervisor.totals
        yield self._gauge("num_requests_running", "Requests in the batch.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a slot or for pages.", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the cache's pages in use; 1 is all.", stats.cache_usage)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", totals.total("prompt_tokens"))
        yield self._counter("prefix_cache_hits", "Prompt tokens found there.", totals.total("hit_tokens"))
        preempted = self._family(
            CounterMetricFamily, "num_preemptions", "Requests that gave up their slot, by what became of their pages.", "mode"
        )
        preempted.add_metric([self._model, "recompute"], totals.total("recomputed"))
        preempted.add_metric([self._model, "swap"], totals.total("swapped"))
        yield preempted
        yield self._gauge("engine_up", "Can a request be answered now?", float(self._supervisor.able))
        yield self._counter("engine_restarts", "Engine processes that died or were replaced.", self._supervisor.deaths)
        memory = self._family(GaugeMetricFamily, "engine_resident_memory_bytes", "Memory of the engine's process.")
        if (size := _resident(self._supervisor.pid)) is not None:
            memory.add_metric([self._model], size)
        yield memory

    def _steps(self) -> Iterator[Metric]:
        totals, now = self._supervisor.totals, time.monotonic()
        yield self._counter("engine_steps", "Steps computed.", totals.total("steps"))
        yield self._counter("engine_step_tokens", "Tokens computed in them, of prompts and outputs.", totals.total("computed_tokens"))
        yield self._counter("engine_step_seconds", "Time that they took.", totals.total("step_ns") / 1e9)
        yield self._counter("engine_profiled_step_seconds", "Of that, in steps that were profiled.", totals.total("profiled_ns") / 1e9)
        yield self._counter("engine_profiled_kernel_seconds", "Of that, in kernels.", totals.total("kernel_ns") / 1e9)
        yield self._counter("engine_read_bytes", "Bytes of weights and cache that steps read.", totals.total("read_bytes"))
        outside = self._family(
            GaugeMetricFamily, "step_outside_kernels_ratio", "Of the last second's steps: share of time outside kernels."
        )
        if (share := totals.kernel_share(now)) is not None:
            outside.add_metric([self._model], 1 - share)
        yield outside
        streaming = self._family(GaugeMetricFamily, "streaming_read_bytes_per_second", "What the machine reads in a stream.")
        utilization = self._family(
            GaugeMetricFamily,
            "memory_bandwidth_utilization_ratio",
            "What the last second's steps read, over what streaming reads in their time.",
        )
        ready = self._supervisor.ready
        if ready is not None and ready.read_bytes_s:
            streaming.add_metric([self._model], ready.read_bytes_s)
            utilization.add_metric([self._model], totals.read_bytes_s(now) / ready.read_bytes_s)
        yield streaming
        yield utilization

    def _server(self) -> Iterator[Metric]:
        counts = self._counts
        answers = CounterMetricFamily(self._prefix + "http_requests", "HTTP requests, by route and status.", labels=("route", "status"))
        for (route, status), number in counts.answers.items():
            answers.add_metric([route, str(status)], number)
        yield answers
        hits = self._family(CounterMetricFamily, "response_cache_hits", "Requests answered from the response cache.", "kind")
        misses = self._family(CounterMetricFamily, "response_cache_misses", "Requests looked for there in vain.", "kind")
        for kind, counted in self._caches.items():
            found = counted()
            hits.add_metric([self._model, kind], found["hits"])
            misses.add_metric([self._model, kind], found["misses"])
        yield hits
        yield misses
        dropped = CounterMetricFamily(self._prefix + "log_lines_dropped", "Log lines that nobody read in time.")
        dropped.add_metric([], self._log.dropped)
        yield dropped
        lag = HistogramMetricFamily(self._prefix + "event_loop_lag_seconds", "How late the server's event loop is.")
        lag.add_metric([], counts.loop_lag.buckets(), counts.loop_lag.sum)
        yield lag

    def _family(self, kind: Callable[..., Family], name: str, text: str, *labels: str) -> Family:
        return kind(self._prefix + name, text, labels=("model_name", *labels))

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = self._family(CounterMetricFamily, name, text)
        family.add_metric([self._model], value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = self._family(GaugeMetricFamily, name, text)
        family.add_metric([self._model], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = self._family(HistogramMetricFamily, name, text)
        family.add_metric([self._model], histogram.buckets(), histogram.sum)
        return family


def _resident(pid: int | None) -> int | None:
    """Bytes of memory of a process; None where it or its numbers are not to be had."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None
