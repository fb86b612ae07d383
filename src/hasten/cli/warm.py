"""`hasten warm FILE`: fill a server's response cache in advance."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.base.errors import UserError, one_line
from hasten.cli.terminal import notify

if TYPE_CHECKING:
    from hasten.serve.responses import Warmed
    from hasten.serve.responses.warm import WarmRequest


def warm(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A body of /v1/completions or /v1/chat/completions a line, or OpenAI's batch lines.")
    ],
    url: Annotated[str, typer.Option("--url", help="The server, as http://HOST:PORT.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests under way at a time.")] = 8,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds after which a request has failed.")] = 600.0,
) -> None:
    """Ask a running server, which keeps the answers. What it has already costs next to nothing: a run that was stopped is begun anew.

    The key in OPENAI_API_KEY is sent, if there is one."""
    import asyncio  # late: it takes as long as all else that --help needs

    from hasten.serve.responses.warm import read_requests

    requests = read_requests(file)
    if open_ended := sum(not request.may_be_kept for request in requests):
        notify(f"{open_ended} of {len(requests)} requests have neither temperature 0 nor a seed; servers keep what must come again alone")
    done = asyncio.run(_warm(requests, url, concurrency, timeout))
    notify(f"{done.computed} answers computed, {done.there} there already, {done.failed} failed")
    if done.failed:
        raise UserError(f"{done.failed} of {len(requests)} requests failed; the first: {done.error}")


async def _warm(requests: "list[WarmRequest]", url: str, concurrency: int, timeout: float) -> "Warmed":
    from rich.console import Console
    from rich.progress import Progress

    from hasten.measure.http1 import HttpClient, bearer
    from hasten.serve.responses.cache import HEADER
    from hasten.serve.responses.warm import warm as fill

    client, console, headers = HttpClient(url, timeout), Console(stderr=True), bearer(os.environ.get("OPENAI_API_KEY"))

    async def ask(route: str, body: dict[str, Any]) -> bool:
        import json

        said = bytearray()
        reply = await client.post(route, json.dumps(body).encode(), headers, lambda piece, now: said.extend(piece))
        if reply.status != 200:
            raise UserError(f"status {reply.status}: {one_line(said[:200].decode('utf-8', 'replace'), 200)[1:-1]}")
        return HEADER in reply.headers

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(requests))

        def told(at: "Warmed") -> None:
            progress.update(task, completed=at.computed + at.there + at.failed, description=f"{at.failed} failed")

        try:
            return await fill(requests, ask, concurrency, told)
        finally:
            await client.close()
