"""Calibration: what reaches each linear layer, block by block, against the whole model played at once; and going on after a kill."""

import dataclasses

import msgspec
import numpy as np
import pytest
import torch

from hasten.backends.reference import play, weights_of
from hasten.base.errors import UserError
from hasten.compress import blocks
from hasten.compress.sites import Layers, sites_of
from hasten.compress.walk import Run, Treated, walk
from hasten.formats.weights import Weight, Weights
from hasten.program import Batch, lower
from tests.compress.models import KINDS, small, windows_for


class Settings(msgspec.Struct, frozen=True):
    number: int = 0


def watch(model, text, work, threads=2, change=0.0, stop_at=None):
    """Walk a model whose matrices lose ``change`` of themselves, keeping the moments of everything that is read."""

    def treat(block):
        if block.index == stop_at:
            raise KeyboardInterrupt
        weights = dict(block.weights)
        moments = block.text().moments(weights, sites_of(block.piece, Layers()))
        arrays = {}
        for site, each in moments.items():
            arrays[f"{site.weight}:square"] = np.stack([one.square.numpy() for one in each])
            arrays[f"{site.weight}:mean"] = np.stack([one.mean.numpy() for one in each])
            arrays[f"{site.weight}:largest"] = np.stack([one.largest.numpy() for one in each])
            weights[site.weight] = weights[site.weight] * (1 - change)
        return Treated(arrays, {"block": block.index}, weights)

    return walk(model, Settings(), text, Run(work, threads), treat)


def inputs_of_the_whole(model, text, site):
    """What ``site`` reads when the whole model is played, window by window, in float32."""
    program = lower(model.spec).with_outputs([name for name in (site.x, site.experts) if name])
    weights = weights_of(program, model.weights, dtype=torch.float32)
    xs, experts = [], []
    for window in text.windows:
        values, _ = play(program, weights, Batch.of([window], rows="none"))
        xs.append(values[site.x].double())
        if site.experts:
            experts.append(values[site.experts])
    if not site.experts:
        return [torch.cat(xs)]
    x, chosen = torch.cat(xs), torch.cat(experts)
    count = model.weights[site.weight].shape[0]
    rows = [[row for row, mine in zip(x, chosen) if e in mine.tolist()] for e in range(count)] if x.dim() == 2 else [
        [row[list(mine).index(e)] for row, mine in zip(x, chosen.tolist()) if e in mine] for e in range(count)
    ]  # fmt: skip
    return [torch.stack(each) if each else torch.zeros(0, x.shape[-1], dtype=torch.float64) for each in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_whole_model(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 70)
    monkeypatch.setattr(blocks, "PRODUCT_ROWS", 50)
    model = small(kind)
    text = windows_for(model)
    assert len(blocks.chunks_of(text.windows)) > 2
    walked = watch(model, text, tmp_path)
    sites = sites_of(lower(model.spec), Layers())
    assert len(sites) == 14
    for site in sites:
        file = walked.files[int(site.weight.split(".")[1])]
        for expert, x in enumerate(inputs_of_the_whole(model, text, site)):
            square = file.read(f"{site.weight}:square")[expert]
            assert np.allclose(square, (x.T @ x).numpy(), rtol=1e-4, atol=1e-4 * np.abs(square).max(initial=1e-9))
            if len(x):
                assert np.allclose(file.read(f"{site.weight}:mean")[expert], x.abs().mean(0), rtol=1e-3, atol=1e-5)
                assert np.allclose(file.read(f"{site.weight}:largest")[expert], x.abs().amax(0), rtol=1e-3, atol=1e-5)


def same(a, b):
    assert len(a.files) == len(b.files)
    for one, other in zip(a.files, b.files):
        assert one.entries.keys() == other.entries.keys()
        for name in one.entries:
            assert np.array_equal(one.read(name), other.read(name)), name
    return True


def test_later_blocks_see_what_earlier_ones_became(tmp_path):
    model = small()
    text = windows_for(model)
    plain, changed = watch(model, text, tmp_path / "a"), watch(model, text, tmp_path / "b", change=0.1)
    name = "blocks.{}.mixer.q.weight:square"
    assert np.array_equal(plain.files[0].read(name.format(0)), changed.files[0].read(name.format(0)))
    assert not np.allclose(plain.files[1].read(name.format(1)), changed.files[1].read(name.format(1)), rtol=1e-3)


def test_threads_change_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 50)
    model = small("MoE")
    text = windows_for(model)
    same(watch(model, text, tmp_path / "1", threads=1, change=0.1), watch(model, text, tmp_path / "3", threads=3, change=0.1))


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(stop_at, tmp_path):
    model = small()
    text = windows_for(model)
    whole = watch(model, text, tmp_path / "whole", change=0.1)
    with pytest.raises(KeyboardInterrupt):
        watch(model, text, tmp_path / "cut", change=0.1, stop_at=stop_at)
    left = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert left == ["live-0000", "run.json"] if stop_at == 0 else ["block-0000.safetensors", "live-0001", "run.json"]
    asked = []
    weights = Weights({
        name: Weight(weight.shape, weight.dtype, lambda name=name, weight=weight: (asked.append(name), weight.load())[1])
        for name, weight in model.weights.items()
    })
    resumed = dataclasses.replace(model, weights=weights)
    assert same(whole, watch(resumed, text, tmp_path / "cut", change=0.1))
    after = asked[len(model.weights) :]  # all were read once, for the fingerprint
    assert not any(name.startswith(f"blocks.{block}.") for name in after for block in range(stop_at))
    assert "embedding.weight" not in after
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["block-0000.safetensors", "block-0001.safetensors", "run.json"]


def test_another_run_is_not_gone_on_with(tmp_path):
    model = small()
    text = windows_for(model)
    (tmp_path / ".run.json.partial").write_text("")  # killed before it had begun
    watch(model, text, tmp_path)
    with pytest.raises(UserError, match="another model, recipe or text"):
        watch(model, windows_for(model, seed=1), tmp_path)
    with pytest.raises(UserError, match="another model, recipe or text"):
        watch(small(seed=12), text, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        watch(model, text, tmp_path / "other")
    assert (tmp_path / "other" / "mine.txt").read_text() == "kept"


def test_one_blocks_weights_are_read_at_a_time(tmp_path):
    model, order = small(), []
    weights = Weights({
        name: Weight(weight.shape, weight.dtype, lambda name=name, weight=weight: (order.append(name), weight.load())[1])
        for name, weight in model.weights.items()
    })
    watch(dataclasses.replace(model, weights=weights), windows_for(model), tmp_path)
    after = [name.split(".")[1] if name.startswith("blocks") else name for name in order[len(weights) :]]
    assert list(dict.fromkeys(after)) == ["embedding.weight", "0", "1"]
    assert after == sorted(after, key=["embedding.weight", "0", "1"].index)  # each block's once, none before its turn
