"""The GGUF file format, version 3: a lazy, zero-copy reader.

A file is "GGUF", a version, the numbers of tensors and of metadata entries, the entries (name, type, value), then of each tensor its name,
dimensions (the fastest first), type and offset, and from the next multiple of the alignment on, the tensors' bytes.
Source: https://github.com/ggml-org/ggml, docs/gguf.md.

A file is foreign input: opening it yields its tensors or one CheckpointError, in time and memory bounded by the header's length."""

import math
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import CheckpointError, one_line
from hasten.formats.weights import FileStamp

HEADER_LIMIT: Final = 256 << 20
"""Most bytes of metadata and tensor names that are read; a vocabulary of 262,144 tokens takes about a twentieth."""
COUNT_LIMIT: Final = 1_000_000
"""Most tensors, entries, and strings of one list."""
RANK_LIMIT: Final = 4
ARRAY, STRING, BOOL = 9, 8, 7
SCALARS: Final[Mapping[int, np.dtype[Any]]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"), 5: np.dtype("<i4"),
    6: np.dtype("<f4"), BOOL: np.dtype("<u1"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorType:
    """``size`` bytes hold ``count`` numbers that lie one after the other."""

    name: str
    count: int
    size: int


TYPES: Final[Mapping[int, TensorType]] = {
    0: TensorType("F32", 1, 4), 1: TensorType("F16", 1, 2), 2: TensorType("Q4_0", 32, 18), 8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144), 13: TensorType("Q5_K", 256, 176), 14: TensorType("Q6_K", 256, 210), 30: TensorType("BF16", 1, 2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor of ``shape`` (row-major, the fastest axis last) lies: bytes [start, stop) of the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """An open file: its header is checked in full, its tensors are mapped and not read until touched. ``metadata`` has numbers, strings,
    booleans, numpy arrays of numbers, and lists of strings."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    stamp: FileStamp
    _bytes: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Map ``path`` and check its header. Raises CheckpointError for a file that is missing, damaged, or of another format."""
        mapped, stamp = _map(Path(path))
        reader = _Reader(Path(path), mapped)
        metadata, infos = reader.header()
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            reader.refuse(f"has alignment {one_line(alignment)}", "a power of two up to 1,048,576")
        begin = -(-reader.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in infos:
            size = math.prod(shape) // kind.count * kind.size
            if offset % alignment or begin + offset + size > len(mapped):
                reader.refuse(
                    f"has tensor {one_line(name, 60)} at bytes {offset} to {offset + size} of its data",
                    f"a multiple of {alignment}, within the {max(0, len(mapped) - begin)} bytes there are",
                )
            if name in tensors:
                reader.refuse(f"has tensor {one_line(name, 60)} twice", "each once")
            tensors[name] = GgufTensor(name, kind, shape, begin + offset, begin + offset + size)
        return cls(Path(path), metadata, tensors, stamp, mapped)

    def read(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, as a view of the file."""
        tensor = self.tensors[name]
        return np.frombuffer(self._bytes, np.uint8, tensor.stop - tensor.start, tensor.start)


def _map(path: Path) -> tuple[mmap.mmap, FileStamp]:
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size >= 24:
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), FileStamp.of(path, os.fstat(file.fileno()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened ({one_line(str(error), 100)}); check the path and its permissions") from None
    raise CheckpointError(f"{path} is no file of at least 24 bytes, which a GGUF header takes; download it again")


class _Reader:
    """A position in the header; every length is checked before anything of it is read."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.bytes, self.at = path, mapped, 0
        self.end = min(len(mapped), HEADER_LIMIT)

    def refuse(self, what: str, accepted: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {what}; accepted: {accepted}; download the file again")

    def header(self) -> tuple[dict[str, Any], list[tuple[str, TensorType, tuple[int, ...], int]]]:
        if self.take(4) != b"GGUF":
            self.refuse("does not begin with 'GGUF'", "a GGUF file")
        if (version := self.number("<I")) not in {2, 3}:
            self.refuse(f"has version {version}", "2 or 3, little-endian")
        tensors, entries = self.count("tensors"), self.count("metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string("a metadata name")
            metadata[key] = self.value(self.number("<I"), key)
        return metadata, [self.info() for _ in range(tensors)]

    def info(self) -> tuple[str, TensorType, tuple[int, ...], int]:
        name, rank = self.string("a tensor's name"), self.number("<I")
        if not 1 <= rank <= RANK_LIMIT:
            self.refuse(f"has tensor {one_line(name, 60)} of {rank} dimensions", f"1 to {RANK_LIMIT}")
        sizes = [self.number("<Q") for _ in range(rank)]
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in TYPES:
            names = ", ".join(each.name for each in TYPES.values())
            self.refuse(f"has tensor {one_line(name, 60)} of type {kind}", f"{names}")
        if math.prod(sizes) > 1 << 50 or min(sizes) < 1 or sizes[0] % TYPES[kind].count:
            self.refuse(f"has tensor {one_line(name, 60)} of {sizes} numbers", f"rows of whole blocks of {TYPES[kind].count}")
        return name, TYPES[kind], tuple(reversed(sizes)), offset

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            inner = self.number("<I")
            count = self.number("<Q")
            if inner == STRING:
                if count > COUNT_LIMIT:
                    self.refuse(f"has {count} strings in {one_line(key, 60)}", f"at most {COUNT_LIMIT}")
                return [self.string(key) for _ in range(count)]
            if inner not in SCALARS:
                self.refuse(f"has a list of type {inner} in {one_line(key, 60)}", "numbers, booleans and strings")
            if count > self.end:
                self.refuse(f"has {count} numbers in {one_line(key, 60)}", f"what fits into {self.end} bytes")
            return np.frombuffer(self.take(count * SCALARS[inner].itemsize), SCALARS[inner])
        if kind not in SCALARS:
            self.refuse(f"has type {kind} in {one_line(key, 60)}", f"{', '.join(map(str, sorted({*SCALARS, STRING, ARRAY})))}")
        scalar = np.frombuffer(self.take(SCALARS[kind].itemsize), SCALARS[kind])[0].item()
        return bool(scalar) if kind == BOOL else scalar

    def string(self, what: str) -> str:
        length = self.number("<Q")
        if length > self.end:
            self.refuse(f"has {length} bytes in {one_line(what, 60)}", f"what fits into {self.end}")
        return self.take(length).decode("utf-8", "surrogateescape")

    def count(self, what: str) -> int:
        found = self.number("<Q")
        if found > COUNT_LIMIT:
            self.refuse(f"has {found} {what}", f"at most {COUNT_LIMIT}")
        return found

    def number(self, kind: str) -> int:
        (found,) = struct.unpack(kind, self.take(struct.calcsize(kind)))
        return int(found)

    def take(self, size: int) -> bytes:
        if self.at + size > self.end:
            self.refuse(f"ends inside its header, at byte {self.end}", f"a whole file with a header of at most {HEADER_LIMIT} bytes")
        self.at += size
        return self.bytes[self.at - size : self.at]
