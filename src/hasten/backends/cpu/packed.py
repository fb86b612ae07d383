"""Packed weights: made from dense ones, or read from the file that an earlier start left of them.

A file is 64 bytes (magic, place, length and digest of the header), the parts of every weight at multiples of 4096, and the header. It
appears under its name only when whole, and is never changed after, so that any number of processes may read, replace and remove it.

A file that is in memory already is mapped, and its digests are taken before anything is played from it; then it is moved to huge pages in
the background, and the digests are taken again of what was moved, for the system may have let go of a page and read it again meanwhile:
what was damaged by then may have been played, and the next step says so. Any other file is read into huge pages at once, the digests are
taken on the way, and nothing damaged is played.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import shutil
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from hasten import __version__, _native
from hasten.backends.cpu.sparse import advice, slower_than_dense
from hasten.base import settings
from hasten.base.priority import give_way
from hasten.formats.linear import ClusteredLinear, LinearFormat, QuantizedLinear
from hasten.formats.mapped import release
from hasten.formats.weights import Array, Origin, Weight

LAYOUT = 3
"""Counts up whenever the meaning of a file changes; the extension's build is part of every key besides."""

TABLE = "table"  # the format of rows that are looked up, not multiplied
SUFFIX, PARTIAL = ".packed", ".partial"
ABANDONED = 3600  # seconds without a byte after which nobody is still writing a file

_ALIGNMENT = 4096
_HEADER_LIMIT = 64 << 20
_PREAMBLE = struct.Struct("<8sQQ32s")
_MAGIC = b"hastenpk"
_LOG = logging.getLogger("hasten")  # a line on stderr where nobody set it up otherwise

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]
Room = NDArray[np.uint8]
Stacked = TypeVar("Stacked", bound=Array | QuantizedLinear)


class Wanted(msgspec.Struct, frozen=True):
    """A weight [out, in] in the form a kernel reads; ``as_stored`` where its codes come from the checkpoint, rather than from rounding."""

    name: str
    format: str
    out: int
    in_: int
    as_stored: bool = False


class Key(msgspec.Struct, frozen=True):
    """All that decides the bytes of a file."""

    origin: Origin
    weights: tuple[Wanted, ...]
    isa: str
    build: tuple[str, int, int]  # version, and the extension's size and time
    layout: int = LAYOUT

    @property
    def file_name(self) -> str:
        """Where it is kept."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest() + SUFFIX


class Part(msgspec.Struct, frozen=True):
    """A run of a file's bytes."""

    offset: int
    size: int
    digest: int


class Header(msgspec.Struct, frozen=True):
    """What a file holds: the parts of each of the key's weights, in the key's order. ``model`` is what its first user called it."""

    model: str
    key: Key
    parts: tuple[tuple[Part, ...], ...]

    def holds(self, key: Key, sizes: Sequence[Sequence[int]]) -> bool:
        """Whether it is the key's, with parts of these sizes."""
        return self.key == key and [[part.size for part in each] for each in self.parts] == sizes


def key_of(origin: Origin, wanted: Sequence[Wanted], isa: str) -> Key:
    """The key of these weights as this build packs them."""
    status = os.stat(str(_native.__file__))
    return Key(origin, tuple(wanted), isa, (__version__, status.st_size, status.st_mtime_ns))


# --- the weights of one session


@dataclasses.dataclass(frozen=True, slots=True)
class _Request:
    """Memory that waits for a weight: ``load`` gives the numbers, ``pack`` fills every part from them, ``lie_in`` takes them from a
    file, where the parts begin at these offsets."""

    wanted: Wanted
    parts: Sequence[Room]
    load: Callable[[], Any]
    pack: Callable[[Any], None]
    lie_in: Callable[[_native.MappedFile, list[int]], None]


