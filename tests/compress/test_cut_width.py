"""The residual width cut: what has no energy goes and nothing changes, guesses are numpy's, and what is left is an ordinary model."""

import dataclasses

import msgspec
import numpy as np
import pytest
import torch

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load, save, unread_elsewhere
from hasten.compress.cut.width import FINAL, Basis, CutWidth, check_cut_width, cut_width, final_scales, reading
from hasten.compress.recipe import recipe_of
from hasten.compress.rotate import turns_of
from hasten.compress.walk import Run
from hasten.families import all_families
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weights
from hasten.program import lower
from hasten.spec import Exit
from tests.compress.models import KINDS, changed, cut, random_weights, small, windows_for
from tests.families.oracles import make_checkpoint, read_checkpoint

IDS = np.random.default_rng(5).integers(0, 90, 20).tolist()
FAMILIES = [(family, index) for family in all_families() for index in range(len(family.examples))]
CUT = {"deepseek_v3", "gpt_oss", "llama", "mamba", "mamba2", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next"}


def within(model, left, seed=0):
    """``model`` whose stream has energy in ``left`` directions only."""
    width, turns = model.spec.width, turns_of(lower(model.spec))
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, left)))[0]
    inside, arrays = basis @ basis.T, {}
    for name in turns.tables | turns.writers | turns.biases:
        array = model.weights.array(name)
        made = inside @ array if name in turns.writers else array @ inside
        arrays[name] = np.ascontiguousarray(made.astype(np.float32))
    return changed(model, arrays)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compensate", [True, False])
def test_directions_without_energy_go_and_nothing_changes(kind, tied, compensate, tmp_path):
    spec = small(kind).spec
    model = random_weights(msgspec.structs.replace(spec, head=msgspec.structs.replace(spec.head, tied=tied)))
    if tied:  # one number for all features: no other can be said in another basis
        model = changed(model, {"norm.weight": np.full(spec.width, 0.7, np.float32)})
    model = within(model, 102)
    made = cut(model, {"cut_width": {"share": 0.25, "compensate": compensate}}, tmp_path, windows_for(model, lengths=(48,) * 12))
    assert made.spec.width == 102
    assert made.spec.head.tied == tied
    expected, found = model.logits(IDS), made.logits(IDS)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    evidence = made.provenance[-1].evidence
    assert evidence["kept_energy"] == pytest.approx(1)
    assert evidence["width"] == [136, 102]
    assert made.weights.parameters == 0.75 * model.weights.parameters
    save(made, tmp_path / "m")
    read = load(str(tmp_path / "m"))
    assert read.spec == made.spec
    assert np.allclose(read.logits(IDS), found, atol=1e-4)
    assert np.sqrt(np.mean((read.logits(IDS, "cpu") - found) ** 2)) < 0.05 * found.std()  # it plays natively, in bf16


def basis_of(rows, width, left, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, width)) @ random.normal(size=(width, width))
    kept = np.linalg.qr(random.normal(size=(width, left)))[0]
    return x, Basis(torch.tensor(kept), {FINAL: torch.tensor(x.T @ x / rows)})


def test_what_reads_guesses_as_numpy_does():
    x, basis = basis_of(200, 12, 8)
    kept = basis.kept.numpy()
    read = x @ kept * basis.scale(FINAL)
    expected = np.linalg.lstsq(read, x, rcond=None)[0].T
    assert np.allclose(reading(basis, FINAL, normed=True, compensate=True, damp=1e-9).numpy(), expected, atol=1e-4)
    assert np.allclose(reading(basis, FINAL, normed=True, compensate=False, damp=1e-9).numpy(), kept / basis.scale(FINAL), atol=1e-6)
    assert basis.energy(FINAL) == pytest.approx(((x @ kept) ** 2).sum() / (x**2).sum())
    over = read / np.sqrt((read**2).mean()) * np.sqrt((x**2).mean())  # a norm over fewer hands on as much a feature
    assert np.allclose(over, read, rtol=1e-9)


