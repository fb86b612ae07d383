"""`hasten bench`: how fast, and how near to the machine's limit, measured in the same run."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.base.errors import ConfigError
from hasten.cli import options
from hasten.cli.bench_serve import serve
from hasten.cli.table import print_table
from hasten.cli.terminal import notify, visible_line

if TYPE_CHECKING:
    from hasten.measure.throughput import Throughput

bench = typer.Typer(name="bench", help="Measure speed, beside this machine's limits.", no_args_is_help=True)
bench.command("serve")(serve)

ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads to run on; all cores granted unless given.")]
IsaOption = Annotated[str, typer.Option("--isa", help="Instruction-set level of the kernels: best, generic, avx2, avx512 or amx.")]
DeviceOption = Annotated[str, typer.Option("--backend", help="What is measured: cpu, or cuda (an NVIDIA GPU).")]
SEVERAL = "; several, separated by commas, make a row each"


@bench.command("roofline")
def roofline(
    backend: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    read_bytes: Annotated[
        int,
        typer.Option("--bytes", min=1, help="Buffer to read, or on a GPU to copy, well above the last cache; a part of the free memory."),
    ] = 1 << 30,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times the buffer is read; the median counts.")] = 5,
    seconds: Annotated[float, typer.Option("--seconds", help="Seconds for each arithmetic peak of the CPU.")] = 0.25,
    as_json: options.JsonOption = False,
) -> None:
    """Streaming read and arithmetic peaks of this machine, with the instruction each was taken with; of a GPU, copies and products."""
    from rich.console import Console

    if _on_device(backend, threads, "best"):
        _device_roofline(read_bytes, repeats, as_json)
        return
    from hasten import _native
    from hasten.base import hardware
    from hasten.measure.roofline import instruction

    available = hardware.memory().available
    used = read_bytes if available is None else min(read_bytes, available // 2)
    with Console(stderr=True).status("measuring memory bandwidth and arithmetic peaks …"):
        found = hardware.measure_roofline(threads, read_bytes=used, repeats=repeats, seconds=seconds)
    facts = {
        **dataclasses.asdict(found), "isa": _native.isa_level(), "read_bytes": used,
        "bf16_instruction": instruction("bf16", found.bf16_isa), "int8_instruction": instruction("int8", found.int8_isa),
        "f32_instruction": instruction("f32", found.f32_isa),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"read      {found.read_gb_per_s:.1f} GB/s from {used / 2**20:,.0f} MiB ({found.threads} threads)")
    typer.echo(f"bf16      {found.bf16_tflops:.3f} TFLOP/s ({facts['bf16_instruction']})")
    typer.echo(f"int8      {found.int8_tops:.3f} TOP/s ({facts['int8_instruction']})")
    typer.echo(f"f32       {found.f32_tflops:.3f} TFLOP/s ({facts['f32_instruction']})")


def _on_device(backend: str, threads: int | None, isa: str) -> bool:
    """Whether a GPU is asked for. Raises ConfigError for options that it has not, and for another backend."""
    if backend not in {"cpu", "cuda"}:
        options.refuse("backend", backend, "cpu, cuda")
    if backend == "cuda" and (threads is not None or isa != "best"):
        raise ConfigError("--threads and --isa are of --backend cpu; a GPU has neither, so leave them out")
    return backend == "cuda"


def _device_roofline(copied_bytes: int, repeats: int, as_json: bool) -> None:
    from rich.console import Console

    from hasten.engine.backends import find_loaded

    with Console(stderr=True).status("measuring copies and products …"):
        found = find_loaded("cuda").roofline(copied_bytes, repeats)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    typer.echo(visible_line(f"device    {found.device}, {found.isa}"))
    typer.echo(f"copy      {found.copy_gb_per_s:,.1f} GB/s, {found.copied_bytes / 2**20:,.0f} MiB read and written")
    typer.echo(f"bf16      {found.bf16_tflops:,.2f} TFLOP/s")
    typer.echo(f"int8      {found.int8_tops:,.2f} TOP/s")
    typer.echo("fp8       none" if found.fp8_tflops is None else f"fp8       {found.fp8_tflops:,.2f} TFLOP/s")
    typer.echo(f"f32       {found.f32_tflops:,.3f} TFLOP/s")


@bench.command("latency")
def latency(
    model: options.ModelArgument,
    weights: Annotated[
        str | None, typer.Option("--weights", help="How linear layers are stored: bf16 (unless given), int8, int4 …" + SEVERAL)
    ] = None,
    activations: Annotated[
        str | None, typer.Option("--activations", help="How linear layers are fed; must go with the weights: bf16, int8 or fp8.")
    ] = None,
    cache: Annotated[str | None, typer.Option("--cache", help="How keys and values are kept: bf16 (unless given), int8 or fp8.")] = None,
    batch: Annotated[str, typer.Option("--batch", help="Sequences at once" + SEVERAL)] = "1",
    prompt: Annotated[str, typer.Option("--prompt", help="Tokens of each prompt" + SEVERAL)] = "128",
    new: Annotated[int, typer.Option("--new", min=1, help="Tokens to decode for each prompt.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs; medians count.")] = 5,
    backend: options.BackendOption = "auto",
    threads: ThreadsOption = None,
    isa: IsaOption = "best",
    as_json: options.JsonOption = False,
) -> None:
    """Prefill and decode speed over the machine's limits, which are measured between the runs. --json prints one object a row."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load
    from hasten.engine.backends import AUTO, choose_backend
    from hasten.measure.latency import Case, Latency, check_weights, open_runner, repetitions
    from hasten.measure.speed import fit_together
    from hasten.program import Formats

    cases = [Case(b, p, new) for b, p in itertools.product(options.counts("batch", batch), options.counts("prompt", prompt))]
    formats: list[str | None] = [None] if weights is None else [each.strip() for each in weights.split(",")]
    loaded = load(model)
    check_weights(formats)
    if backend == AUTO and (threads is not None or isa != "best"):
        backend = "cpu"  # which alone has them
    backend, notice = choose_backend(loaded, backend, Formats(formats[0], activations, cache))
    notify(notice)
    rows = []
    turns = [formats]
    if len(formats) > 1 and not fit_together(loaded, backend, [Formats(each, activations, cache) for each in formats]):
        turns = [[each] for each in formats]
        notify("the weights do not fit in memory in all formats at once: one format is timed after the other, not in turn")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(formats) * len(cases) * repeats)
        for turn in turns:
            runners = []
            for each in turn:
                progress.update(task, description=f"preparing weights {each or ''}")
                runners.append(
                    open_runner(
                        loaded, cases, backend=backend, weights=each, activations=activations, cache=cache, threads=threads, isa=isa
                    )
                )
            for case in cases:
                progress.update(task, description=f"batch {case.batch} prompt {case.prompt}")
                rounds = []
                for found in repetitions(runners, case, repeats):
                    rounds.append(found)
                    progress.advance(task, len(found))
                for runner, *own in zip(runners, *rounds, strict=True):
                    rows.append(Latency.of(runner, case, own))
                    if as_json:
                        typer.echo(json.dumps(dataclasses.asdict(rows[-1])))
            del runners, runner  # before the next are opened
    if not as_json:
        _print_latency(rows)