class PackedWeights:
    """Collects what a Program needs while it is compiled, then fills all of it at once: from the cache, or by packing.

    Without ``cache``, or where nobody knows the numbers' ``origin``, everything is packed."""

    def __init__(self, pool: _native.ThreadPool, isa: str, model: str, origin: Origin | None, cache: "PackedCache | None") -> None:
        self._pool, self._isa, self._model, self._origin = pool, isa, model, origin
        self._cache = cache if origin is not None and cache is not None and cache.limit else None
        self._requests: list[_Request] = []
        self._mapped: _native.MappedFile | None = None
        self._written: threading.Thread | None = None
        self._made: dict[tuple[str, str], _native.WeightBuffer] = {}  # what several tapes read is there once
        self._tables: dict[str, _native.TableBuffer] = {}
        self._filled = False
        self._at_once = 0  # packed before anybody asked to fill
        self._slower: set[LinearFormat] = set()  # formats of sparse weights that do not pay here

    def linear(self, name: str, form: LinearFormat, out: int, in_: int, dense: Callable[[], Array]) -> _native.WeightBuffer:
        """A weight [out, in], empty until ``fill``. ``dense`` is called, on another thread, only where it must be packed.

        A sparse weight is packed at once: how much memory it takes, which a file must know, depends on its numbers."""
        if (made := self._made.get((name, str(form)))) is not None:
            return made
        buffer = self._made[name, str(form)] = _native.WeightBuffer(form.number, out, in_, form.group, form.zero_points, form.sparse)
        if form.has_codebook:  # which is found here, and packed with its codes
            found = functools.partial(_clustered, form, dense)
            pack_codes = functools.partial(_pack_codes, buffer, self._pool)
            self._requests.append(_Request(Wanted(name, str(form), out, in_), buffer.parts(), found, pack_codes, buffer.lie_in))
            return buffer
        bits = _floats if form.zero_points or form.number in {"f32", "f16"} else _bf16
        pack = functools.partial(_pack_bits, buffer, self._pool, bits)
        if form.sparse:
            self._pack_at_once(form, buffer, dense, pack)
        else:
            self._requests.append(_Request(Wanted(name, str(form), out, in_), buffer.parts(), dense, pack, buffer.lie_in))
        return buffer

    def stored(self, name: str, form: LinearFormat, out: int, in_: int, load: Callable[[], QuantizedLinear]) -> _native.WeightBuffer:
        """The same for a weight whose checkpoint has it in ``form``: its codes and scales are taken as they are."""
        if (made := self._made.get((name, str(form)))) is not None:
            return made
        buffer = self._made[name, str(form)] = _native.WeightBuffer(form.number, out, in_, form.group, form.zero_points, form.sparse)
        pack = functools.partial(_pack_codes, buffer, self._pool)
        if form.sparse:
            self._pack_at_once(form, buffer, load, pack)
        else:
            self._requests.append(_Request(Wanted(name, str(form), out, in_, as_stored=True), buffer.parts(), load, pack, buffer.lie_in))
        return buffer

    def _pack_at_once(self, form: LinearFormat, buffer: _native.WeightBuffer, load: Callable[[], Any], pack: Callable[[Any], None]) -> None:
        pack(loaded := load())
        release(_numbers(loaded))
        self._at_once += 1
        self._slower |= {form} if slower_than_dense(form, buffer.two_of_four, self._isa) else set()

    def table(self, name: str, weight: Weight) -> "Bits | _native.TableBuffer":
        """Rows of bf16 bits [rows, width] for looking up. Where a checkpoint has them as they are, they stay mapped: few are ever read.
        Others are empty until ``fill``."""
        if self._origin is not None and self._origin.files and weight.dtype == ml_dtypes.bfloat16:
            return _bf16(weight.load())
        if (made := self._tables.get(name)) is not None:
            return made
        rows, width = weight.shape
        table = self._tables[name] = _native.TableBuffer(rows, width)
        room = table.part
        self._requests.append(
            _Request(
                Wanted(name, TABLE, rows, width), [room], weight.load,
                lambda array: np.copyto(room, _bf16(array).reshape(-1).view(np.uint8)),
                lambda file, offsets: table.lie_in(file, offsets[0]),
            )
        )  # fmt: skip
        return table

    @property
    def changed(self) -> bool:
        """Whether the file that the weights were mapped from has been changed since: they are not what they were."""
        return self._mapped is not None and self._mapped.changed

    def settle(self) -> None:
        """Wait until nothing of them is on its way to other memory or to disk, as whoever measures must."""
        if self._mapped is not None:
            self._mapped.moved()
        if self._written is not None:
            self._written.join()

    def fill(self) -> int:
        """Give every weight its numbers; returns how many had to be packed.

        Raises what ``dense`` raises; whatever is wrong with the cache is at most a line on stderr."""
        requests, self._requests = self._requests, []
        if not requests and self._filled:  # all is there since another tape was compiled
            return 0
        self._filled = True
        for form in sorted(self._slower, key=str):
            _LOG.warning("hasten: %s", advice(form))
        if self._cache is None or self._origin is None:
            return self._at_once + _pack(requests)
        key = key_of(self._origin, [request.wanted for request in requests], self._isa)
        parts = [request.parts for request in requests]
        if found := self._cache.map(key, _sizes(parts), self._pool):
            self._mapped, offsets = found
            for request, its in zip(requests, offsets, strict=True):
                request.lie_in(self._mapped, its)
            return self._at_once
        whole = self._cache.read(key, parts, self._pool)
        packed = _pack([request for request, found in zip(requests, whole, strict=True) if not found])
        if packed:
            self._written = self._cache.keep(self._model, key, parts)
        return self._at_once + packed


