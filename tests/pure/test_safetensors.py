"""The safetensors reader and writer, against the `safetensors` library, damaged files, and promises about memory and the disk."""

import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save as library_save

from hasten.base.errors import CheckpointError
from hasten.formats.safetensors import DTYPES, HEADER_LIMIT, SafetensorsFile, layout_of, write, write_sharded

# What the library's header says of a dtype; its own names for ml_dtypes arrays are the arrays' names.
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(path, tensors, metadata=None):
    write(path, layout_of(tensors), tensors.__getitem__, metadata or {})


def bits(array):
    return (array.dtype, array.shape, array.tobytes())


def file_of(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def refusal(path: Path, content: bytes) -> str:
    """The message with which `content` is refused: one line that names the file."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert message.startswith(str(path))
    return message


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    count = int(np.prod(shape, dtype=int))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype == np.bool_:
        raw = bytes(byte & 1 for byte in raw)
    return np.frombuffer(raw, dtype).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
checkpoints = st.dictionaries(names, arrays(), max_size=6)
texts = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=3)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(tensors=checkpoints, metadata=texts)
def test_what_the_library_writes_is_read_equal(tmp_path, tensors, metadata):
    path = tmp_path / "theirs.safetensors"
    # Of metadata without tensors the library (0.8.0) makes a header that it cannot read either.
    metadata = metadata if tensors else {}
    path.write_bytes(library_save(tensors, metadata or None))
    ours = SafetensorsFile.open(path)
    assert dict(ours.metadata) == metadata
    assert {name: bits(ours.read(name)) for name in ours.entries} == {name: bits(array) for name, array in tensors.items()}
    assert all(ours.entries[name].dtype == array.dtype for name, array in tensors.items())


@many
@given(tensors=checkpoints, metadata=texts)
def test_what_we_write_is_read_equal_by_the_library(tmp_path, tensors, metadata):
    path = tmp_path / "ours.safetensors"
    save(path, tensors, metadata)
    theirs = {name: (found["dtype"], tuple(found["shape"]), bytes(found["data"])) for name, found in deserialize(path.read_bytes())}
    assert theirs == {name: (NAMES[array.dtype], array.shape, array.tobytes()) for name, array in tensors.items()}
    with safe_open(path, framework="np") as opened:
        assert (opened.metadata() or {}) == metadata


@many
@given(tensors=checkpoints)
def test_the_file_is_laid_out_as_the_library_lays_it_out(tmp_path, tensors):
    path, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save(path, tensors)
    theirs.write_bytes(library_save(tensors))
    assert list(SafetensorsFile.open(path).entries.values()) == list(SafetensorsFile.open(theirs).entries.values())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_goes_both_ways(tmp_path, name):
    raw = bytes([0, 1] * 24) if name == "BOOL" else bytes(range(48))
    array = np.frombuffer(raw, DTYPES[name]).reshape(2, -1)
    save(tmp_path / "ours.safetensors", {"x": array})
    (found,) = deserialize((tmp_path / "ours.safetensors").read_bytes())
    assert (found[0], found[1]["dtype"], bytes(found[1]["data"])) == ("x", name, raw)
    (tmp_path / "theirs.safetensors").write_bytes(library_save({"x": array}))
    assert bits(SafetensorsFile.open(tmp_path / "theirs.safetensors").read("x")) == bits(array)


def test_a_file_of_no_tensors(tmp_path):
    for metadata in ({}, {"format": "pt"}):
        save(tmp_path / "x.safetensors", {}, metadata)
        opened = SafetensorsFile.open(tmp_path / "x.safetensors")
        assert (dict(opened.entries), dict(opened.metadata)) == ({}, metadata)


def test_an_array_that_is_not_contiguous_is_written_in_its_order(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    save(tmp_path / "x.safetensors", {"x": array})
    assert bits(SafetensorsFile.open(tmp_path / "x.safetensors").read("x")) == bits(array)


# --- Damaged and foreign files ---

ENTRY = json.dumps(entry()).encode()

DAMAGED = {
    "header not UTF-8": (file_of(b'{"a\xff": 1}'), "damaged header"),
    "header not JSON": (file_of(b'{"a": }'), "damaged header"),
    "header ends early": (file_of(b'{"a": {"dtype": "F32"'), "damaged header"),
    "text after the object": (file_of(b"{} {}"), "damaged header"),
    "not an object": (file_of(b"[1, 2]"), "begins with b'['"),
    "leading space": (file_of(b" {}"), "begins with b' '"),
    "empty header": (file_of(b""), "begins with b''"),
    "zeros": (bytes(4096), "begins with b'\\x00'"),
    "duplicate tensor": (file_of(b'{"a": %s, "a": %s}' % (ENTRY, ENTRY), bytes(8)), "duplicate key 'a'"),
    "duplicate field": (file_of(b'{"a": %s, "dtype": "I32"}}' % ENTRY[:-1], bytes(8)), "duplicate key 'dtype'"),
    "NaN": (file_of(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)), "NaN is not JSON"),
    "Infinity": (file_of(b'{"a": {"dtype": "F32", "shape": [-Infinity], "data_offsets": [0, 8]}}', bytes(8)), "-Infinity is not JSON"),
    "number of 5000 digits": (file_of(b'{"a": ' + b"1" * 5000 + b"}"), "damaged header"),
    "deep arrays": (file_of(b'{"a":' + b"[" * 200_000), "nested too deep"),
    "deep objects": (file_of(b'{"a":' * 200_000), "nested too deep"),
    "half a surrogate pair": (file_of(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)), "UTF-8 can hold"),
    "half a pair in metadata": (file_of(b'{"__metadata__": {"a": "\\udfff"}}'), "UTF-8 can hold"),
    "metadata not an object": (file_of({"__metadata__": ["a"]}), "an object of strings"),
    "metadata not strings": (file_of({"__metadata__": {"a": 1}}), "an object of strings"),
    "entry not an object": (file_of({"a": 1}), "with the entry 1"),
    "entry lacks a field": (file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "dtype, shape and data_offsets"),
    "entry has another field": (file_of({"a": entry(strides=[1])}, bytes(8)), "dtype, shape and data_offsets"),
    "unknown dtype": (file_of({"a": entry("F8_E8M0")}, bytes(8)), "dtype 'F8_E8M0'; accepted: BOOL, U8"),
    "dtype in lower case": (file_of({"a": entry("f32")}, bytes(8)), "dtype 'f32'"),
    "dtype not a string": (file_of({"a": entry(["F32"])}, bytes(8)), "dtype ['F32']"),
    "negative size": (file_of({"a": entry(shape=[-2])}, bytes(8)), "shape [-2]"),
    "size is a fraction": (file_of({"a": entry(shape=[2.0])}, bytes(8)), "shape [2.0]"),
    "size is a bool": (file_of({"a": entry(shape=[2, True])}, bytes(8)), "shape [2, True]"),
    "size is a string": (file_of({"a": entry(shape=["2"])}, bytes(8)), "shape ['2']"),
    "shape is a number": (file_of({"a": {**entry(), "shape": 2}}, bytes(8)), "shape 2"),
    "product overflows": (file_of({"a": entry(shape=[2**32, 2**32])}, bytes(8)), "less than 2**63 bytes"),
    "product overflows to the right size": (file_of({"a": entry("U8", [2**32 + 1, 2**32 - 1, 2**62], [0, 0])}), "less than 2**63 bytes"),
    "product overflows beside a zero": (file_of({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "less than 2**63 bytes"),
    "size beyond 64 bits": (file_of({"a": entry(shape=[0, 2**80], offsets=[0, 0])}), "less than 2**63 bytes"),
    "65 dimensions": (file_of({"a": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)), "at most 64 integers"),
    "begin beyond end": (file_of({"a": entry(offsets=[8, 0])}, bytes(8)), "data_offsets [8, 0]"),
    "negative offset": (file_of({"a": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets [-8, 0]"),
    "offset is a bool": (file_of({"a": entry("U8", [1], [False, True])}, bytes(1)), "data_offsets [False, True]"),
    "three offsets": (file_of({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "data_offsets [0, 4, 8]"),
    "offset beyond 64 bits": (file_of({"a": entry(offsets=[2**70, 2**70 + 8])}, bytes(8)), "data_offsets"),
    "truncated": (file_of({"a": entry()}, bytes(7)), "it is truncated"),
    "far beyond the file": (file_of({"a": entry(offsets=[2**60, 2**60 + 8])}, bytes(8)), "it is truncated"),
    "size is not the shape's": (file_of({"a": entry(shape=[3])}, bytes(8)), "with 8 bytes; accepted: 12"),
    "size is not the dtype's": (file_of({"a": entry("F64")}, bytes(8)), "with 8 bytes; accepted: 16"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "'b', which overlaps"),
    "same place twice": (file_of({"a": entry(), "b": entry("I32")}, bytes(8)), "'b', which overlaps"),
    "gap": (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "a gap of 4 bytes"),
    "gap at the start": (file_of({"a": entry(offsets=[8, 16])}, bytes(16)), "a gap of 8 bytes"),
    "empty tensor inside another": (file_of({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, bytes(8)), "'b', which overlaps"),
    "trailing bytes": (file_of({"a": entry()}, bytes(9)), "1 bytes after its last tensor"),
    "trailing bytes and no tensor": (file_of({}, bytes(9)), "9 bytes after its last tensor"),
    "too short": (b"\x02\0\0\0\0\0\0", "7 bytes long"),
    "empty": (b"", "0 bytes long"),
    "header beyond the file": (file_of({}, length=3), "at most the 2 that follow"),
    "header over the limit": (file_of({}, length=HEADER_LIMIT + 1), f"at most {HEADER_LIMIT}"),
    "header of 2**64 - 1": (file_of({}, length=2**64 - 1), f"at most {HEADER_LIMIT}"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF file"),
}


@pytest.mark.row("model files", "damaged headers")
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_with_its_reason(tmp_path, case):
    content, reason = DAMAGED[case]
    assert reason in refusal(tmp_path / "x.safetensors", content)


@pytest.mark.row("model files", "no pickles")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_named_and_not_loaded(tmp_path, protocol):
    class Canary:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    message = refusal(tmp_path / "pytorch_model.bin", pickle.dumps(Canary(), protocol))
    assert "never loaded" in message
    assert "weights_only=True" in message
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Canary(), protocol))
    assert "never loaded" in refusal(tmp_path / "model.pt", (tmp_path / "model.pt").read_bytes())
    assert not (tmp_path / "ran").exists()


def test_a_header_length_that_looks_like_a_pickle_is_fine(tmp_path):
    raw = b"{}".ljust(0x0280)
    (tmp_path / "x.safetensors").write_bytes(file_of(raw))
    assert (tmp_path / "x.safetensors").read_bytes().startswith(b"\x80\x02")
    assert dict(SafetensorsFile.open(tmp_path / "x.safetensors").entries) == {}


def test_a_path_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    reasons = {"": "directory", "missing": "No such file", "dangling": "No such file", "pipe": "pipe", "nul\0": "null byte"}
    for name, reason in reasons.items():
        with pytest.raises(CheckpointError, match=reason) as caught:
            SafetensorsFile.open(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_message_stays_one_line_whatever_the_names(tmp_path):
    message = refusal(tmp_path / "x.safetensors", file_of({"a\nb\u2028" + "c" * 10_000: entry("F4\n")}, bytes(8)))
    assert message.isprintable()
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile.open(tmp_path / "two\nlines")
    assert str(caught.value).isprintable()


def test_an_unknown_name_is_refused(tmp_path):
    save(tmp_path / "x.safetensors", {"known": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"no tensor 'unknown'.*'known'"):
        SafetensorsFile.open(tmp_path / "x.safetensors").read("unknown")


@pytest.mark.row("model files", "many entries")
def test_too_many_tensors_are_refused_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr("hasten.formats.safetensors.TENSOR_LIMIT", 10)
    header = {str(i): entry(shape=[0], offsets=[0, 0]) for i in range(11)}
    assert "11 tensors" in refusal(tmp_path / "x.safetensors", file_of(header))
    assert "more brackets" in refusal(tmp_path / "x.safetensors", file_of({"a": [[]] * 50}))
    with pytest.raises(CheckpointError, match="at most 10"):
        write(tmp_path / "y.safetensors", dict.fromkeys(header, (DTYPES["U8"], (0,))), lambda name: np.empty(0, np.uint8))


@pytest.mark.row("model files", "many entries")
def test_a_hundred_thousand_tensors_open_in_seconds(tmp_path):
    header = {f"model.layers.{i}.weight": entry("U8", [1], [i, i + 1]) for i in range(100_000)}
    (tmp_path / "x.safetensors").write_bytes(file_of(header, bytes(100_000)))
    begun = time.monotonic()
    assert len(SafetensorsFile.open(tmp_path / "x.safetensors").entries) == 100_000
    assert time.monotonic() - begun < 10


@pytest.mark.row("model files", "fuzzed headers")
def test_mutated_headers_open_or_are_refused_and_nothing_else(tmp_path):
    tensors = {f"layer.{i}.é": np.arange(6, dtype=np.float32).reshape(2, 3) for i in range(4)}
    tensors |= {"flag": np.array([True]), "scalar": np.float64(1).reshape(()), "none": np.empty((0, 3), np.int8)}
    path = tmp_path / "x.safetensors"
    save(path, tensors, {"format": "pt"})
    valid = path.read_bytes()
    header = 8 + int.from_bytes(valid[:8], "little")
    rng = random.Random(0)
    alphabet = b'{}[]",:0123456789-.eE\\u \x00\xff' + bytes(range(256))
    opened, messages = 0, []
    slowest = 0.0
    for _ in range(4000):
        content = bytearray(valid)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            at = rng.randrange(header)
            match rng.randrange(6):
                case 0 | 1:
                    content[at] = rng.choice(alphabet)
                case 2:
                    content[at] ^= 1 << rng.randrange(8)
                case 3:
                    del content[at : at + rng.randrange(1, 8)]
                case 4:
                    content[at:at] = bytes(rng.choice(alphabet) for _ in range(rng.randrange(1, 8)))
                case 5:
                    other = rng.randrange(header)
                    content[at:at] = content[other : other + rng.randrange(1, 60)]
        if rng.random() < 0.5:
            # Half of them reach the JSON: the length is made to fit what became of the header.
            content[:8] = max(0, header - 8 + len(content) - len(valid)).to_bytes(8, "little")
        path.write_bytes(content)
        begun = time.monotonic()
        try:
            found = SafetensorsFile.open(path)
            for name in found.entries:
                found.read(name).tobytes()
            opened += 1
        except CheckpointError as error:
            messages.append(str(error))
        slowest = max(slowest, time.monotonic() - begun)
    assert opened > 50
    assert len(messages) > 1000
    assert all(message.isprintable() for message in messages)
    assert slowest < 2


@pytest.mark.row("model files", "damaged headers")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.fixed_dictionaries({
            "dtype": st.sampled_from([*DTYPES, "F4", "x", 1, None]),
            "shape": st.lists(st.one_of(st.integers(-1, 4), st.sampled_from([2**31, 2**63, True, 1.0, "1", None])), max_size=3),
            "data_offsets": st.lists(st.one_of(st.integers(-1, 32), st.sampled_from([2**63, True, 1.0, None])), min_size=1, max_size=3),
        })
        | st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda leaf: st.lists(leaf, max_size=3)),
    ),
    size=st.integers(0, 32),
)
def test_we_accept_nothing_that_the_library_refuses(tmp_path, header, size):
    content = file_of(header, bytes(size))
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        ours = SafetensorsFile.open(tmp_path / "x.safetensors")
    except CheckpointError:
        return
    try:
        theirs = deserialize(content)
    except SafetensorError as error:
        raise AssertionError(f"accepted what the library refuses: {error}") from error
    assert {name: ours.entries[name].shape for name in ours.entries} == {name: tuple(found["shape"]) for name, found in theirs}


# --- Memory ---


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def sparse(path, dtypes_and_shapes):
    header, end = {}, 0
    for name, (dtype, shape) in dtypes_and_shapes.items():
        begin, end = end, end + int(np.prod(shape)) * DTYPES[dtype].itemsize
        header[name] = entry(dtype, shape, (begin, end))
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(file_of(raw))
    os.truncate(path, 8 + len(raw) + end)


@linux
def test_opening_a_file_of_4_gigabytes_and_reading_one_tensor_touches_only_that(tmp_path):
    sparse(tmp_path / "x.safetensors", {"big": ("BF16", (2**20, 2**11 - 64)), "small": ("F32", (1024, 32))})
    assert (tmp_path / "x.safetensors").stat().st_size > 3_900_000_000
    before = resident()
    opened = SafetensorsFile.open(tmp_path / "x.safetensors")
    assert opened.read("small").sum() == 0
    assert opened.read("big").shape == (2**20, 2**11 - 64)
    assert resident() - before < 8_000_000


@linux
def test_a_view_of_2_gigabytes_is_not_copied(tmp_path):
    sparse(tmp_path / "x.safetensors", {"big": ("F32", (2**19, 2**10))})
    opened = SafetensorsFile.open(tmp_path / "x.safetensors")
    before = resident()
    view = opened.read("big")
    assert np.shares_memory(view, opened.read("big"))
    assert view[::4096, ::512].sum() == 0
    assert resident() - before < 64_000_000


def test_views_outlive_the_file_object_and_its_name(tmp_path):
    save(tmp_path / "x.safetensors", {"a": np.arange(5, dtype=np.int64)})
    view = SafetensorsFile.open(tmp_path / "x.safetensors").read("a")
    (tmp_path / "x.safetensors").unlink()
    assert view.tolist() == [0, 1, 2, 3, 4]


def test_a_view_is_writable_and_the_file_never_changes(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, {"a": np.arange(5, dtype=np.int64)})
    content = path.read_bytes()
    view = SafetensorsFile.open(path).read("a")
    assert view.flags.writeable
    view[:] = 7
    assert path.read_bytes() == content
    assert SafetensorsFile.open(path).read("a").tolist() == [0, 1, 2, 3, 4]


def test_tensors_the_file_does_not_align_are_read_aligned(tmp_path):
    given = {"bytes": ("U8", 3), "wide": ("F64", 5), "half": ("BF16", 3)}
    arrays = {name: np.arange(count).astype(DTYPES[dtype]) for name, (dtype, count) in given.items()}
    for pad in range(8):
        header, data = {}, b""
        for name, array in arrays.items():
            header[name] = entry(NAMES[array.dtype], array.shape, (len(data), len(data) + array.nbytes))
            data += array.tobytes()
        (tmp_path / "x.safetensors").write_bytes(file_of(json.dumps(header).encode() + b" " * pad, data))
        opened = SafetensorsFile.open(tmp_path / "x.safetensors")
        assert {name: bits(opened.read(name)) for name in arrays} == {name: bits(array) for name, array in arrays.items()}
        assert all(opened.read(name).flags.aligned for name in arrays)


# --- The disk ---


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    alive, most = [], 0

    class Counted(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive.pop()

    def load(name):
        nonlocal most
        alive.append(name)
        most = max(most, len(alive))
        array = np.ndarray.__new__(Counted, (16,), np.float32)
        array[:] = int(name)
        return array

    write(tmp_path / "x.safetensors", {str(i): (DTYPES["F32"], (16,)) for i in range(8)}, load)
    assert most == 1
    assert SafetensorsFile.open(tmp_path / "x.safetensors").read("5").tolist() == [5.0] * 16


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    def load(name):
        if name == "b":
            raise failure
        return np.ones(4, np.float32)

    layout = dict.fromkeys("abc", (DTYPES["F32"], (4,)))
    with pytest.raises(type(failure)):
        write(tmp_path / "x.safetensors", layout, load)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "x.safetensors", {"old": np.zeros(3)})
    content = (tmp_path / "x.safetensors").read_bytes()
    with pytest.raises(type(failure)):
        write(tmp_path / "x.safetensors", layout, load)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == content


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, {"old": np.zeros(3)})
    content = path.read_bytes()
    script = """
        import os, signal, sys, pathlib
        import numpy as np
        from hasten.formats.safetensors import write
        def load(name):
            if name == "b":
                os.kill(os.getpid(), signal.SIGKILL)
            return np.ones(1 << 20, np.float32)
        write(pathlib.Path(sys.argv[1]), {name: (np.dtype("f4"), (1 << 20,)) for name in "ab"}, load)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], env=environment, check=False)
    assert killed.returncode == -9
    assert path.read_bytes() == content
    assert list(tmp_path.glob("*.safetensors")) == [path]


