"""Pruning transforms on small models: zeros where they were chosen, each block fed what the pruned ones give, and what a kill leaves."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from hasten.backends.reference import play
from hasten.base.errors import UserError
from hasten.compress.blocks import CHUNK, pieces, weights_for
from hasten.compress.prune import magnitude, parse_pattern, sparsegpt, wanda
from hasten.compress.recipe import check_recipe, recipe_of
from hasten.compress.sites import Layers, sites_of
from hasten.compress.threads import one_torch_thread
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.program import Batch
from tests.compress.models import small, windows_for

ROOT = Path(__file__).parents[2]
METHODS = ["magnitude", "wanda", "sparsegpt"]


def through(model, name, work, text=None, threads=2, **settings):
    (step,) = recipe_of([{name: settings}])
    step.transform.check(model, step.settings)
    return step.transform.apply(model, step.settings, (text or windows_for(model)) if step.needs_text else None, Run(work, threads))


def pruned(model):
    return {name: weight for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight)}


def chosen(name, weight, moments, pattern):
    """The weight as the functions of matrices make it, as bf16 numbers."""
    if name == "magnitude":
        made = weight * magnitude(weight, pattern)
    elif name == "wanda":
        made = weight * wanda(weight, moments, pattern)
    else:
        made = sparsegpt(weight, moments, pattern)
    return made.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)


def in_a_loop(model, name, pattern, text):
    """Every block played whole, its weights pruned value by value on what it reads then, and played again for the next. The text is one
    chunk, so that sums come to the same bits: a choice among weights leaves no room for less."""
    parts, made = pieces(model.spec, text.longest), {}
    assert text.tokens <= CHUNK
    batch = Batch.of(text.windows, rows="none")
    with torch.inference_mode(), one_torch_thread():
        given = play(parts[0], weights_for(parts[0], model.weights), batch)[0]
        for piece in parts[1:]:
            weights = weights_for(piece, model.weights)
            sites = sites_of(piece, Layers())
            for x in dict.fromkeys(site.x for site in sites):
                readers = [site for site in sites if site.x == x]
                names = [x, *{site.experts for site in readers if site.experts is not None}]
                seen = play(piece.with_outputs(names), weights, batch, given=given)[0]
                for site in readers:
                    matrices = weights[site.weight].clone()
                    for expert, matrix in enumerate(matrices if matrices.dim() == 3 else [matrices]):
                        rows = (seen[x].flatten(0, -2) if site.experts is None else routed(seen, site, expert)).contiguous()
                        half = (rows.T @ rows).double().triu()
                        matrix.copy_(torch.from_numpy(chosen(name, matrix.clone(), half + half.triu(1).T, pattern)))
                    made[site.weight] = matrices.numpy().copy()
                weights |= {site.weight: torch.from_numpy(made[site.weight]) for site in readers}
            if piece is not parts[-1]:
                given = play(piece, weights, batch, given=given)[0]
    return made


def routed(values, site, expert):
    mine = values[site.experts] == expert
    return values[site.x][mine.any(-1)] if values[site.x].dim() == 2 else values[site.x][mine]


@pytest.mark.parametrize(("kind", "sparsity"), [("grouped-query", "50%"), ("multi-query", "2:4"), ("MoE", "50%")])
@pytest.mark.parametrize("name", METHODS)
def test_a_transform_is_the_loop(name, kind, sparsity, tmp_path):
    model, pattern = small(kind), parse_pattern(sparsity)
    text = windows_for(model, lengths=(48,) * 12)
    made, expected = through(model, name, tmp_path, text, sparsity=sparsity), in_a_loop(model, name, pattern, text)
    assert pruned(made).keys() == expected.keys()
    assert len(expected) == 14
    zeros = total = 0
    for weight, array in expected.items():
        found = made.weights[weight].load()
        np.testing.assert_array_equal(found, array, weight)
        zeros, total = zeros + np.count_nonzero(found == 0), total + found.size
    assert zeros / total == pytest.approx(0.5, abs=0.01)
    (step,) = made.provenance
    assert (step.transform, step.settings["sparsity"]) == (name, sparsity)
    assert step.evidence["zeros"] == pytest.approx(zeros / total)
    assert 0 < step.evidence["mean_error"] < step.evidence["worst_error"] < 0.9
    assert ("tokens" in step.evidence) == (name != "magnitude")


@pytest.mark.parametrize("name", METHODS)
def test_what_is_stored_is_bf16_with_its_zeros_left_out(name, tmp_path):
    model = small()
    made = through(model, name, tmp_path, sparsity="2:4", skip=["*.mixer.v"])
    stored = pruned(made)
    assert len(stored) == 12
    for weight in stored.values():
        array = weight.load()
        assert (str(weight.form), weight.activations) == ("bf16-sparse", "bf16")
        np.testing.assert_array_equal(array, array.astype(ml_dtypes.bfloat16).astype(np.float32))
        assert not np.signbit(array[array == 0]).any()
        assert (np.count_nonzero(array.reshape(-1, 4), axis=1) <= 2).all()
        out, width = array.shape
        assert weight.nbytes == np.count_nonzero(array) * 2 + out * -(-width // 8)
    for each in model.weights.keys() - stored.keys():
        assert made.weights[each] is model.weights[each]
    assert "linear layer that was skipped" in made.provenance[-1].evidence["left"]


def loss(model, other, text):
    """Mean divergence of the logits of ``other``."""
    with torch.inference_mode():
        logits = [[torch.from_numpy(each.logits(window)).log_softmax(-1) for window in text.windows] for each in (model, other)]
    return np.mean([torch.nn.functional.kl_div(b, a, log_target=True, reduction="batchmean").item() for a, b in zip(*logits)])


def test_what_looks_at_text_loses_less(tmp_path):
    model, draw = small(), np.random.default_rng(4)
    weights = dict(model.weights)
    for name, weight in model.weights.items():
        if name.startswith("blocks.") and name.endswith("norm.weight"):  # inputs of different sizes, as trained models have them
            array = weight.load() * np.exp(draw.normal(size=weight.shape)).astype(np.float32)
            weights[name] = type(weight)(weight.shape, weight.dtype, lambda array=array: array)
    model = dataclasses.replace(model, weights=type(model.weights)(weights))
    text = windows_for(model, lengths=(48,) * 24)
    lost = {name: loss(model, through(model, name, tmp_path / name, text), text) for name in METHODS}
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"], lost


def test_an_expert_that_no_token_chose_is_pruned_by_size(tmp_path):
    model = small("MoE")
    text = windows_for(model, lengths=(2,))
    made = through(model, "wanda", tmp_path, text)
    (piece,) = pieces(model.spec, 2)[1:2]
    up = next(site for site in sites_of(piece, Layers()) if site.experts is not None)
    with torch.inference_mode():
        first = pieces(model.spec, 2)[0]
        batch = Batch.of(list(text.windows), rows="none")
        given = play(first, weights_for(first, model.weights), batch)[0]
        weights = {
            **weights_for(piece, model.weights),
            **{name: torch.from_numpy(made.weights.array(name).copy()) for name in piece.params},
        }
        used = play(piece.with_outputs([up.experts]), weights, batch, given=given)[0][up.experts].unique().tolist()
    unseen = [expert for expert in range(model.weights[up.weight].shape[0]) if expert not in used]
    assert unseen
    for expert in unseen:
        before, after = torch.from_numpy(model.weights.array(up.weight)[expert]), made.weights[up.weight].load()[expert]
        np.testing.assert_array_equal(after != 0, parse_pattern("50%").keep(before.abs()).numpy())


@pytest.mark.parametrize("name", METHODS)
def test_threads_change_no_bit(name, tmp_path):
    model = small("MoE")
    one, other = (through(model, name, tmp_path / str(threads), threads=threads) for threads in (1, 3))
    same(one, other)


def same(one, other):
    for name, weight in one.weights.items():
        assert np.array_equal(weight.load().view(np.uint8), other.weights.array(name).view(np.uint8)), name


# Prunes a model in a process that can be killed; leaves its result in work.
WORKER = """
import sys
from pathlib import Path
from tests.compress import models
from tests.compress.test_pruning import through
model = models.small("grouped-query")
text = models.windows_for(model, lengths=(48,) * 24)
print("begun", flush=True)
through(model, "sparsegpt", Path(sys.argv[1]), text)
print("done", flush=True)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    model = small("grouped-query")
    text = windows_for(model, lengths=(48,) * 24)
    began = time.monotonic()
    whole = through(model, "sparsegpt", tmp_path / "whole", text)
    seconds = time.monotonic() - began
    draw, killed = random.Random(3), 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "cut")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout.readline() == b"begun\n"
        time.sleep(draw.uniform(0.1, 0.8) * seconds)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert killed
    same(whole, through(model, "sparsegpt", tmp_path / "cut", text))