class Stack(Generic[Stacked]):
    """Weights that come stacked in one array, taken one by one in any order; the array is loaded for the first and let go with the last."""

    def __init__(self, load: Callable[[], Stacked], count: int) -> None:
        self._load, self._left = load, count
        self._array: Stacked | None = None
        self._lock = threading.Lock()

    def take(self, index: int) -> Stacked:
        """The weight [out, in] of that number; each is taken once."""
        with self._lock:
            array = self._load() if self._array is None else self._array
            self._left -= 1
            self._array = array if self._left else None
        return cast(Stacked, array[index])


def _pack_bits(buffer: _native.WeightBuffer, pool: _native.ThreadPool, bits: Callable[[Array], Bits | Floats], array: Array) -> None:
    buffer.pack(pool, bits(array))


def _pack_codes(buffer: _native.WeightBuffer, pool: _native.ThreadPool, its: QuantizedLinear) -> None:
    if its.scales is None:
        buffer.pack(pool, _bf16(its.q))
        return
    zeros = None if its.zeros is None else np.ascontiguousarray(its.zeros, np.int8)
    codebook = np.ascontiguousarray(its.codebook, np.int8) if isinstance(its, ClusteredLinear) else None
    buffer.pack_codes(pool, np.ascontiguousarray(its.q).view(np.int8), np.ascontiguousarray(its.scales, np.float32), zeros, codebook)


def _clustered(form: LinearFormat, dense: Callable[[], Array]) -> QuantizedLinear:
    return form.quantize(dense())


def _pack(requests: Sequence[_Request]) -> int:
    for request, loaded in zip(requests, _ahead([request.load for request in requests])):
        request.pack(loaded)
        release(_numbers(loaded))  # of a mapped file: they are not read again
    return len(requests)


def _numbers(loaded: Any) -> Array:
    return loaded.q if isinstance(loaded, QuantizedLinear) else loaded


def _ahead(loads: Sequence[Callable[[], Any]], threads: int = 2) -> Iterator[Any]:
    """What each returns, in order; the next ones are made, or on their way from disk, meanwhile."""
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads) as executor:
        for load in loads:
            waiting.append(executor.submit(_fetched, load))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _fetched(load: Callable[[], Any]) -> Any:
    loaded = load()
    array = _numbers(loaded)
    if array.flags.c_contiguous:  # a transposed one is copied whole later
        _native.will_need(array.reshape(-1).view(np.uint8))
    return loaded


def _bf16(array: Array) -> Bits:
    """The bits of an array rounded to bfloat16, row-major."""
    if array.dtype != ml_dtypes.bfloat16:
        array = array.astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(array).view(np.uint16)