def test_a_file_can_be_rewritten_from_its_own_mapping(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, {"a": np.arange(5), "b": np.ones((2, 2), np.float32)})
    opened = SafetensorsFile.open(path)
    write(path, {name: (found.dtype, found.shape) for name, found in opened.entries.items()}, opened.read, {"again": "yes"})
    again = SafetensorsFile.open(path)
    assert {name: bits(again.read(name)) for name in again.entries} == {name: bits(opened.read(name)) for name in opened.entries}


def test_what_the_format_cannot_hold_is_refused_before_a_byte_is_written(tmp_path):
    cases = {
        "complex64": ({"a": np.zeros(2, np.complex64)}, {}),
        ">f4": ({"a": np.zeros(2, ">f4")}, {}),
        "__metadata__": ({"__metadata__": np.zeros(2)}, {}),
        "UTF-8": ({"\ud800": np.zeros(2)}, {}),
        "strings": ({"a": np.zeros(2)}, {"a": 1}),
    }
    for reason, (tensors, metadata) in cases.items():
        with pytest.raises(CheckpointError, match=reason):
            save(tmp_path / "x.safetensors", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [np.zeros(3, np.float32), np.zeros((2, 1), np.float32), np.zeros(2, np.float64)])
def test_a_loader_that_breaks_its_promise_is_refused(tmp_path, given):
    with pytest.raises(CheckpointError, match=r"float32 \(2,\), which its header says"):
        write(tmp_path / "x.safetensors", {"a": (DTYPES["F32"], (2,))}, lambda name: given)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        save(tmp_path / "missing" / "x.safetensors", {"a": np.zeros(2)})
    assert "\n" not in str(caught.value)


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    save(tmp_path / "x.safetensors", {"a": np.zeros(2)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- Shards ---


def read_all(paths):
    return {name: opened.read(name) for opened in map(SafetensorsFile.open, paths) for name in opened.entries}


def sharded(directory, tensors, limit):
    return write_sharded(directory, layout_of(tensors), tensors.__getitem__, {"format": "pt"}, limit)


def test_one_shard_is_one_plain_file(tmp_path):
    tensors = {"a": np.arange(4), "b": np.ones(2, np.float32)}
    assert sharded(tmp_path / "new" / "model", tensors, 10**9) == [tmp_path / "new" / "model" / "model.safetensors"]
    assert [path.name for path in (tmp_path / "new" / "model").iterdir()] == ["model.safetensors"]
    assert sharded(tmp_path / "none", {}, 1) == [tmp_path / "none" / "model.safetensors"]


@many
@given(tensors=checkpoints, limit=st.integers(1, 64))
def test_shards_hold_every_tensor_once_within_the_limit(tmp_path, tensors, limit):
    paths = sharded(tmp_path, tensors, limit)
    assert sorted(path for path in tmp_path.glob("*.safetensors")) == paths
    assert {name: bits(array) for name, array in read_all(paths).items()} == {name: bits(array) for name, array in tensors.items()}
    for path in paths:
        held = SafetensorsFile.open(path).entries.values()
        assert sum(found.stop - found.start for found in held) <= limit or sum(found.stop > found.start for found in held) == 1
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(paths) > 1)
    if len(paths) > 1:
        assert [path.name for path in paths] == [f"model-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, len(paths) + 1)]
        found = json.loads(index.read_text())
        assert found["metadata"] == {"total_size": sum(array.nbytes for array in tensors.values())}
        assert found["weight_map"] == {name: path.name for path in paths for name in SafetensorsFile.open(path).entries}


def test_weights_of_an_older_checkpoint_do_not_stay_behind(tmp_path):
    tensors = {str(i): np.full(4, i, np.float32) for i in range(6)}
    (tmp_path / "config.json").write_text("{}")
    for limit in (16, 10**6, 32, 48, 16, 10**6):
        paths = sharded(tmp_path, tensors, limit)
        index = [] if len(paths) == 1 else [tmp_path / "model.safetensors.index.json"]
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "config.json", *paths, *index])


def test_a_failed_save_leaves_the_old_shards(tmp_path):
    tensors = {str(i): np.full(4, i, np.float32) for i in range(6)}
    sharded(tmp_path, tensors, 32)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def load(name):
        if name == "5":
            raise RuntimeError("no")
        return tensors[name] + 1

    with pytest.raises(RuntimeError):
        write_sharded(tmp_path, layout_of(tensors), load, {}, 32)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_shard_limit_below_one_byte_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="max_shard_bytes is 0"):
        sharded(tmp_path, {"a": np.zeros(2)}, 0)