@bench.command("context")
def context(
    model: options.ModelArgument,
    contexts: Annotated[str, typer.Option("--context", help="Contexts, three or more, separated by commas.")] = "128,2048,8192,16384,32768",
    weights: options.WeightsOption = None,
    activations: options.ActivationsOption = None,
    cache: options.CacheOption = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps timed at each context, three times over; medians count.")] = 5,
    threads: ThreadsOption = None,
    isa: IsaOption = "best",
    as_json: options.JsonOption = False,
) -> None:
    """Step time and memory of one sequence as its context grows, and how straight a line they make. --json prints one object a row."""
    from rich.console import Console

    from hasten.base import hardware
    from hasten.checkpoint import load
    from hasten.measure.context import Line, context_points
    from hasten.measure.latency import PROFILED, Case, open_runner

    chosen = sorted({*options.counts("context", contexts)})
    if len(chosen) < 3:
        options.refuse("context", contexts, "three contexts or more, for any two points make a line")
    loaded, before = load(model), hardware.resident_bytes()
    with Console(stderr=True).status("growing a sequence …"):
        runner = open_runner(
            loaded, [Case(1, chosen[-1], PROFILED)], weights=weights, activations=activations, cache=cache, threads=threads, isa=isa
        )
        rows = list(context_points(runner, chosen, steps, before))
    if as_json:
        for row in rows:
            typer.echo(json.dumps(dataclasses.asdict(row)))
        return
    typer.echo(visible_line(f"{runner.model}, weights {runner.weights}, cache {runner.cache}, {runner.isa}, {runner.threads} threads"))
    print_table(
        ("context", "step ms", "weights MB", "arena MB", "cache MB", "together MB", "resident MB"),
        [
            (
                f"{row.context:,}", f"{row.tpot_ms:,.2f}", f"{row.weight_bytes / 1e6:,.1f}", f"{row.arena_bytes / 1e6:,.1f}",
                f"{row.cache_bytes / 1e6:,.1f}", f"{row.planned_bytes / 1e6:,.1f}",
                "–" if row.resident_bytes is None else f"{row.resident_bytes / 1e6:,.1f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    line = Line.through([row.context for row in rows], [row.tpot_ms for row in rows])
    typer.echo(f"a step takes {line.at_zero:.2f} ms + {1e3 * line.slope:.3f} µs a token; R² {line.r2:.4f}, at most {line.worst:.1%} off")


@bench.command("throughput")
def throughput(
    model: options.ModelArgument,
    batching: Annotated[
        str, typer.Option("--batching", help="static (padded), dynamic (static, begun by number or time) or continuous" + SEVERAL)
    ] = "continuous",
    prefix_cache: Annotated[str, typer.Option("--prefix-cache", help="on or off" + SEVERAL)] = "on",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests, all there at once.")] = 96,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Most sequences that run together.")] = 32,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of each prompt of its own.")] = 32,
    output_min: Annotated[int, typer.Option("--output-min", min=1, help="Fewest tokens of an output; lengths are log-uniform.")] = 16,
    output_max: Annotated[int, typer.Option("--output-max", min=1, help="Most tokens of an output.")] = 512,
    shared_prefix: Annotated[int, typer.Option("--shared-prefix", min=0, help="Tokens that all prompts begin with.")] = 0,
    step_tokens: Annotated[int, typer.Option("--step-tokens", min=1, help="Most tokens of a step.")] = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws lengths and token ids.")] = 0,
    backend: options.BackendOption = "auto",
    weights: options.WeightsOption = None,
    activations: options.ActivationsOption = None,
    cache: options.CacheOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Tokens a second of many requests of mixed lengths, by how they are batched, and what the drawn lengths allow. --json prints one
    object a row."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.checkpoint import load
    from hasten.measure.throughput import BATCHINGS, Workload, open_llm, run_workload
    from hasten.program import Formats

    kinds, switches = [each.strip() for each in batching.split(",")], [each.strip() for each in prefix_cache.split(",")]
    if wrong := [each for each in kinds if each not in BATCHINGS]:
        options.refuse("batching", wrong[0], ", ".join(BATCHINGS))
    if wrong := [each for each in switches if each not in {"on", "off"}]:
        options.refuse("prefix-cache", wrong[0], "on, off")
    workload = Workload(requests, prompt, output_min, output_max, shared_prefix, seed)
    loaded, rows = load(model), []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for kind, switch in itertools.product(kinds, switches):
            task = progress.add_task(f"{kind}, prefix cache {switch}", total=sum(workload.lengths()))
            llm = open_llm(
                loaded, workload, batching=kind, slots=slots, backend=backend, formats=Formats(weights, activations, cache),
                prefix_cache=switch == "on", step_tokens=step_tokens,
            )  # fmt: skip
            notify(llm.notice)
            rows.append(run_workload(llm, workload, kind, switch == "on", functools.partial(progress.advance, task)))
            if as_json:
                typer.echo(json.dumps(dataclasses.asdict(rows[-1])))
    if not as_json:
        _print_throughput(rows)


@bench.command("ops")
def kernels(
    shape: Annotated[str, typer.Option("--shape", help="Sizes of which model, as in random:SHAPE.")] = "tinyllama-1.1b",
    rows: Annotated[str, typer.Option("--rows", help="Numbers of rows, separated by commas.")] = "1,8,32,512",
    contexts: Annotated[str, typer.Option("--context", help="Contexts for attention, separated by commas.")] = "128,2048",
    footprint: Annotated[
        int,
        typer.Option(
            "--bytes",
            min=1,
            help="Bytes of copies of a weight that are read in turn, well above the last-level cache; on a GPU each layer has its own.",
        ),
    ] = 256 << 20,
    only: Annotated[str | None, typer.Option("--only", help="Kernels to measure, separated by commas: linear, attend …; all else.")] = None,
    backend: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    isa: IsaOption = "best",
    as_json: options.JsonOption = False,
) -> None:
    """Each kernel alone, against its own limit: bytes over streaming read (on a GPU over a copy), or operations over the peak. --json
    prints one object a row."""
    from rich.console import Console
    from rich.progress import Progress

    from hasten.measure.kernels import KernelTime, Setup, kernel_cases, open_pool, time_kernel

    setup = Setup(shape, tuple(options.counts("rows", rows)), tuple(options.counts("context", contexts)), footprint)
    found: list[KernelTime] = []
    console = Console(stderr=True)
    if _on_device(backend, threads, isa):
        from hasten.measure.device_kernels import device_kernel_names, device_kernels

        chosen = _chosen(only, device_kernel_names(shape))
        with console.status("measuring kernels …"):
            for each in device_kernels(setup, chosen):
                found.append(each)
                if as_json:
                    typer.echo(json.dumps(dataclasses.asdict(each)))
        if not as_json:
            _print_kernels(found)
        return
    pool, level = open_pool(threads, isa)
    chosen = _chosen(only, dict.fromkeys(case.op for case in kernel_cases(setup, level)))
    total = sum(case.op in chosen for case in kernel_cases(setup, level))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for case in kernel_cases(setup, level):
            if case.op in chosen:
                progress.update(task, description=f"{case.op} {case.format} {case.shape}, {case.rows} rows")
                found.append(time_kernel(case, pool, level))
                progress.advance(task)
                if as_json:
                    typer.echo(json.dumps(dataclasses.asdict(found[-1])))
    if not as_json:
        _print_kernels(found)


def _chosen(only: str | None, names: Iterable[str]) -> list[str]:
    """The kernels of --only, or all of ``names``. Raises ConfigError for one that is none."""
    known = [*names]
    chosen = known if only is None else [each.strip() for each in only.split(",")]
    if unknown := [each for each in chosen if each not in known]:
        options.refuse("only", unknown[0], ", ".join(known))
    return chosen


def _print_throughput(rows: Sequence["Throughput"]) -> None:
    """A line a run, and what continuous batching gained over static of what it could."""
    typer.echo("batching    prefixes  tokens/s   first token: mean, p99    steps   padded  hit tokens  preempted  page waste")
    for row in rows:
        typer.echo(
            f"{row.batching:<11} {'on' if row.prefix_cache else 'off':<8} {row.tokens_per_s:9.1f} {row.ttft_mean_s:12.2f} s "
            f"{row.ttft_p99_s:8.2f} s {row.steps:8} {row.padding_tokens:8} {row.hit_tokens:11} {row.preemptions:10} {row.page_waste:10.1%}"
        )
    typer.echo(
        f"the drawn lengths allow {rows[0].bound_steps:.2f} × static where steps cost alike, {rows[0].bound_rows:.2f} × where rows do"
    )
    by_kind = {row.batching: row for row in reversed(rows)}
    if {"static", "continuous"} <= by_kind.keys():
        row = by_kind["continuous"]
        ratio = row.tokens_per_s / by_kind["static"].tokens_per_s
        line = f"continuous over static {ratio:.2f} ×: {ratio / row.bound_steps:.2f} and {ratio / row.bound_rows:.2f} of that"
        if row.bound_measured is not None and row.step_fixed_s is not None and row.step_row_s is not None:
            line += (
                f"; a step took {1e3 * row.step_fixed_s:.2f} ms and {1e3 * row.step_row_s:.2f} for each row, which allows "
                f"{row.bound_measured:.2f} ×: {ratio / row.bound_measured:.2f} of it"
            )
        typer.echo(line)
    cached = {row.prefix_cache: row.ttft_mean_s for row in reversed(rows)}
    if len(cached) == 2:
        typer.echo(f"mean time to the first token with over without the prefix cache {cached[True] / cached[False]:.3f}")


def _print_latency(rows: list[Any]) -> None:
    first = rows[0]
    typer.echo(visible_line(f"{first.model}, backend {first.backend}, {first.isa}, {first.threads} threads"))
    print_table(
        ("weights", "activations", "cache", "batch", "prompt", "prefill tok/s", "decode tok/s", "first ms", "next ms", "MB/step", "mbu",
         "mfu", "of limit", "outside kernels µs"),
        [
            (
                row.weights, row.activations, row.cache, f"{row.batch}", f"{row.prompt}", f"{row.prefill_tokens_per_s:,.1f}",
                f"{row.decode_tokens_per_s:,.2f}", f"{row.ttft_ms:,.2f}", f"{row.tpot_ms:,.3f}", f"{row.bytes_per_step / 1e6:,.1f}",
                f"{row.mbu:.3f}", f"{row.mfu:.3f}", f"{row.of_limit:.3f}",
                "–" if row.step_overhead_us is None else f"{row.step_overhead_us:,.1f}",
            )
            for row in rows
        ],
    )  # fmt: skip


def _print_kernels(rows: list[Any]) -> None:
    typer.echo(rows[0].isa if rows[0].threads is None else f"{rows[0].isa}, {rows[0].threads} threads")
    print_table(
        ("kernel", "format", "shape", "rows", "context", "µs", "GB/s", "TOP/s", "bound", "of limit"),
        [
            (
                row.op, row.format, row.shape, f"{row.rows}", "" if row.context is None else f"{row.context}", f"{row.us:,.1f}",
                f"{row.gb_per_s:.1f}", f"{row.tops:.3f}" if row.operations else "", row.bound, f"{row.of_limit:.3f}",
            )
            for row in rows
        ],
    )  # fmt: skip
