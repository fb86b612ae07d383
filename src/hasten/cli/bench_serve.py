"""`hasten bench serve`: load on a running server, and what it answered how fast. Options are named as those of `vllm bench serve`."""

import datetime
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.cli import options
from hasten.cli.terminal import notify, visible

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hasten.measure.serve_load import Asking
    from hasten.measure.serve_prompts import LoadRequest
    from hasten.measure.serve_report import Outcome

DATASETS = ("random", "sharegpt", "custom")
DETAILS = {"input_lens": "prompt_tokens", "output_lens": "tokens", "itls": "gaps", "generated_texts": "text", "errors_by_request": "error"}


def serve(
    more_goodput: Annotated[
        list[str] | None, typer.Argument(metavar="METRIC:MS", help="More of --goodput, as in --goodput ttft:200 tpot:50.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="openai (completions) or openai-chat.")] = "openai",
    base_url: Annotated[str | None, typer.Option("--base-url", help="http://HOST:PORT; instead of --host and --port.")] = None,
    host: Annotated[str, typer.Option("--host", help="Where the server is.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where the server is.")] = 8000,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="Path to post to; the backend's own unless given.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Name of the model; the first that the server lists unless given.")] = None,
    dataset_name: Annotated[
        str, typer.Option("--dataset-name", help='random, sharegpt (JSON) or custom (lines of {"prompt": TEXT}).')
    ] = "random",
    dataset_path: Annotated[Path | None, typer.Option("--dataset-path", help="File of sharegpt or custom.")] = None,
    output_len: Annotated[int, typer.Option("--output-len", min=1, help="Most tokens of an answer, for sharegpt and custom.")] = 256,
    random_input_len: Annotated[int, typer.Option("--random-input-len", min=1, help="Tokens of a random prompt.")] = 1024,
    random_output_len: Annotated[int, typer.Option("--random-output-len", min=1, help="Most tokens of an answer to it.")] = 128,
    random_range_ratio: Annotated[float, typer.Option("--random-range-ratio", help="Lengths vary by this share, up and down.")] = 0.0,
    random_prefix_len: Annotated[int, typer.Option("--random-prefix-len", min=0, help="Tokens that all prompts begin with.")] = 0,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="Requests.")] = 1000,
    request_rate: Annotated[float, typer.Option("--request-rate", help="Requests a second, by chance; inf sends all at once.")] = math.inf,
    burstiness: Annotated[float, typer.Option("--burstiness", help="1 is a Poisson process; less comes in bursts, more evenly.")] = 1.0,
    ramp_up_strategy: Annotated[
        str | None, typer.Option("--ramp-up-strategy", help="linear or exponential: the rate goes from --ramp-up-start-rps to -end-rps.")
    ] = None,
    ramp_up_start_rps: Annotated[float | None, typer.Option("--ramp-up-start-rps", help="Requests a second at first.")] = None,
    ramp_up_end_rps: Annotated[float | None, typer.Option("--ramp-up-end-rps", help="Requests a second at last.")] = None,
    max_concurrency: Annotated[int | None, typer.Option("--max-concurrency", min=1, help="Most requests under way at a time.")] = None,
    num_warmups: Annotated[int, typer.Option("--num-warmups", min=0, help="Requests before, one by one, that do not count.")] = 0,
    percentile_metrics: Annotated[str, typer.Option("--percentile-metrics", help="ttft, tpot, itl, e2el.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option("--metric-percentiles", help="Percentiles, separated by commas.")] = "99",
    goodput: Annotated[
        list[str] | None, typer.Option("--goodput", help="METRIC:MS for ttft, tpot or e2el: count requests a second that meet all.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Ask for answers of full length, if the server knows how.")] = False,
    extra_body: Annotated[str | None, typer.Option("--extra-body", help="JSON object of more fields for every request.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws prompts, lengths and times.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds after which a request has failed.")] = 3600.0,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the JSON to a file.")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="With it, figures and text of every request.")] = False,
    result_dir: Annotated[Path, typer.Option("--result-dir", help="Where the file goes.")] = Path(),
    result_filename: Annotated[str | None, typer.Option("--result-filename", help="Its name; made of time and model unless given.")] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Load on a server that speaks OpenAI's API: throughput, goodput, TTFT, TPOT, ITL and end-to-end latency.

    The key in OPENAI_API_KEY is sent, if there is one. Equal seeds send equal prompts, which a server that caches answers faster the
    second time; what came from a response cache is counted."""
    import asyncio  # late: it takes as long as all else that --help needs

    from hasten.measure.arrivals import Ramp, arrival_times
    from hasten.measure.http1 import bearer
    from hasten.measure.serve_load import Asking
    from hasten.measure.serve_prompts import RandomPrompts, read_custom, read_sharegpt
    from hasten.measure.serve_report import parse_goodput, parse_metrics, parse_percentiles, report, table

    metrics, percentiles = parse_metrics(percentile_metrics), parse_percentiles(metric_percentiles)
    if more_goodput and not goodput:
        options.refuse("argument", more_goodput[0], "options only; hasten bench serve --help lists them")
    slos = parse_goodput([*(goodput or []), *(more_goodput or [])])
    ramp = None
    if ramp_up_strategy is not None:
        if ramp_up_strategy not in {"linear", "exponential"}:
            options.refuse("ramp-up-strategy", ramp_up_strategy, "linear, exponential")
        if ramp_up_start_rps is None or ramp_up_end_rps is None:
            raise ConfigError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
        ramp = Ramp("linear" if ramp_up_strategy == "linear" else "exponential", ramp_up_start_rps, ramp_up_end_rps)
    times = arrival_times(num_prompts, request_rate, burstiness=burstiness, ramp=ramp, seed=seed)
    headers = bearer(os.environ.get("OPENAI_API_KEY"))
    asking = Asking(backend, model, endpoint, ignore_eos, headers, _object("extra-body", extra_body))
    drawn = num_prompts + num_warmups
    if dataset_name == "random":
        prompts = RandomPrompts(random_input_len, random_output_len, random_range_ratio, random_prefix_len, backend == "openai-chat")
        requests = prompts.draw(drawn, seed)
    elif dataset_name not in DATASETS:
        options.refuse("dataset-name", dataset_name, ", ".join(DATASETS))
    elif dataset_path is None:
        raise ConfigError(f"--dataset-name {dataset_name} needs --dataset-path")
    else:
        requests = (read_sharegpt if dataset_name == "sharegpt" else read_custom)(dataset_path, drawn, output_len, seed)
    url = base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}"
    name, outcomes, duration = asyncio.run(
        _run(url, timeout, asking, requests[:num_warmups], requests[num_warmups:], times, max_concurrency, save_detailed)
    )
    found: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "backend": backend, "model_id": name,
        "num_prompts": num_prompts, "request_rate": request_rate if math.isfinite(request_rate) else "inf", "burstiness": burstiness,
        "max_concurrency": max_concurrency, "dataset_name": dataset_name, "seed": seed,
        **report(outcomes, duration, metrics=metrics, percentiles=percentiles, slos=slos),
    }  # fmt: skip
    if save_detailed:
        found |= {label: [getattr(one, field) for one in outcomes] for label, field in DETAILS.items()}
        found["ttfts"] = [one.seconds("ttft") for one in outcomes]
    if save_result:
        file = result_dir / (result_filename or f"{backend}-{datetime.datetime.now():%Y%m%d-%H%M%S}.json")
        _write(file, found)
    typer.echo(json.dumps(found) if as_json else visible(table(found, metrics=metrics, percentiles=percentiles)))
    if found["max_late_ms"] > 100:
        notify(f"requests were sent up to {found['max_late_ms']:,.0f} ms late: this machine is too busy to send so many")
    if not found["completed"]:
        raise UserError("no request was answered")


async def _run(
    url: str, timeout: float, asking: "Asking", warmups: "list[LoadRequest]", requests: "list[LoadRequest]", times: "NDArray[np.float64]",
    max_concurrency: int | None, keep_text: bool,
) -> "tuple[str, list[Outcome], float]":  # fmt: skip
    """The name of the model, and what `run_load` returns."""
    import dataclasses

    from rich.console import Console
    from rich.progress import Progress

    from hasten.measure.http1 import HttpClient
    from hasten.measure.serve_load import ask, find_model, run_load

    client, console = HttpClient(url, timeout), Console(stderr=True)
    try:
        if asking.model is None:
            asking = dataclasses.replace(asking, model=await find_model(client, asking.headers))
        for request in warmups:
            if (error := (await ask(client, asking, request)).error) is not None:
                raise UserError(f"a warm-up request failed: {error}")
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(one_line(asking.model)[1:-1], total=len(requests))
            outcomes, duration = await run_load(
                client, asking, requests, times, max_concurrency=max_concurrency, keep_text=keep_text,
                told=lambda outcome: progress.advance(task),
            )  # fmt: skip
    finally:
        await client.close()
    return asking.model or "", outcomes, duration


def _object(name: str, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        options.refuse(name, text, "a JSON object")
    return found


def _write(file: Path, found: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    notify(f"wrote {file}")
