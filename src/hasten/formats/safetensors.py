"""The safetensors file format: a lazy, zero-copy reader and a streaming, atomic writer.

A file is eight bytes of little-endian header length N, N bytes of JSON, then the tensors' bytes, which fill the rest of the file
without gap or overlap. The header maps each name to ``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the
end of the header, and may hold one ``"__metadata__"`` object of strings.
Source: https://github.com/huggingface/safetensors, section "Format".

A file is foreign input. Whatever its bytes are, opening it yields its tensors or one ``CheckpointError``, in time and memory bounded
by the header's length, which is checked before a byte of it is read.
"""

import json
import math
import mmap
import os
import secrets
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, NoReturn

import ml_dtypes
import numpy as np

from hasten.base.errors import CheckpointError, one_line
from hasten.formats.weights import FileStamp

HEADER_LIMIT: Final = 100_000_000
"""Longest header accepted, in bytes; the limit of the reference library."""

TENSOR_LIMIT: Final = 1_000_000
"""Most tensors accepted in one file."""

RANK_LIMIT: Final = 64
"""Most dimensions a NumPy array can have."""

DTYPES: Final[Mapping[str, np.dtype[Any]]] = MappingProxyType({
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
})
"""Element types by their name in the header, in the order in which the reference library ranks them when it lays out a file."""

_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})
_METADATA: Final = "__metadata__"
_INT64_MAX: Final = 2**63 - 1
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

_AGAIN: Final = "download the file again, or save it again with safetensors"
_CONVERT: Final = (
    "take the *.safetensors files of the same model, or, where you trust its author, load it in PyTorch with weights_only=True "
    "and save the state dict with safetensors.torch.save_file"
)

Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""What will be written: dtype and shape of each tensor, by name."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: its bytes are ``file[start:stop]``, row-major, little-endian."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class SafetensorsFile:
    """An open file: its header is checked in full, its tensors are mapped and not read until touched.

    ``entries`` is ordered by position in the file. The mapping lives as long as this object or any array that ``read`` returned.
    Should another process shorten the file in place meanwhile, touching what is gone kills this one (SIGBUS), as with any mapping;
    replacing the file, which is what ``write`` does, is safe.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    stamp: FileStamp
    _bytes: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Map ``path`` and check its header; raises CheckpointError for a file that is missing, damaged or of another format."""
        path = Path(path)
        mapped, stamp = _map(path)
        length = _header_length(path, mapped)
        try:
            header = _parse(path, mapped[8 : 8 + length])
            metadata = _metadata(path, header.pop(_METADATA, {}))
            if len(header) > TENSOR_LIMIT:
                _refuse(path, f"names {len(header)} tensors", f"at most {TENSOR_LIMIT}", "save the model in several files")
            found = [_entry(path, name, value, 8 + length) for name, value in header.items()]
        except RecursionError:
            # Raised while parsing, or while showing in a message what was just deep enough to parse.
            _refuse(path, "has a header nested too deep", "two levels of JSON objects")
        found.sort(key=lambda entry: (entry.start, entry.stop))
        _check_tiling(path, found, 8 + length, len(mapped))
        return cls(path, MappingProxyType({entry.name: entry for entry in found}), MappingProxyType(metadata), stamp, mapped)

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor ``name`` with its dtype and shape, as a view of the mapping; raises CheckpointError for an unknown name.

        The view is writable, its pages copy-on-write: what is written stays in this process, and one ``read`` sees what was written
        through another. A tensor that the file does not align to its element size is a copy, so that every array is aligned.
        """
        entry = self.entries.get(name)
        if entry is None:
            few = ", ".join(one_line(known, 60) for known in list(self.entries)[:3])
            accepted = f"one of its {len(self.entries)} names ({few}{', …' if len(self.entries) > 3 else ''})"
            _refuse(self.path, f"has no tensor {one_line(name)}", accepted, "check that config.json belongs to this file")
        if entry.start == entry.stop:
            return np.empty(entry.shape, entry.dtype)
        count = (entry.stop - entry.start) // entry.dtype.itemsize
        flat = np.frombuffer(self._bytes, dtype=entry.dtype, count=count, offset=entry.start)
        return (flat if flat.flags.aligned else flat.copy()).reshape(entry.shape)


def layout_of(tensors: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> Layout:
    """The layout of arrays already in memory, for ``write(path, layout_of(tensors), tensors.__getitem__, metadata)``."""
    return {name: (array.dtype, array.shape) for name, array in tensors.items()}


def write(
    path: Path,
    layout: Layout,
    load: Callable[[str], np.ndarray[Any, np.dtype[Any]]],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write one file, holding one tensor at a time in memory.

    ``load(name)`` is called once for each name of ``layout``, in the order of the file (widest elements first, then by name, as the
    reference library does), and must return an array of the dtype and shape promised; it need not be contiguous.
    ``path`` appears, or is replaced, only once every byte is on disk: an exception, from ``load`` or the disk, leaves it as it was.
    Other readers of the file (transformers) want ``metadata={"format": "pt"}``.
    Raises CheckpointError for a tensor the format cannot hold, a promise not kept, or a disk that refuses.
    """
    path = Path(path)
    header, order = _header(path, layout, metadata)
    try:
        with _replacing(path) as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for name in order:
                file.write(_raw(path, name, layout[name], load(name)))
    except OSError as error:
        raise _unwritable(path, error) from error