def _floats(array: Array) -> Floats:
    return np.ascontiguousarray(array, np.float32)


# --- the files


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A file of the cache. ``header`` is None where it cannot be read."""

    path: Path
    size: int
    used: float  # seconds since 1970
    header: Header | None


class PackedCache:
    """Files of packed weights in ``directory``, of at most ``limit`` bytes together; those longest unused make room for new ones.
    A limit of 0 turns it off.

    Nothing here raises for a file or a disk: what fails is logged in one line, and the weights are packed anew."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit

    @classmethod
    def of_user(cls) -> "PackedCache | None":
        """The one the environment describes, or None for a user without a home. Raises ConfigError for a malformed size."""
        directory, limit = settings.cache_directory(), settings.cache_limit()
        return None if directory is None else cls(directory / "packed", limit)

    def map(
        self, key: Key, sizes: Sequence[Sequence[int]], pool: _native.ThreadPool
    ) -> "tuple[_native.MappedFile, list[list[int]]] | None":
        """The key's file and where the parts of each weight, of these sizes, lie in it; None where it must be read, for it is not in
        memory, or packed, for it is not sound: `read` tells."""
        path = self.directory / key.file_name
        with contextlib.suppress(OSError), open(path, "rb") as file:
            header = _read_header(file)
            if header is None or not header.holds(key, sizes):
                return None
            mapped = _native.MappedFile(file.fileno(), os.fstat(file.fileno()).st_size)
            if mapped.resident:
                parts = [part for each in header.parts for part in each]
                extents, digests = [(part.offset, part.size) for part in parts], [part.digest for part in parts]
                if mapped.digests(pool, extents) == digests:
                    mapped.move(extents, digests)
                    with contextlib.suppress(OSError):
                        os.utime(path)  # its last use
                    return mapped, [[part.offset for part in each] for each in header.parts]
        return None

    def read(self, key: Key, parts: Sequence[Sequence[Room]], pool: _native.ThreadPool) -> list[bool]:
        """Fill the parts of each of the key's weights; False for those that must be packed.

        A file that is damaged is removed, and a line on stderr says so."""
        path = self.directory / key.file_name
        whole = [False] * len(parts)
        try:
            with open(path, "rb") as file:
                header = _read_header(file)
                if header is None or not header.holds(key, _sizes(parts)):
                    self._drop(path, "is damaged or cut short")
                    return whole
                _will_need(file)
                for index, (rooms, stored) in enumerate(zip(parts, header.parts, strict=True)):
                    digests = [_native.read_stored(pool, file.fileno(), part.offset, room) for room, part in zip(rooms, stored)]
                    whole[index] = digests == [part.digest for part in stored]
            if not all(whole):
                self._drop(path, "does not have the digest it was written with")
            else:
                with contextlib.suppress(OSError):
                    os.utime(path)  # its last use
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass  # whoever then tries to write says what is wrong
        except OSError as error:
            _LOG.warning("hasten: packed weights cannot be read (%s: %s); packing anew", path, error.strerror or error)
            return [False] * len(parts)
        return whole

    def keep(self, model: str, key: Key, parts: Sequence[Sequence[Room]]) -> threading.Thread:
        """Write them, in a thread of its own that takes no core from others; the interpreter waits for it at its end."""
        thread = threading.Thread(target=self._write, args=(model, key, parts), name="hasten-packed-cache")
        thread.start()
        return thread

    def kept(self) -> list[Kept]:
        """The files there are, the one used last first."""
        found = []
        for path in self._files(SUFFIX):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                status, header = os.fstat(file.fileno()), _read_header(file)
                found.append(Kept(path, status.st_size, status.st_mtime, header))
        return sorted(found, key=lambda kept: kept.used, reverse=True)

    def clear(self) -> tuple[int, int]:
        """Remove every file; how many, and how many bytes, went."""
        files = size = 0
        for path in [*self._files(SUFFIX), *self._files(PARTIAL)]:
            with contextlib.suppress(OSError):
                there = path.stat().st_size
                path.unlink()
                files, size = files + 1, size + there
        return files, size

    def _write(self, model: str, key: Key, parts: Sequence[Sequence[Room]]) -> None:
        give_way()
        size = _PREAMBLE.size + sum(part + _ALIGNMENT for each in _sizes(parts) for part in each)
        partial = None
        try:
            if not self._make_room(size, model, key.file_name):
                return
            descriptor, partial = tempfile.mkstemp(PARTIAL, ".", self.directory)
            with open(descriptor, "wb") as file:
                _write_file(file, model, key, parts)
            if all(stamp.holds for stamp in key.origin.files):  # else what was packed may be neither the old file nor the new one
                os.replace(partial, self.directory / key.file_name)
        except OSError as error:
            _LOG.warning(
                "hasten: packed weights cannot be kept (%s: %s); the next start packs anew", self.directory, error.strerror or error
            )
        finally:
            if partial is not None:
                with contextlib.suppress(OSError):
                    os.unlink(partial)

    def _make_room(self, size: int, model: str, name: str) -> bool:
        """Remove what was used least recently until file ``name`` of ``size`` bytes is within the bounds; False where it never will be."""
        if size > self.limit:
            _LOG.warning(
                "hasten: packed weights of %s are %s bytes, more than HASTEN_CACHE_SIZE (%s) lets be kept; every start packs anew",
                model, f"{size:,}", f"{self.limit:,}",
            )  # fmt: skip
            return False
        self.directory.mkdir(0o700, parents=True, exist_ok=True)
        for path in self._files(PARTIAL):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - ABANDONED:
                    path.unlink()
        kept = [one for one in self.kept() if one.path.name != name]
        while kept and sum(one.size for one in kept) + size > self.limit:
            with contextlib.suppress(OSError):
                kept.pop().path.unlink()
        free = shutil.disk_usage(self.directory).free
        if free < 2 * size:
            _LOG.warning(
                "hasten: packed weights are not kept: %s has %s bytes left; make room, or set HASTEN_CACHE", self.directory, f"{free:,}"
            )
        return free >= 2 * size

    def _files(self, suffix: str) -> list[Path]:
        try:
            return [path for path in self.directory.iterdir() if path.name.endswith(suffix)]
        except OSError:
            return []

    def _drop(self, path: Path, why: str) -> None:
        _LOG.warning("hasten: the file of packed weights %s %s; removed, packing anew", path, why)
        with contextlib.suppress(OSError):
            path.unlink()


