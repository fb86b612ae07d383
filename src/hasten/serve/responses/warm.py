"""Filling the response cache in advance: requests of a file are asked of a running server, which keeps what it answers.

Whatever the cache holds already costs a hit, so a run that was stopped is begun again from the start."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.base.errors import UserError
from hasten.engine.jsonl import parse_line

ROUTES = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
"""By the field that only its requests have."""


@dataclass(frozen=True, slots=True)
class WarmRequest:
    """Line ``number`` of a file, from 1 on: what to post where."""

    number: int
    route: str
    body: dict[str, Any]

    @property
    def may_be_kept(self) -> bool:
        """Whether it says itself that it gives the same answer each time; what it leaves open, the server decides."""
        return self.body.get("temperature") == 0 or self.body.get("seed") is not None


@dataclass(frozen=True, slots=True)
class Warmed:
    """How many requests were computed, how many were there already, and how many failed, with what the first of those said."""

    computed: int = 0
    there: int = 0
    failed: int = 0
    error: str = ""


Ask = Callable[[str, dict[str, Any]], Awaitable[bool]]
"""Posts a body to a route; whether the answer came from the cache. Raises UserError, OSError or TimeoutError for one that failed."""


def read_requests(path: Path) -> list[WarmRequest]:
    """A body of `/v1/completions` or `/v1/chat/completions` a line, or a line of OpenAI's batch files (``url`` and ``body``).

    Raises UserError naming the line that is neither."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return [_request(path, number, raw) for number, raw in enumerate(lines, 1) if raw.strip()]


async def warm(requests: Sequence[WarmRequest], ask: Ask, concurrency: int, told: Callable[[Warmed], None]) -> Warmed:
    """Ask every request, ``concurrency`` at a time; ``told`` after each how it stands. One that fails is counted and left out."""
    todo, at = iter(requests), Warmed()

    async def worker(todo: Iterator[WarmRequest]) -> None:
        nonlocal at
        for request in todo:
            try:
                there = await ask(request.route, {**request.body, "stream": False})
            except (UserError, OSError, TimeoutError) as error:
                said = at.error or f"line {request.number}: {str(error) or type(error).__name__}"
                at = Warmed(at.computed, at.there, at.failed + 1, said)
            else:
                at = Warmed(at.computed + (not there), at.there + there, at.failed, at.error)
            told(at)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(worker(todo))
    return at


def _request(path: Path, number: int, raw: bytes) -> WarmRequest:
    where = f"{path}: line {number}"
    line = parse_line(raw, where)
    url, body = (line.get("url"), line["body"]) if isinstance(line, dict) and "body" in line else (None, line)
    if isinstance(body, dict):
        found = [field for field in ROUTES if field in body]
        if len(found) == 1 and url in (None, ROUTES[found[0]]):
            return WarmRequest(number, ROUTES[found[0]], body)
    raise UserError(f'{where} needs "prompt", or "messages", as {" and ".join(ROUTES.values())} have them; one of the two')
