"""Pages of a mapped file that are given back, and those that must not be."""

import sys

import numpy as np
import pytest

from hasten.formats.mapped import release
from hasten.formats.safetensors import SafetensorsFile, layout_of, write

SIZE = 8 << 20


def resident():
    """Bytes of files in this process's memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssFile"))


@pytest.fixture
def mapped(tmp_path):
    arrays = {"a": np.random.default_rng(1).integers(0, 256, (2, SIZE), np.uint8), "b": np.arange(5, dtype=np.int32)}
    write(tmp_path / "x.safetensors", layout_of(arrays), arrays.__getitem__)
    return SafetensorsFile.open(tmp_path / "x.safetensors"), arrays["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="tells which pages are in memory")
def test_what_was_read_is_given_back_and_reads_the_same(mapped):
    file, expected = mapped
    array = file.read("a")
    assert array.sum(dtype=np.int64) == expected.sum(dtype=np.int64)
    before = resident()
    assert release(array[1]) > SIZE // 2
    assert before - resident() > SIZE // 2
    assert release(array) > SIZE // 2
    assert release(array) == 0
    assert np.array_equal(array, expected)


def test_what_was_written_to_is_kept(mapped):
    file, expected = mapped
    array = file.read("a")
    array[1, 12345] ^= 255
    assert array.sum() != expected.sum()
    assert release(array) == 0
    assert array[1, 12345] == expected[1, 12345] ^ 255
    assert np.array_equal(array[0], expected[0])


def test_what_is_no_file_is_left(mapped):
    array = np.arange(SIZE)
    assert release(array) == release(array[::2]) == release(mapped[0].read("b")) == release(mapped[0].read("a").T) == 0
    assert array[-1] == SIZE - 1
