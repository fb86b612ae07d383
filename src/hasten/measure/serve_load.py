"""A load generator against any server that speaks OpenAI's completions or chat completions, streamed."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.measure.http1 import Events, HttpClient
from hasten.measure.serve_prompts import LoadRequest
from hasten.measure.serve_report import Outcome

ENDPOINTS: Mapping[str, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
"""Where each backend is asked unless told otherwise."""

CACHE_HEADER = "x-hasten-response-cache"
"""What a server says of an answer that it did not compute."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    role: str | None = None

    @property
    def said(self) -> str:
        return (self.reasoning_content or "") + (self.content or "")


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        return self.text or "" if self.delta is None else self.delta.said

    @property
    def holds_output(self) -> bool:
        """Whether a token came with it. One may have no text, but the opening of a chat and the end of an output are none."""
        if self.said or (self.delta is not None and self.delta.tool_calls):
            return True
        return self.finish_reason is None and (self.delta is None or self.delta.role is None)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


class _Listed(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Listed] = []


_CHUNKS = msgspec.json.Decoder(_Chunk)


@dataclasses.dataclass(frozen=True, slots=True)
class Asking:
    """What every request says beside its prompt. ``extra`` are more fields of the body, which win."""

    backend: str = "openai"
    model: str | None = None
    endpoint: str | None = None
    ignore_eos: bool = False
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in ENDPOINTS:
            raise ConfigError(f"backend is {one_line(self.backend)}; accepted: {', '.join(ENDPOINTS)}")

    @property
    def path(self) -> str:
        """Where to post."""
        return self.endpoint or ENDPOINTS[self.backend]

    def body(self, request: LoadRequest) -> bytes:
        """The JSON of one request. Raises ConfigError for token ids to a chat."""
        said: dict[str, Any] = {} if self.model is None else {"model": self.model}
        if self.backend == "openai-chat":
            if not isinstance(request.prompt, str):
                raise ConfigError("a chat takes text, not token ids; draw prompts as text")
            said |= {"messages": [{"role": "user", "content": request.prompt}], "max_completion_tokens": request.output_tokens}
        else:
            said |= {"prompt": request.prompt, "max_tokens": request.output_tokens}
        said |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0}
        if self.ignore_eos:
            said["ignore_eos"] = True
        return msgspec.json.encode(said | dict(self.extra))


class _Reader:
    """Reads one streamed answer into its outcome."""

    def __init__(self, outcome: Outcome, keep_text: bool) -> None:
        self._outcome, self._keep_text, self._events, self._body = outcome, keep_text, Events(), b""
        self._latest = 0.0  # when output came last
        self.ended = False

    def feed(self, piece: bytes, now: float) -> None:
        if not self._outcome.chunks:
            self._body = (self._body + piece)[:2000]  # what to quote of an answer that is no stream
        for event in self._events.feed(piece):
            if event == b"[DONE]":
                self.ended = True
            else:
                self._take(event, now)

    def _take(self, event: bytes, now: float) -> None:
        outcome = self._outcome
        try:
            chunk = _CHUNKS.decode(event)
        except msgspec.DecodeError:
            shown = one_line(event[:200].decode("utf-8", "replace"))
            outcome.error = outcome.error or f"an event is not what OpenAI's streams hold: {shown}"
            return
        if chunk.error is not None:
            outcome.error = outcome.error or _said(event)
        if chunk.usage is not None:
            outcome.prompt_tokens, outcome.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices:
            self.ended |= choice.finish_reason is not None
            if choice.holds_output:
                outcome.chunks += 1
                if outcome.first is None:
                    outcome.first = now
                else:
                    outcome.gaps.append(now - self._latest)
                self._latest = now
                if self._keep_text:
                    outcome.text += choice.said
            outcome.last = now  # what ends an output may come after all of its text

    def finish(self, status: int) -> None:
        outcome = self._outcome
        if status != 200:
            outcome.error = f"status {status}: {_said(self._body)}"
        elif outcome.error is None and not self.ended:
            outcome.error = "the stream stopped before its end" if outcome.chunks else f"the answer is no stream: {_said(self._body)}"


def _said(body: bytes) -> str:
    """What an error's body says, in short."""
    try:
        found: Any = msgspec.json.decode(body)
        inner = found.get("error", found) if isinstance(found, dict) else found
        message = inner.get("message", inner) if isinstance(inner, dict) else inner
    except msgspec.DecodeError:
        message = body.decode("utf-8", "replace")
    return one_line(message if isinstance(message, str) else str(message), 200)[1:-1]


async def ask(client: HttpClient, asking: Asking, request: LoadRequest, *, late: float = 0.0, keep_text: bool = False) -> Outcome:
    """Send one request, and read its answer to the end. Whatever goes wrong with it is its outcome's ``error``."""
    try:
        body = asking.body(request)
    except UnicodeEncodeError:
        return Outcome(time.perf_counter(), late, error="the request holds half a surrogate pair, which is no text")
    outcome = Outcome(time.perf_counter(), late)
    reader = _Reader(outcome, keep_text)
    headers = {"Accept": "text/event-stream", **asking.headers}
    try:
        reply = await client.post(asking.path, body, headers, reader.feed)
    except TimeoutError:
        outcome.error = "timed out"
    except OSError as error:
        outcome.error = outcome.error or one_line(str(error) or type(error).__name__, 200)[1:-1]
    else:
        reader.finish(reply.status)
        outcome.cached = CACHE_HEADER in reply.headers
    return outcome


async def run_load(
    client: HttpClient, asking: Asking, requests: Sequence[LoadRequest], times: NDArray[np.float64], *,
    max_concurrency: int | None = None, keep_text: bool = False, told: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[list[Outcome], float]:  # fmt: skip
    """Outcomes in the order of ``requests``, and the seconds that all took. Request i is sent ``times[i]`` seconds after the start, or when
    one of ``max_concurrency`` others ends; its own time counts from when it is sent. ``late`` tells how far this process was behind."""
    free = asyncio.Semaphore(max_concurrency or len(requests) or 1)
    began = time.perf_counter()

    async def one(index: int) -> Outcome:
        late = time.perf_counter() - began - float(times[index])
        async with free:
            outcome = await ask(client, asking, requests[index], late=late, keep_text=keep_text)
        told(outcome)
        return outcome

    tasks: list[Awaitable[Outcome]] = []
    async with asyncio.TaskGroup() as group:
        for index, when in enumerate(times.tolist()):
            if (wait := began + when - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(one(index)))
    return [await task for task in tasks], time.perf_counter() - began


async def find_model(client: HttpClient, headers: Mapping[str, str]) -> str:
    """The first model that the server says it has. Raises UserError where it says none."""
    pieces: list[bytes] = []
    try:
        reply = await client.get("/v1/models", headers, lambda piece, now: pieces.append(piece))
        listed = msgspec.json.decode(b"".join(pieces), type=_Models)
    except (OSError, TimeoutError, msgspec.DecodeError) as error:
        raise UserError(f"the server's models cannot be listed ({one_line(str(error), 200)[1:-1]}); is it there? Or give --model") from None
    if reply.status != 200 or not listed.data:
        raise UserError(f"the server lists no model (status {reply.status}: {_said(b''.join(pieces))}); give --model")
    return listed.data[0].id
