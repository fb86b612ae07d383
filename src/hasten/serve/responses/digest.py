"""What a model is, to the bit of its answers: one digest of the numbers, of how they are played, and of what plays them.

A checkpoint is read whole for it, at the speed of SHA-256 (0.4 to 2 GB a second), so servers take it in a thread of its own."""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hasten import __version__, _native
from hasten.base.errors import CheckpointError, one_line
from hasten.base.priority import give_way
from hasten.formats.quantized import stored_as
from hasten.formats.weights import FileStamp
from hasten.model import Model
from hasten.program import Formats

_BLOCK = 1 << 20
_LOG = logging.getLogger("hasten")


class Played(msgspec.Struct, frozen=True):
    """How a model is played. Any difference here may change a bit of a logit, and so a token; the number of threads may not."""

    backend: str
    formats: Formats
    context: int
    """Most tokens of a prompt and its output: what ends an output, and what a Program of LongRoPE is chosen by."""
    isa: str
    adapter: str = ""
    exits: str = ""

    @classmethod
    def here(cls, backend: str, formats: Formats | None, context: int, isa: str = "best") -> "Played":
        """By this machine, at its level of instructions."""
        return cls(backend, formats or Formats(), context, _native.isa_level(isa))


class _StoppedError(Exception):
    """Nobody waits for the digest any more."""


def model_digest(model: Model, played: Played, stopped: Callable[[], bool] = lambda: False) -> bytes:
    """SHA-256, 32 bytes, of the weights' files (the recipe, where random weights have none; the numbers, where there is neither), Spec,
    config, generation config, tokenizer, how it is played, and this build of hasten.

    Raises CheckpointError where a file was changed since the model was loaded: nobody knows which numbers are in memory then."""
    said = hashlib.sha256()
    played = msgspec.structs.replace(played, formats=played.formats.meant_for(model.cache))
    parts = [
        msgspec.msgpack.encode(
            (1, __version__, played, model.spec, model.source and model.source.config, model.generation), order="deterministic"
        ),
        _file_digest(Path(str(_native.__file__)), stopped),
        *_tokenizer_parts(model, stopped),
        *_weight_parts(model, stopped),
    ]
    for part in parts:
        said.update(len(part).to_bytes(8, "little"))
        said.update(part)
    return said.digest()


async def digest_in_thread(model: Model, played: Played) -> bytes:
    """The same, in a thread that gives way to all others; cancelling this ends it within a block."""
    loop, stop = asyncio.get_running_loop(), threading.Event()
    found: asyncio.Future[bytes] = loop.create_future()

    def settle(tell: Callable[[Any], None], value: object) -> None:
        if not found.done():
            tell(value)

    def work() -> None:
        give_way()
        outcome: tuple[Callable[[Any], None], object]
        try:
            outcome = found.set_result, model_digest(model, played, stop.is_set)
        except _StoppedError:
            return
        except Exception as error:
            outcome = found.set_exception, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="hasten-model-digest", daemon=True).start()
    try:
        return await found
    finally:
        stop.set()


def _tokenizer_parts(model: Model, stopped: Callable[[], bool]) -> list[bytes]:
    if model.tokenizer is None:
        return [b"no tokenizer"]
    settings = msgspec.msgpack.encode(model.tokenizer.settings, order="deterministic")
    return [b"tokenizer", _file_digest(model.tokenizer.path, stopped), settings]


def _weight_parts(model: Model, stopped: Callable[[], bool]) -> list[bytes]:
    origin = model.weights.origin
    if origin is None:
        return [b"arrays", *_array_digests(model, stopped)]
    parts = [b"files", origin.recipe.encode(), *(_stamped_digest(stamp, stopped) for stamp in origin.files)]
    for stamp in origin.files:
        if not stamp.holds:
            raise CheckpointError(f"{stamp.path} was changed since it was loaded; start again to read what it is now")
    return parts


def _stamped_digest(stamp: FileStamp, stopped: Callable[[], bool]) -> bytes:
    return _file_digest(Path(stamp.path), stopped)


def _array_digests(model: Model, stopped: Callable[[], bool]) -> list[bytes]:
    parts = []
    for name, weight in model.weights.items():
        _go_on(stopped)
        array = np.ascontiguousarray(weight.load())
        parts.append(msgspec.msgpack.encode((name, stored_as(weight), str(array.dtype), array.shape)))
        parts.append(hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest())
    return parts


def _file_digest(path: Path, stopped: Callable[[], bool]) -> bytes:
    said = hashlib.sha256()
    block = bytearray(_BLOCK)
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(block):
                _go_on(stopped)
                said.update(memoryview(block)[:size])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error.strerror)}") from None
    return said.digest()


def _go_on(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise _StoppedError