def write_sharded(
    directory: Path,
    layout: Layout,
    load: Callable[[str], np.ndarray[Any, np.dtype[Any]]],
    metadata: Mapping[str, str] = MappingProxyType({}),
    max_shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write a checkpoint in the Hugging Face layout into ``directory``, made if missing; returns the paths of the files.

    One file is named ``model.safetensors``; more are ``model-00001-of-0000N.safetensors`` and an index beside them. Tensors fill the
    files in the order of ``layout``; ``max_shard_bytes`` bounds the tensors of one file, but one larger tensor gets a file of its own.
    All files are complete on disk before the first takes its name, so an exception leaves an older checkpoint as it was. Weight files
    of an older one that the new one does not name are then removed, since a loader might prefer them.
    Raises as ``write`` does.
    """
    directory = Path(directory)
    if max_shard_bytes < 1:
        _refuse(directory, f"max_shard_bytes is {max_shard_bytes}", "at least 1", "leave it out for 5 GB")
    shards = _shards(directory, layout, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    index = directory / "model.safetensors.index.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".model.partial-", dir=directory) as staging:
            for name, shard in zip(names, shards, strict=True):
                write(Path(staging) / name, shard, load, metadata)
            # A crash between two renames must leave a checkpoint that is plainly incomplete, never an index over old and new files.
            for misleading in (index, *([] if len(shards) == 1 else [directory / "model.safetensors"])):
                misleading.unlink(missing_ok=True)
            for name in names:
                os.replace(Path(staging) / name, directory / name)
        if len(shards) > 1:
            total = sum(_nbytes(*described) for described in layout.values())
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            with _replacing(index) as file:
                text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
                file.write((text + "\n").encode())
        for stale in {*directory.glob("model-[0-9]*-of-[0-9]*.safetensors")} - {directory / name for name in names}:
            stale.unlink()
        _sync(directory)
    except OSError as error:
        raise _unwritable(directory, error) from error
    return [directory / name for name in names]


def _plain(value: object) -> str:
    """A path or an error's text, as it is where that fits one line."""
    return str(value) if str(value).isprintable() else one_line(str(value), 4096)


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{_plain(path)}: cannot be written: {_plain(error)}; make room, or choose a directory that can be written")


def _refuse(path: Path, found: str, accepted: str, remedy: str = _AGAIN) -> NoReturn:
    raise CheckpointError(f"{_plain(path)}: {found}; accepted: {accepted}; {remedy}")


def _map(path: Path) -> tuple[mmap.mmap, FileStamp]:
    """The whole file as private, copy-on-write pages, none of them read yet, and what file it is."""
    try:
        status = os.stat(path)
        mode, size = status.st_mode, status.st_size
        # Opening a named pipe would wait for its writer, so the kind is asked first.
        if stat.S_ISREG(mode) and size >= 8:
            with open(path, "rb") as file:
                stamp = FileStamp.of(path, os.fstat(file.fileno()))
                return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), stamp
    except (OSError, ValueError) as error:
        reason = _plain(getattr(error, "strerror", None) or error)
        _refuse(path, f"cannot be opened ({reason})", "a readable .safetensors file", "check the path and its permissions")
    if not stat.S_ISREG(mode):
        kind = "directory" if stat.S_ISDIR(mode) else "device, pipe or socket"
        _refuse(path, f"is a {kind}", "a .safetensors file", "name the file itself")
    _refuse(path, f"is {size} bytes long", "a safetensors file, which starts with an 8-byte header length")


