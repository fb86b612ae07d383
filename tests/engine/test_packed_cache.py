"""Packed weights kept on disk: what a second start reads, and what it makes of every kind of damage."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu import CpuBackend, packed
from hasten.backends.cpu.packed import Key, PackedCache, Wanted
from hasten.base.errors import CheckpointError, ConfigError
from hasten.checkpoint import load, random, save
from hasten.checkpoint.load import _recipe
from hasten.families.gpt_neox import FAMILY
from hasten.formats.weights import FileStamp, Origin, Weights
from hasten.program import Batch, Formats
from tests.cli import assert_refused, main, run
from tests.pure.test_checkpoint import tiny

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
SMALL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
PACKED = 1 + 2 * 7 + 1  # weights of it that are packed: the table, seven products a block, the head


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "packed"
    settle()


@pytest.fixture
def model(monkeypatch):
    """A small random model, named as the large ones are."""
    monkeypatch.setitem(random.SHAPES, "small", SMALL)
    return load("random:small")


def settle():
    for thread in threading.enumerate():
        if thread.name == "hasten-packed-cache":
            thread.join()


def start(model, weights="int4", threads=1, isa="best"):
    """Logits bits of a fresh session, and how many weights it packed. What it writes is on disk afterwards."""
    session = CpuBackend(threads, isa).session(model, 64, Formats(weights))
    logits = session.score(Batch.of([IDS]))
    settle()
    return logits.view(np.uint32), session.compiled.packed


def files(place):
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


def only(place):
    (name,) = files(place)
    return place / name


@pytest.fixture
def uncached(monkeypatch):
    """Logits without any cache."""

    def logits(model, weights="int4"):
        with monkeypatch.context() as patch:
            patch.setenv("HASTEN_CACHE_SIZE", "0")
            found, count = start(model, weights)
            assert count > 0
            return found

    return logits


# --- what a second start reads


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_the_second_start_reads_the_same_bits(weights, model, place, uncached, caplog):
    first, count = start(model, weights, threads=2)
    assert count == PACKED
    only(place)
    for threads in (1, 2):
        again, count = start(model, weights, threads)
        assert count == 0
        assert np.array_equal(again, first)
    assert np.array_equal(uncached(model, weights), first)
    assert caplog.records == []


def test_a_settled_session_is_written_whole_and_lets_go_of_its_memory(model, place, monkeypatch):
    held, real = threading.Event(), PackedCache._write

    def slow(self, *arguments):
        held.wait(5)
        real(self, *arguments)

    monkeypatch.setattr(PackedCache, "_write", slow)
    session = CpuBackend(1).session(model, 64, Formats("int4"))
    assert files(place) == []
    threading.Timer(0.2, held.set).start()
    session.compiled.store.settle()
    only(place)
    assert "hasten-packed-cache" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
def test_a_file_in_memory_is_mapped_and_then_moved(model, place, caplog):
    """The same bits before and after; what is changed in the file later is nobody's concern."""
    first, _ = start(model)
    session = CpuBackend(1).session(model, 64, Formats("int4"))
    mapped = session.compiled.store._mapped
    assert mapped is not None
    assert np.array_equal(session.score(Batch.of([IDS])).view(np.uint32), first)
    assert mapped.moved() == only(place).stat().st_size
    flipped(only(place), 4096 * 40 + 5)
    assert np.array_equal(session.score(Batch.of([IDS])).view(np.uint32), first)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
def test_a_file_that_is_changed_while_it_is_mapped_is_not_played_on(model, place):
    start(model)
    session = CpuBackend(1).session(model, 64, Formats("int4"))
    flipped(only(place), 4096 * 40 + 5)
    session.compiled.store.settle()
    with pytest.raises(CheckpointError, match="start again"):
        session.score(Batch.of([IDS]))