def test_the_last_scales_are_numpys():
    x, basis = basis_of(60, 12, 8)
    random = np.random.default_rng(1)
    table, old = random.normal(size=(30, 12)).astype(np.float32), random.uniform(0.5, 2, 12).astype(np.float32)
    kept = basis.kept.numpy()
    read, narrow = x @ kept * basis.scale(FINAL), table @ kept
    features = (read[:, None, :] * narrow[None]).reshape(-1, 8)
    expected = np.linalg.lstsq(features, ((x * old) @ table.T).reshape(-1), rcond=None)[0]
    assert np.allclose(final_scales(torch.tensor(table), torch.tensor(old), basis, damp=1e-9).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lost_is_less_where_what_reads_makes_it_good(kind, tmp_path):
    model = random_weights(small(kind).spec)
    text, expected, away = windows_for(model, lengths=(48,) * 24), model.logits(IDS), []
    for compensate in (True, False):
        made = cut(model, {"cut_width": {"compensate": compensate}}, tmp_path / str(compensate), text)
        away.append(np.sqrt(np.mean((made.logits(IDS) - expected) ** 2)))
        assert 0.75 < made.provenance[-1].evidence["kept_energy"] < 1
    assert away[0] < away[1] < expected.std()


@pytest.mark.parametrize(("family", "index"), FAMILIES, ids=lambda value: getattr(value, "name", value))
def test_every_familys_model_is_cut_or_refused(family, index, tmp_path):
    model = random_weights(family.spec(family.examples[index]))
    if family.name not in CUT:
        with pytest.raises(UnsupportedError, match="residual stream cannot be cut: .*(norm|LayerNorm).*leave cut_width out"):
            check_cut_width(model, CutWidth())
        return
    made = cut(model, {"cut_width": {}}, tmp_path)
    assert made.spec.width == 0.75 * model.spec.width
    assert made.spec.head == model.spec.head
    assert [msgspec.structs.replace(block) for block in made.spec.blocks] == list(model.spec.blocks)
    wide = {name for name, shape in lower(model.spec).params.items() if made.weights[name].shape != shape}
    turns = turns_of(lower(model.spec))
    assert wide == {*turns.tables, *turns.readers, *turns.writers, *turns.biases, *turns.norms}
    assert np.isfinite(made.logits(IDS[:8])).all()


@pytest.mark.parametrize(
    ("name", "index"),
    [("llama", 0), ("llama", 1), ("qwen2", 1), ("qwen3", 0), ("mixtral", 0), ("phi3", 0), ("deepseek_v3", 0), ("mamba", 0)],
)
def test_transformers_loads_it_with_the_same_logits(name, index, tmp_path):
    config = next(family for family in all_families() if family.name == name).examples[index]
    make_checkpoint(config, tmp_path / "plain")
    model = load(str(tmp_path / "plain"))
    made = cut(model, {"cut_width": {}}, tmp_path / "work")
    assert not unread_elsewhere(made)
    save(made, tmp_path / "m")
    expected, found = read_checkpoint(tmp_path / "m")(IDS), made.logits(IDS)
    assert np.abs(expected - found).max() < 1e-4 * np.abs(expected).max()
    assert np.allclose(load(str(tmp_path / "m")).logits(IDS), found, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_kills_change_nothing(threads, tmp_path):
    model = small()
    text, settings = windows_for(model), CutWidth()
    whole = cut_width(model, settings, text, Run(tmp_path / "a", 1))

    def stop(doing, done, of):
        if doing == "block 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_width(model, settings, text, Run(tmp_path / "b", threads, stop))
    assert (tmp_path / "b" / "block-0000.safetensors").is_file()
    again = cut_width(model, settings, text, Run(tmp_path / "b", threads))
    for name in whole.weights:
        assert np.array_equal(whole.weights.array(name), again.weights.array(name))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"share": 0.0}, "share is 0.0; accepted"),
        ({"share": 1.0}, "share is 1.0; accepted"),
        ({"share": 0.001}, "none of them"),
        ({"share": 0.999}, "all of them"),
        ({"damp": 0.0}, "damp is 0.0"),
    ],
)
def test_what_cannot_work_is_refused_first(settings, reason):
    (step,) = recipe_of([{"cut_width": settings}])
    with pytest.raises(ConfigError, match=reason):
        step.transform.check(small(), step.settings)


def test_what_is_rounded_or_leaves_early_is_not_cut():
    model = small()
    name = "blocks.1.mixer.q.weight"
    rounded = QuantizedWeight.from_array(model.weights.array(name), LinearFormat.parse("int8"))
    with pytest.raises(ConfigError, match=f"{name} is quantized already"):
        check_cut_width(dataclasses.replace(model, weights=Weights({**model.weights, name: rounded})), CutWidth())
    spec = msgspec.structs.replace(model.spec, exits=(Exit(after=0, norm=model.spec.norm, head=model.spec.head),))
    with pytest.raises(UnsupportedError, match="early exits"):
        check_cut_width(random_weights(spec), CutWidth())
