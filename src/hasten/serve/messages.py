"""What the server's two processes say to each other: typed messages in MessagePack, each behind its length, over one socket.

Nothing read from it can run code, and a message that is none of these types is refused."""

import struct
from collections.abc import Iterator
from typing import Any, Generic, Literal, TypeVar

import msgspec

from hasten.base.errors import UserError
from hasten.engine import SamplingParams, TokenLogprob
from hasten.engine.request import FinishReason

LONGEST = 1 << 30
"""Bytes of one message."""
_LENGTH = struct.Struct("<I")

Message = TypeVar("Message")

Fault = Literal["", "request", "engine"]
"""Whose fault an output's error is: nobody's, what was asked, or hasten's."""


class Begin(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """To the engine's process, first: what to serve, as the arguments of `hasten.engine.LLM` say it."""

    model: str
    backend: str
    weights: str | None
    activations: str | None
    cache: str | None
    context: int | None
    max_sequences: int
    memory: int | None
    swap_bytes: int
    prefixes: bool
    stretch: float | None = None
    """How many times as long prompts may make a step beside running outputs; any number where it is not said."""
    read_bytes_s: float | None = None
    """What the machine reads in a stream, bytes a second; to be measured where it is not said."""


class Submit(msgspec.Struct, tag=True, frozen=True):
    """A request under a number of the server's own. Its outputs share prefixes with those of the same ``tenant`` alone."""

    id: int
    prompt: list[int]
    params: SamplingParams
    tenant: str


class Embed(msgspec.Struct, tag=True, frozen=True):
    """Prompts to be made vectors, under a number of the server's own."""

    id: int
    prompts: list[list[int]]


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for this request any more. One that has ended already is no error."""

    id: int


Order = Begin | Submit | Embed | Abort


class Ready(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The model is loaded and a first token was made. ``plan`` says what memory it takes, ``notice`` what a user should know;
    ``read_bytes_s`` is as in Begin, None where what steps read is not counted."""

    backend: str
    context: int
    plan: str
    notice: str
    seconds: float
    read_bytes_s: float | None


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start. ``mistake``: a user's to mend, and ``reason`` is the line that says how."""

    reason: str
    mistake: bool


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """News of one output of request ``id``, as `hasten.engine.Chunk` has it."""

    id: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None = None
    fault: Fault = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    stop: str | None = None


class News(msgspec.Struct, tag=True, frozen=True):
    """All that one step made known. ``begun`` are the requests that joined the batch, and how many seconds each had waited for that."""

    pieces: list[Piece]
    begun: list[tuple[int, float]] = []


class Vector(msgspec.Struct, array_like=True, frozen=True):
    """What became of a prompt of an `Embed`: float32 in little-endian order, or an error."""

    id: int
    place: int
    data: bytes
    error: str | None = None
    fault: Fault = ""


class Embedded(msgspec.Struct, tag=True, frozen=True):
    """All that one step embedded."""

    vectors: list[Vector]


class Stats(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """How the engine stands, and counters since it began (`hasten.engine.plan.Counters`, and those of a `Meter`); sent a few times a second
    while it works.

    ``cache_usage`` is the share of cache pages that cannot be had, of the fullest group."""

    running: int
    waiting: int
    cache_usage: float
    counters: dict[str, int]


Report = Ready | Failed | News | Embedded | Stats


def frame(message: msgspec.Struct) -> bytes:
    """One message as it is sent."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames(Generic[Message]):
    """Messages out of bytes that come in any portions. ``kinds`` is the type, or union of types, that they may have."""

    def __init__(self, kinds: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kinds)
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete by now. Raises UserError for one too long, msgspec.ValidationError for one of no known type."""
        self._held += data
        while len(self._held) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held)
            if length > LONGEST:
                raise UserError(f"a message of {length:,} bytes between the server's processes; at most {LONGEST:,} are read")
            if len(self._held) < _LENGTH.size + length:
                return
            body = bytes(self._held[_LENGTH.size : _LENGTH.size + length])
            del self._held[: _LENGTH.size + length]
            yield self._decoder.decode(body)