def test_a_file_that_must_come_from_disk_is_read(model, place, monkeypatch):
    first, _ = start(model)
    with open(only(place), "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    monkeypatch.setattr(PackedCache, "map", lambda *_: None)  # a file system that keeps its files in memory has no such case
    session = CpuBackend(1).session(model, 64, Formats("int4"))
    assert session.compiled.packed == 0
    assert np.array_equal(session.score(Batch.of([IDS])).view(np.uint32), first)


def test_it_makes_no_number_that_it_can_read(model, monkeypatch):
    made = []
    make = random._make
    monkeypatch.setattr(random, "_make", lambda name, shape, *rest: made.append(shape) or make(name, shape, *rest))
    first, _ = start(load("random:small"))
    assert any(len(shape) == 2 for shape in made)
    made.clear()
    again, _ = start(load("random:small"))
    assert made
    assert all(len(shape) == 1 for shape in made)
    assert np.array_equal(again, first)


def test_a_bundled_model():
    model = load("code-8m")
    first, count = start(model)
    assert count > 0
    again, count = start(load("code-8m"))
    assert count == 0
    assert np.array_equal(again, first)


def test_each_choice_has_its_file(model, place):
    for weights in ("bf16", "int8", "int4"):
        assert start(model, weights)[1] == PACKED
    assert start(model, "int4", isa="generic")[1] == (PACKED if _native.isa_level("best") != "generic" else 0)
    assert len(files(place)) == 3 + (_native.isa_level("best") != "generic")
    assert start(random.random_model("small", seed=1))[1] == PACKED


def test_the_name_it_is_called_by_does_not_count(tmp_path, place, monkeypatch):
    save(tiny(), tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert start(load("model"))[1] > 0
    assert [start(load(name))[1] for name in (str(tmp_path / "model"), "./model", "link")] == [0, 0, 0]
    only(place)


def test_another_build_packs_anew(model, monkeypatch):
    start(model)
    monkeypatch.setattr(packed, "__version__", "0.0.0")
    assert start(model)[1] == PACKED


def test_transformed_weights_are_not_kept(model, place):
    for _ in range(2):
        assert start(dataclasses.replace(model, weights=Weights(model.weights)))[1] == PACKED
    assert files(place) == []


# --- files that change


def test_a_changed_checkpoint_is_packed_anew(tmp_path, uncached):
    directory = tmp_path / "model"
    save(tiny(), directory)
    old, count = start(load(directory))
    assert count > 0
    assert start(load(directory))[1] == 0
    before = FileStamp.of(directory / "model.safetensors", os.stat(directory / "model.safetensors"))
    other = {name: dataclasses.replace(w, load=lambda w=w: w.load()[..., ::-1].copy()) for name, w in tiny().weights.items()}
    save(dataclasses.replace(tiny(), weights=Weights(other)), directory, overwrite=True)
    assert not before.holds
    new, count = start(load(directory))
    assert count > 0
    assert not np.array_equal(new, old)
    assert np.array_equal(new, uncached(load(directory)))


@pytest.mark.parametrize("field", ["size", "mtime_ns", "inode", "path"])
def test_every_part_of_a_stamp_counts(field, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    stamp = FileStamp.of(path, path.stat())
    assert stamp.holds
    if field == "size":
        path.write_bytes(b"abcd")
        os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))
    elif field == "mtime_ns":
        os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns + 1000))
    elif field == "inode":
        (tmp_path / "other").write_bytes(b"xyz")
        os.utime(tmp_path / "other", ns=(stamp.mtime_ns, stamp.mtime_ns))
        os.replace(tmp_path / "other", path)
    else:
        path.rename(tmp_path / "elsewhere")
    assert not stamp.holds


def test_a_file_that_changes_meanwhile_is_not_kept(tmp_path, place):
    save(tiny(), tmp_path / "model")
    model = load(tmp_path / "model")
    os.utime(tmp_path / "model" / "model.safetensors", ns=(1, 1))
    assert start(model)[1] > 0
    assert files(place) == []


def test_the_same_file_read_in_another_way_is_another_origin(tmp_path):
    """GPT-NeoX lays queries, keys and values together head by head, so the number of heads decides what the file's numbers are."""
    recipes = []
    for heads in (2, 4, 4):
        config = {**FAMILY.examples[0], "hidden_size": 32, "num_attention_heads": heads}
        recipes.append(_recipe(FAMILY.tensors(FAMILY.spec(config), config)))
    assert recipes[0] != recipes[1] == recipes[2]


def test_a_table_that_a_checkpoint_has_in_bf16_stays_there(tmp_path, place, uncached):
    save(tiny(dtypes=("bfloat16",)), tmp_path / "model")
    model = load(tmp_path / "model")
    first, count = start(model)
    with open(only(place), "rb") as file:
        kept = [wanted.format for wanted in packed._read_header(file).key.weights]
    assert len(kept) == count
    assert packed.TABLE not in kept
    again, count = start(load(tmp_path / "model"))
    assert count == 0
    assert np.array_equal(again, first)
    assert np.array_equal(uncached(model), first)


# --- damage


def flipped(path, at):
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


