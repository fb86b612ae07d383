"""Who asks for sparse weights where they do not pay is told so, once."""

import logging

import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu.packed import PackedWeights
from hasten.backends.cpu.sparse import advice, slower_than_dense
from hasten.formats.linear import LinearFormat

HALF = np.where(np.random.default_rng(0).random((32, 256)) < 0.5, 0, np.random.default_rng(1).normal(size=(32, 256))).astype(np.float32)
REGULAR = np.tile(np.array([1, 0, -2, 0], np.float32), (32, 64))


@pytest.mark.parametrize(
    ("name", "dense", "slower"),
    [
        ("bf16-sparse", HALF, False), ("bf16-sparse", REGULAR, False), ("int8-sparse", HALF, True), ("int8-sparse", REGULAR, False),
        ("int4-sparse", REGULAR, True), ("int8", HALF, False),
    ],
)  # fmt: skip
def test_a_line_for_what_does_not_pay(name, dense, slower, monkeypatch, caplog):
    monkeypatch.setattr(_native, "cpu_features", lambda: {"avx512_vbmi2": False})
    packed = PackedWeights(_native.ThreadPool(1), "avx2", "a test", None, None)
    form = LinearFormat.parse(name)
    for weight in ("one", "two"):
        packed.linear(weight, form, *dense.shape, lambda: dense)
    with caplog.at_level(logging.WARNING, "hasten"):
        packed.fill()
    assert [record.getMessage() for record in caplog.records] == [f"hasten: {advice(form)}"] * slower


def test_expanding_instructions_make_every_pattern_pay(monkeypatch):
    monkeypatch.setattr(_native, "cpu_features", lambda: {"avx512_vbmi2": True})
    assert not slower_than_dense(LinearFormat.parse("int8-sparse"), False, "avx512")
    assert slower_than_dense(LinearFormat.parse("int8-sparse"), False, "avx2")  # which a setting may ask for