def _sizes(parts: Sequence[Sequence[Room]]) -> list[list[int]]:
    return [[part.nbytes for part in each] for each in parts]


def _write_file(file: BinaryIO, model: str, key: Key, parts: Sequence[Sequence[Room]]) -> None:
    file.write(bytes(_PREAMBLE.size))
    stored = []
    for each in parts:
        places = []
        for part in each:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            places.append(Part(file.tell(), part.nbytes, _native.digest(part)))
            file.write(part.data)
        stored.append(tuple(places))
    header, place = msgspec.msgpack.encode(Header(model, key, tuple(stored))), file.tell()
    file.write(header)
    file.seek(0)
    file.write(_PREAMBLE.pack(_MAGIC, place, len(header), hashlib.blake2b(header, digest_size=32).digest()))


def _read_header(file: BinaryIO) -> Header | None:
    """The header of a whole file, None for any other. Raises OSError."""
    opening = file.read(_PREAMBLE.size)
    if len(opening) != _PREAMBLE.size:
        return None
    magic, place, length, digest = _PREAMBLE.unpack(opening)
    if magic != _MAGIC or length > _HEADER_LIMIT or place + length != os.fstat(file.fileno()).st_size:
        return None
    file.seek(place)
    header = file.read(length)
    if hashlib.blake2b(header, digest_size=32).digest() != digest:
        return None
    try:
        return msgspec.msgpack.decode(header, type=Header)
    except (msgspec.ValidationError, msgspec.DecodeError):  # of another version
        return None


def _will_need(file: BinaryIO) -> None:
    """Let the disk run ahead of the readers."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
