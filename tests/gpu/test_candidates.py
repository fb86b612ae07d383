"""Which kernel is chosen and why not another; and what was measured on a device, read back."""

import dataclasses

import pytest
import torch

from hasten.backends.cuda import tuned
from hasten.backends.cuda.candidates import EXPERT_LINEAR, LINEAR, Candidate, LinearSite, choose, cublas
from hasten.backends.cuda.kernels.linear import Order, Tiles, default_order, default_tiles, linear
from hasten.backends.cuda.kernels.pack import PackedWeight
from hasten.backends.cuda.tuned import Tuned, TunedLinear, path_of, read, shape_name, write
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.formats.linear import LinearFormat

SITE = LinearSite(LinearFormat.parse("bf16"), "bf16", 16, 4096, 4096, torch.bfloat16, invariant=True, capability=(9, 0))


def site(name="bf16", **changes):
    return dataclasses.replace(SITE, form=LinearFormat.parse(name), **changes)


def test_what_depends_on_the_batch_is_refused_where_bits_must_not():
    choice = choose(LINEAR, SITE)
    assert choice.candidate.name == "triton"
    assert choice.candidate.launch is linear
    assert [name for name, _ in choice.refused] == ["cublas"]
    assert "depend on its batch" in choice.refused[0][1]
    free = choose(LINEAR, site(invariant=False))
    assert (free.candidate.launch, free.refused) == (cublas, ())


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (site("int4", invariant=False), "dense weights alone, not int4"),
        (site("fp8", invariant=False), "dense weights alone, not fp8"),
        (site("bf16", invariant=False, dtype=torch.float32), "one dtype"),
        (site("f16", fed="f32", invariant=False, dtype=torch.float32), "one dtype"),
    ],
)
def test_why_not_the_library(where, said):
    choice = choose(LINEAR, where)
    assert choice.candidate.name == "triton"
    assert said in choice.refused[0][1]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (site("bf16", fed="int8"), "multiplied with bf16, not int8"),
        (site("int4", fed="f32"), "multiplied with int8 or bf16, not f32"),
        (site("bf16", capability=(7, 5)), "8.0 for bfloat16; this one has 7.5"),
        (site("fp8", capability=(8, 6)), "8.9 for fp8"),
        (site("int8", fed="int8", size=140_000), "32 bits"),
    ],
)
def test_where_nothing_is_left_every_reason_is_said(where, said):
    for candidates in (LINEAR, EXPERT_LINEAR):
        with pytest.raises(UnsupportedError, match=said) as raised:
            choose(candidates, where)
        assert all(f"{candidate.name}: " in str(raised.value) for candidate in candidates)


def test_the_first_that_does_not_refuse():
    asked = []

    def says(name, reason):
        return Candidate(name, lambda site: asked.append(name) or reason, print)

    choice = choose((says("a", "no"), says("b", None), says("c", None)), SITE)
    assert (choice.candidate.name, choice.refused, asked) == ("b", (("a", "no"),), ["a", "b"])
    with pytest.raises(UnsupportedError, match="no candidate"):
        choose((), SITE)


def test_the_library_computes_it(device):
    x, weight, bias = torch.randn(3, 40, device=device), torch.randn(7, 40, device=device), torch.randn(7, device=device)
    for b in (None, bias):
        y = torch.full((3, 7), float("nan"), device=device)
        cublas(x, weight, y, b)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, b))


# --- what was measured

DEVICE = "NVIDIA H200"
WEIGHT = PackedWeight.of_dense(torch.empty(4096, 4096, device="meta"))
SHAPE = shape_name("bf16", "bf16", 4096, 4096)


def test_what_was_measured_comes_back(tmp_path):
    measured = TunedLinear(Order(64, 2), {16: Tiles(stages=6, split=True), 256: Tiles(out=128, rows=256, warps=8)})
    path = write(tmp_path / "new", Tuned(DEVICE, {SHAPE: measured}))
    assert path.name == "nvidia-h200.json"
    back = read(tmp_path / "new", DEVICE)
    assert back.linear == {SHAPE: measured}
    assert {back.order(SHAPE, WEIGHT) for _ in range(3)} == {Order(64, 2)}
    found = [back.tiles(SHAPE, WEIGHT, rows) for rows in (1, 16, 17, 256)]
    assert found == [measured.tiles[16], measured.tiles[16], measured.tiles[256], measured.tiles[256]]
    assert back.tiles(SHAPE, WEIGHT, 257) == default_tiles(257, Order(64, 2))
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["nvidia-h200.json"]


def test_what_nobody_measured_takes_the_defaults(tmp_path):
    nothing = read(tmp_path, DEVICE)
    assert nothing == Tuned(DEVICE)
    assert nothing.order(SHAPE, WEIGHT) == default_order(WEIGHT)
    assert nothing.tiles(SHAPE, WEIGHT, 5) == default_tiles(5, default_order(WEIGHT))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "does not say"),
        ('{"device": "NVIDIA H200", "linear": {"a": {"order": {"step": 48}}}}', "no order of sums"),
        ('{"device": "NVIDIA H200", "linear": {"a": {"order": {"step": 64}, "tiles": {"16": {"out": 32}}}}}', "are no tiles"),
        ('{"device": "NVIDIA H200", "linear": {"a": {"tiles": {}}}}', "order"),
        ('{"device": "NVIDIA H200", "lines": {}}', "lines"),
        ('{"device": "NVIDIA H200", "schema_version": 2}', "schema 2"),
        ('{"device": "NVIDIA H100"}', "H100"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, text, said):
    path_of(tmp_path, DEVICE).write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        read(tmp_path, DEVICE)
    assert "remove it" in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_a_write_that_breaks_off_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write(tmp_path, Tuned(DEVICE, {SHAPE: TunedLinear(Order(64))}))
    monkeypatch.setattr(tuned.msgspec.json, "format", lambda *_, **__: b"{")
    monkeypatch.setattr(tuned.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(tmp_path, Tuned(DEVICE))
    assert read(tmp_path, DEVICE).linear