def _header_length(path: Path, mapped: mmap.mmap) -> int:
    length = int.from_bytes(mapped[:8], "little")
    if length <= min(HEADER_LIMIT, len(mapped) - 8) and mapped[8:9] == b"{":
        return length
    # Only a file that cannot be safetensors is tested for what else it is: a good header length may look like a pickle's first bytes.
    start = mapped[:24]
    if start.startswith(_PICKLES):
        _refuse(path, "is a Python pickle (a PyTorch .bin or .pt file), which can run code and is never loaded", "safetensors", _CONVERT)
    if start.startswith(b"version https://git-lfs"):
        _refuse(path, "is a Git LFS pointer, not the weights", "safetensors", "run `git lfs pull`, or download the file itself")
    if start.startswith(b"GGUF"):
        _refuse(path, "is a GGUF file", "safetensors", "name it as a .gguf file")
    if length > HEADER_LIMIT:
        _refuse(path, f"gives its header length as {length} bytes", f"at most {HEADER_LIMIT}")
    if length > len(mapped) - 8:
        _refuse(path, f"gives its header length as {length} bytes", f"at most the {len(mapped) - 8} that follow in the file")
    _refuse(path, f"has a header that begins with {one_line(mapped[8:9])}", "'{', the start of a JSON object")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    # An empty JSON array takes 2 bytes here and 30 times as many once parsed; a header within the limits has three brackets a tensor.
    if raw.count(b"[") + raw.count(b"{") > 4 * TENSOR_LIMIT:
        _refuse(path, "has a header with more brackets than any header of that many tensors", f"at most {TENSOR_LIMIT} tensors")
    try:
        header: dict[str, Any] = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except ValueError as error:
        _refuse(path, f"has a damaged header ({_plain(error)})", "one UTF-8 JSON object")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {one_line(twice)}")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        _refuse(path, f"has {_METADATA} {one_line(value)}", "an object of strings")
    for text in (*value, *value.values()):
        _check_text(path, text)
    return value


def _check_text(path: Path, text: str) -> None:
    # JSON can escape half of a surrogate pair, which no UTF-8 file, terminal or socket could carry further.
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        _refuse(path, f"has the text {one_line(text)} in its header", "text that UTF-8 can hold")


