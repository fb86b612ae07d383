"""`hasten serve MODEL`: an OpenAI-compatible server."""

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options

PLACING = options.Placing()


@options.spread
def serve(
    model: options.ModelArgument,
    host: Annotated[str, typer.Option("--host", help="Where to listen; others than this machine need --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free, and says which.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="A key a line; each is a tenant that shares no cached prefix with others.")
    ] = None,
    without_keys: Annotated[bool, typer.Option("--without-keys", help="Let other machines in without keys.")] = False,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="A further name under which a server without keys may be asked; repeatable.")
    ] = None,
    served_name: Annotated[str | None, typer.Option("--served-model-name", help="What clients call the model; MODEL unless given.")] = None,
    placing: options.Placing = PLACING,
    swap: Annotated[str | None, typer.Option("--swap", help="Memory for the caches of requests that must wait: 2GB.")] = None,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, max=4096, help="Most outputs that run together.")] = 32,
    max_waiting: Annotated[
        int | None,
        typer.Option("--max-waiting", min=0, help="Most outputs that wait, more are refused with 429; as many as run unless given."),
    ] = None,
    stretch: Annotated[
        float | None,
        typer.Option(
            "--stretch",
            min=1.05,
            help="How many times as long a token may take while others' prompts are computed; a small one makes long prompts wait: 1.8.",
        ),
    ] = None,
    prefix_cache: Annotated[bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Share what prompts begin with.")] = True,
    deadline: Annotated[float | None, typer.Option("--deadline", min=0.001, help="Most seconds that a request may take.")] = None,
    grace: Annotated[float, typer.Option("--grace", min=0.0, help="Seconds that streams may go on after SIGTERM.")] = 30.0,
    replace_after: Annotated[float, typer.Option("--replace-after", min=5.0, help="Seconds until a hung engine is replaced.")] = 30.0,
    max_body: Annotated[str, typer.Option("--max-body", help="Longest request.")] = "4MiB",
    response_cache: Annotated[
        str,
        typer.Option(
            "--response-cache",
            envvar="HASTEN_RESPONSE_CACHE",
            help="Answer what must come again with what came before: off, memory, redis://HOST:PORT/NUMBER.",
        ),
    ] = "off",
    response_cache_bytes: Annotated[str, typer.Option("--response-cache-bytes", help="Most of it, in memory.")] = "256MiB",
    response_cache_age: Annotated[float, typer.Option("--response-cache-age", help="Seconds until an answer is computed anew.")] = 3600.0,
    semantic_cache: Annotated[
        float | None,
        typer.Option("--semantic-cache", metavar="THRESHOLD", help="Answer like prompts alike, from this cosine on; answers may be wrong."),
    ] = None,
    metrics_prefix: Annotated[
        str, typer.Option("--metrics-prefix", help="What names on /metrics begin with: vllm: for its dashboards.")
    ] = "hasten_",
    read_rate: Annotated[
        str | None,
        typer.Option("--read-rate", help="Bytes a second that memory gives, for the share of it in use; measured unless given: 25GB."),
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines as JSON.")] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API has it."""
    from hasten.serve.guard import Limits
    from hasten.serve.heart import Patience
    from hasten.serve.keys import Keys, read_keys
    from hasten.serve.messages import Begin
    from hasten.serve.responses import Limits as Kept
    from hasten.serve.server import Settings, serve

    begin = Begin(
        model=model, backend=placing.backend, weights=placing.weights, activations=placing.activations, cache=placing.cache,
        context=placing.context, max_sequences=max_sequences, memory=options.parse_bytes("--memory", placing.memory),
        swap_bytes=options.parse_bytes("--swap", swap) or 0, prefixes=prefix_cache, stretch=stretch,
        read_bytes_s=options.parse_bytes("--read-rate", read_rate),
    )  # fmt: skip
    code = serve(
        Settings(
            begin=begin,
            name=served_name or model,
            host=host,
            port=port,
            keys=Keys(()) if api_key_file is None else read_keys(api_key_file),
            without_keys=without_keys,
            hosts=allowed_hosts or (),
            waiting=max_waiting,
            deadline_s=deadline,
            grace_s=grace,
            limits=Limits(body_bytes=options.parse_bytes("--max-body", max_body) or 0),
            as_json=log_json,
            patience=Patience(replaced_s=replace_after),
            response_cache=response_cache,
            kept=Kept(bytes=options.parse_bytes("--response-cache-bytes", response_cache_bytes) or 0, seconds=response_cache_age),
            semantic=semantic_cache,
            metrics_prefix=metrics_prefix,
        )  # fmt: skip
    )
    raise typer.Exit(code)