def test_wanda_chooses_among_what_it_is_told(tmp_path):
    """Rows keep equally many, or, of a whole matrix, what they deserve."""
    counts = {}
    for among in ("rows", "matrix"):
        made = through(small(), "wanda", tmp_path / among, among=among)
        counts[among] = [(weight.load() != 0).sum(-1) for weight in pruned(made).values()]
    assert all(len(set(each.ravel().tolist())) == 1 for each in counts["rows"])
    assert all(len(set(each.ravel().tolist())) > 1 for each in counts["matrix"])
    assert [each.sum() for each in counts["rows"]] == [each.sum() for each in counts["matrix"]]


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([{"wanda": {"sparsity": "5:4"}}, "rtn"], "as 50%, or how many of how many stay"),
        ([{"magnitude": {"layers": ["blocks.9.*"]}}, "rtn"], "mean no weight"),
        ([{"sparsegpt": {"damp": 1}}, "rtn"], "damp is 1"),
        (
            [{"wanda": {"sparsity": "2:4", "among": "matrix"}}, "rtn"],
            "wanda takes 2:4 of every few weights side by side, not among a matrix",
        ),
        (["magnitude"], None),
    ],
)
def test_what_cannot_work_is_refused_before_anything_begins(listed, said):
    if said is None:
        made = small()
        weight = made.weights["blocks.0.mixer.q.weight"]
        rounded = QuantizedWeight.from_array(weight.load(), LinearFormat.parse("int4-g32"))
        weights = type(made.weights)({**made.weights, "blocks.0.mixer.q.weight": rounded})
        model, said = type(made)(made.name, made.spec, weights), "quantized already"
    else:
        model = small()
    with pytest.raises(UserError, match=said):
        check_recipe(model, recipe_of(listed))


def test_what_is_pruned_may_be_pruned_further(tmp_path):
    half = through(small(), "wanda", tmp_path / "half")
    more = through(half, "wanda", tmp_path / "more", sparsity="75%")
    for name, weight in pruned(more).items():
        array, before = weight.load(), half.weights.array(name)
        assert np.count_nonzero(array) <= 0.26 * array.size
        np.testing.assert_array_equal(array[array != 0], before[array != 0])