def _entry(path: Path, name: str, value: object, data: int) -> TensorEntry:
    """One checked entry; ``data`` is where the tensors' bytes begin in the file."""
    _check_text(path, name)
    tensor = f"has tensor {one_line(name)} with"
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        _refuse(path, f"{tensor} the entry {one_line(value)}", "an object of dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        _refuse(path, f"{tensor} dtype {one_line(value['dtype'])}", ", ".join(DTYPES), "convert the tensor to one of these")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape) or len(shape) > RANK_LIMIT or math.prod(n or 1 for n in shape) * dtype.itemsize > _INT64_MAX:
        _refuse(path, f"{tensor} shape {one_line(shape)}", f"at most {RANK_LIMIT} integers from 0, in all less than 2**63 bytes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"{tensor} data_offsets {one_line(offsets)}", "[begin, end] with 0 <= begin <= end")
    if offsets[1] - offsets[0] != _nbytes(dtype, shape):
        size = f"{offsets[1] - offsets[0]} bytes"
        _refuse(path, f"{tensor} {size}", f"{_nbytes(dtype, shape)}, which its shape {one_line(shape)} and dtype {value['dtype']} take")
    return TensorEntry(name, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _sizes(value: object) -> bool:
    # An isinstance test would let true and false pass for 1 and 0.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _INT64_MAX for item in value)


def _nbytes(dtype: np.dtype[Any], shape: tuple[int, ...] | list[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _check_tiling(path: Path, entries: list[TensorEntry], data: int, size: int) -> None:
    """The tensors, sorted by position, must fill ``file[data:size]`` exactly."""
    end = data
    for entry in entries:
        if entry.stop > size:
            lacking = f"ends at byte {size}, but tensor {one_line(entry.name)} reaches to {entry.stop}: it is truncated"
            _refuse(path, lacking, "a whole file", "download the file again")
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else f"leaves a gap of {entry.start - end} bytes before it"
            _refuse(path, f"has tensor {one_line(entry.name)}, which {fault}", "tensors that follow one another without gap or overlap")
        end = entry.stop
    if end != size:
        _refuse(path, f"has {size - end} bytes after its last tensor", "none")


def _header(path: Path, layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The JSON header, padded so that the tensors start on a multiple of 8 bytes, and the names in file order."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    if len(layout) > TENSOR_LIMIT:
        _refuse(path, f"would hold {len(layout)} tensors", f"at most {TENSOR_LIMIT}", "save the model in several files")
    for name, (dtype, shape) in layout.items():
        if name == _METADATA:
            _refuse(path, f"cannot hold a tensor named {_METADATA!r}", "any other name", "rename the tensor")
        if dtype not in spelled:
            held = f"cannot hold tensor {one_line(name)} of dtype {one_line(str(dtype))}"
            _refuse(path, held, ", ".join(DTYPES), "convert the tensor to one of these")
        if not _sizes(list(shape)):
            _refuse(path, f"cannot hold tensor {one_line(name)} of shape {one_line(shape)}", "integers from 0", "mend the shape")
    order = sorted(layout, key=lambda name: (-ranks[layout[name][0]], name))
    header: dict[str, Any] = {_METADATA: dict(sorted(_metadata(path, dict(metadata)).items()))} if metadata else {}
    end = 0
    for name in order:
        _check_text(path, name)
        dtype, shape = layout[name]
        begin, end = end, end + _nbytes(dtype, shape)
        header[name] = {"dtype": spelled[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > HEADER_LIMIT:
        _refuse(path, f"would have a header of {len(raw)} bytes", f"at most {HEADER_LIMIT}", "save the model in several files")
    return raw, order


def _raw(path: Path, name: str, promised: tuple[np.dtype[Any], tuple[int, ...]], array: np.ndarray[Any, np.dtype[Any]]) -> memoryview:
    dtype, shape = promised
    if array.dtype != dtype or array.shape != tuple(shape):
        found = f"was given tensor {one_line(name)} as {array.dtype} {array.shape}"
        _refuse(path, found, f"{dtype} {tuple(shape)}, which its header says", "make the layout and the loader agree")
    # NumPy lends no buffer of an ml_dtypes array, so every array goes out as plain bytes.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _shards(directory: Path, layout: Layout, max_shard_bytes: int) -> list[Layout]:
    shards: list[dict[str, tuple[np.dtype[Any], tuple[int, ...]]]] = [{}]
    room = max_shard_bytes
    for name, (dtype, shape) in layout.items():
        size = _nbytes(dtype, shape)
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = (dtype, shape)
        room -= size
    if len(shards) > 99_999:
        _refuse(directory, f"would need {len(shards)} files", "at most 99999", "raise max_shard_bytes")
    return list(shards)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name ``path`` once the block ends well and its bytes are on disk, and otherwise vanishes."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        # Opened by name and not through tempfile, whose files only their owner may read.
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """Make renames in ``directory`` survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