DAMAGE = {
    "cut short": (lambda path: os.truncate(path, path.stat().st_size - 1), PACKED),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), PACKED),
    "empty": (lambda path: os.truncate(path, 0), PACKED),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), PACKED),
    "garbage": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size)), PACKED),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), PACKED),
    "magic": (lambda path: flipped(path, 0), PACKED),
    "place of the header": (lambda path: flipped(path, 10), PACKED),
    "length of the header": (lambda path: flipped(path, 22), PACKED),
    "digest of the header": (lambda path: flipped(path, 40), PACKED),
    "header": (lambda path: flipped(path, -1), PACKED),
    "one byte of one weight": (lambda path: flipped(path, 4096 * 40 + 5), 1),
    "first byte": (lambda path: flipped(path, 4096), 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_before_it_is_played(damage, model, place, caplog):
    first, _ = start(model)
    path = only(place)
    whole = path.read_bytes()
    spoil, count = DAMAGE[damage]
    spoil(path)
    assert path.read_bytes() != whole
    with caplog.at_level(logging.WARNING, "hasten"):
        again, repacked = start(model)
    assert repacked == count
    assert np.array_equal(again, first)
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert path.read_bytes() == whole  # written anew, every byte
    assert start(model)[1] == 0


def test_a_header_of_another_shape_is_refused(model, place):
    """As an older hasten of the same build would have left it, or someone who can digest."""
    start(model)
    path = only(place)
    with open(path, "rb") as file:
        header = packed._read_header(file)
    for change in (
        {"parts": header.parts[:-1]},
        {"parts": ((), *header.parts[1:])},
        {"parts": ((packed.Part(4096, 1 << 60, 0),), *header.parts[1:])},
        {"parts": ((packed.Part(1 << 62, header.parts[0][0].size, 0),), *header.parts[1:])},
        {"key": msgspec.structs.replace(header.key, isa="vax")},
    ):
        body = msgspec.msgpack.encode(msgspec.structs.replace(header, **change))
        preamble = packed._PREAMBLE.pack(packed._MAGIC, 64, len(body), packed.hashlib.blake2b(body, digest_size=32).digest())
        path.write_bytes(preamble + body)
        assert start(model)[1] == PACKED
        assert start(model)[1] == 0


def test_a_directory_in_the_files_place(model, place, caplog):
    first, _ = start(model)
    path = only(place)
    path.unlink()
    path.mkdir()
    again, count = start(model)
    assert count == PACKED
    assert np.array_equal(again, first)
    assert caplog.records
    assert files(place) == [path.name]


def test_what_loading_raises_comes_through(model):
    def broken():
        raise ConfigError("this weight is broken")

    weights = {name: dataclasses.replace(w, load=broken) if "down" in name else w for name, w in model.weights.items()}
    with pytest.raises(ConfigError, match="broken"):
        start(dataclasses.replace(model, weights=Weights(weights, model.weights.origin)))


# --- disks


@pytest.mark.parametrize("where", ["under a file", "a file"])
def test_a_place_that_cannot_be_written(where, model, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file" / "below" if where == "under a file" else tmp_path / "file"))
    first, count = start(model)
    assert count == PACKED
    (record,) = caplog.records
    assert str(tmp_path / "file") in record.getMessage()
    assert np.array_equal(start(model)[0], first)


def test_a_directory_nobody_may_write(model, place, caplog, monkeypatch):
    """Root may write everywhere, so the refusal is put in its place."""

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packed.tempfile, "mkstemp", refused)
    assert start(model)[1] == PACKED
    (record,) = caplog.records
    assert "Permission denied" in record.getMessage()
    assert files(place) == []


@pytest.mark.parametrize("when", ["before", "midway"])
def test_a_full_disk(when, model, place, caplog, monkeypatch):
    if when == "before":
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    else:
        write = packed._write_file

        def full(*arguments):
            write(*arguments)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(packed, "_write_file", full)
    assert start(model)[1] == PACKED
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert files(place) == []  # and nothing half written


def test_the_cache_can_be_off(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HASTEN_CACHE_SIZE", "0")
    for _ in range(2):
        assert start(model)[1] == PACKED
    assert not (tmp_path / "cache").exists()
    assert caplog.records == []


def test_weights_larger_than_the_bound_are_not_kept(model, place, monkeypatch, caplog):
    monkeypatch.setenv("HASTEN_CACHE_SIZE", "10kB")
    assert start(model)[1] == PACKED
    assert files(place) == []
    (record,) = caplog.records
    assert "HASTEN_CACHE_SIZE" in record.getMessage()


# --- the bound


def keep(cache, name, size=100_000):
    key = Key(Origin(name), (Wanted("w", "int8", 1, size),), "generic", ("0", 0, 0))
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    cache.keep(name, key, [[data]]).join()
    return key, data


def age(cache, key, seconds):
    moment = time.time() - seconds
    os.utime(cache.directory / key.file_name, (moment, moment))


def names(cache):
    return [one.header.model for one in cache.kept()]


def test_the_least_recently_used_goes_first(tmp_path):
    cache, pool = PackedCache(tmp_path / "cache", 350_000), _native.ThreadPool(1)
    (a, data), (b, _), (c, _) = (keep(cache, name) for name in "abc")
    for key, seconds in ((a, 300), (b, 200), (c, 100)):
        age(cache, key, seconds)
    assert names(cache) == ["c", "b", "a"]
    room = np.empty_like(data)
    assert cache.read(a, [[room]], pool) == [True]  # a is now the last used
    assert np.array_equal(room, data)
    keep(cache, "d")
    assert sorted(names(cache)) == ["a", "c", "d"]
    keep(cache, "e", 300_000)
    assert names(cache) == ["e"]
    assert sum(path.stat().st_size for path in cache.directory.iterdir()) <= cache.limit


def test_writing_the_same_again_evicts_nobody(tmp_path):
    cache = PackedCache(tmp_path / "cache", 220_000)
    for _ in range(2):
        keep(cache, "a")
        keep(cache, "b")
    assert sorted(names(cache)) == ["a", "b"]


def test_files_of_others_are_left_alone(tmp_path):
    cache = PackedCache(tmp_path / "cache", 220_000)
    keep(cache, "a")
    (cache.directory / "notes.txt").write_text("mine")
    (cache.directory / ".old.partial").write_bytes(bytes(10))
    (cache.directory / ".new.partial").write_bytes(bytes(10))
    os.utime(cache.directory / ".old.partial", (0, 0))
    keep(cache, "b")
    assert {path.name for path in cache.directory.iterdir()} >= {"notes.txt", ".new.partial"}
    assert not (cache.directory / ".old.partial").exists()
    cache.clear()
    assert files(cache.directory) == ["notes.txt"]


# --- processes


TWO = """
import sys, time
from hasten.checkpoint import load, random
random.SHAPES["small"] = {config!r}
from hasten.backends.cpu import CpuBackend
from hasten.program import Batch, Formats
while time.time() < {begin!r}: pass
for _ in range(3):
    print(CpuBackend(1).session(load("random:small"), 64, Formats("int4")).score(Batch.of([{ids!r}])).tobytes().hex())
"""


def test_two_processes_at_once(model, place, uncached):
    expected = uncached(model).tobytes().hex()
    program = TWO.format(config=SMALL, begin=time.time() + 4, ids=IDS)
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) for _ in range(2)]
    for process in started:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, err) == (0, "")
        assert out.split() == [expected] * 3
    only(place)
    assert start(model)[1] == 0


def test_a_process_ends_with_its_file_written(place):
    arguments = ("generate", "code-8m", "-p", "import", "-n", "1", "--weights", "int4", "--json")
    environment = {"HASTEN_CACHE": os.environ["HASTEN_CACHE"]}
    first = run(*arguments, env=environment)
    assert (first.code, first.err) == (0, "")
    flipped(only(place), 5000)
    second = run(*arguments, env=environment)
    assert second.code == 0
    assert json.loads(second.out)["token_ids"] == json.loads(first.out)["token_ids"]
    assert re.fullmatch(r"hasten: the file of packed weights .* packing anew\n", second.err)
    third = run(*arguments, env=environment)
    assert (third.code, third.err) == (0, "")


# --- the commands


def test_list_and_clear(model, place, monkeypatch, capsys):
    empty = json.loads(main(monkeypatch, capsys, "cache", "list", "--json").out)
    assert empty == {"directory": str(place), "limit": 20_000_000_000, "bytes": 0, "files": []}
    start(model)
    (place / "0.packed").write_bytes(b"nonsense")
    listed = json.loads(main(monkeypatch, capsys, "cache", "list", "--json").out)
    known = next(one for one in listed["files"] if one["model"])
    assert (known["model"], known["weights"], known["isa"]) == ("random:small", ["int4", "int8"], _native.isa_level("best"))
    assert known["bytes"] == (place / known["file"]).stat().st_size
    assert listed["bytes"] == known["bytes"] + 8
    shown = main(monkeypatch, capsys, "cache", "list").out
    assert "random:small" in shown
    assert f"{known['bytes']:,}" in shown
    monkeypatch.setenv("HASTEN_CACHE_SIZE", "0")  # off, and still to be emptied
    cleared = json.loads(main(monkeypatch, capsys, "cache", "clear", "--json").out)
    assert cleared == {"directory": str(place), "files": 2, "bytes": listed["bytes"]}
    assert files(place) == []
    assert main(monkeypatch, capsys, "cache", "clear").out == "0 files removed, 0 bytes\n"


def test_a_malformed_size_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("HASTEN_CACHE_SIZE", "lots")
    assert_refused(main(monkeypatch, capsys, "cache", "list"), "HASTEN_CACHE_SIZE", "'lots'")
    assert_refused(main(monkeypatch, capsys, "generate", "code-8m", "-p", "x"), "HASTEN_CACHE_SIZE", "'lots'")


def test_tests_write_nowhere_else():
    assert Path(os.environ["HASTEN_CACHE"]).is_relative_to(Path(os.environ.get("PYTEST_DEBUG_TEMPROOT", "/tmp")))
