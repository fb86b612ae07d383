"""The codebook transform: clusters weighed by what is read, errors fed back, and what it makes of whole models."""

import numpy as np
import pytest
import torch

from hasten.backends.cpu import CpuBackend
from hasten.base.errors import UserError
from hasten.checkpoint import load_directory
from hasten.compress.codebook import Book, Cluster
from hasten.compress.gates import save_checked
from hasten.compress.gptq import damped, in_turn
from hasten.compress.recipe import carry_out, check_recipe, find_transform, recipe_of
from hasten.compress.walk import Run
from hasten.formats.linear import ClusteredLinear, LinearFormat
from hasten.formats.quantized import QuantizedWeight
from tests.compress.matrices import inputs_of, loss_of, weight_of
from tests.compress.models import KINDS, small, windows_for
from tests.compress.test_transforms import distance, same, through

NAMES = ["lut4-g32", "lut4-g64", "lut4-channel"]


@pytest.mark.parametrize("name", NAMES)
def test_one_round_is_what_the_format_quantizes(name):
    form, weight = LinearFormat.parse(name), weight_of(0, 24, 150).float().numpy()
    made, expected = Book.fit(weight, form).nearest(weight), form.quantize(weight)
    for part in ("q", "scales", "codebook"):
        np.testing.assert_array_equal(getattr(made, part), getattr(expected, part))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_rounds_and_importance_lower_the_error_they_are_for(name, seed):
    form, weight = LinearFormat.parse(name), weight_of(seed, 24, 150).float().numpy()
    importance = np.exp(np.random.default_rng(seed).normal(size=150))

    def lost(book, each):
        return float((np.square(weight - book.nearest(weight).dense(), dtype=np.float64) * each).sum())

    once, more = Book.fit(weight, form), Book.fit(weight, form, rounds=6)
    assert lost(more, 1) < 0.99 * lost(once, 1)
    assert (more.scales > 0).all()
    weighed = Book.fit(weight, form, importance, rounds=6)
    assert lost(weighed, importance) < lost(more, importance)


@pytest.mark.parametrize("name", NAMES)
def test_places_and_meaning_agree_with_numpy(name):
    form, weight = LinearFormat.parse(name), weight_of(4, 24, 150).float()
    book, inputs = Book.fit(weight.numpy(), form), torch.randperm(150, generator=torch.Generator().manual_seed(0))
    expected = book.nearest(weight.numpy())
    codes = book.codes(weight[:, inputs], inputs)
    np.testing.assert_array_equal(codes.numpy(), expected.q[:, inputs])
    np.testing.assert_array_equal(book.dense(codes, inputs).numpy(), expected.dense()[:, inputs])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_feedback_is_slow_optimal_brain_quantization(name, seed):
    """Each input's error made good by those not yet rounded, with the inverse of their Hessian made anew for every input."""
    form, weight, x = LinearFormat.parse(name), weight_of(seed, 12, 90), inputs_of(seed, 300, 90)
    moments, columns = x.T @ x, torch.randperm(90, generator=torch.Generator().manual_seed(seed))
    book = Book.fit(weight.float().numpy(), form, rounds=3)
    made = in_turn(weight, moments, book, columns, damp=0.01)
    hessian, left, rest = damped(moments, 0.01).numpy(), weight.numpy().copy(), columns.tolist()
    numbers, places = book.codebook.astype(np.float64), np.full(weight.shape, -1)
    for q in columns.tolist():
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        at, scale = rest.index(q), book.scales[:, q // book.group].astype(np.float64)
        place = np.abs(left[:, q, None] / scale[:, None] - numbers).argmin(axis=1)
        places[:, q] = place
        left[:, rest] -= np.outer((left[:, q] - numbers[place] * scale) / inverse[at, at], inverse[at])
        rest.remove(q)
    assert (made.q == places).mean() > 0.999
    assert loss_of(weight, made, x) < loss_of(weight, book.nearest(weight.float().numpy()), x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_clustered_and_the_rest_is_left(kind, tmp_path):
    model = small(kind)
    made = through(model, [{"codebook": {"weights": "lut4-g32", "fit": "weights", "feedback": False, "rounds": 1}}], tmp_path / "plain")
    names = [name for name, weight in made.weights.items() if isinstance(weight, QuantizedWeight)]
    assert len(names) == 14
    for name in names:
        weight, expected = made.weights[name], LinearFormat.parse("lut4-g32").quantize(model.weights.array(name))
        assert isinstance(weight.quantized(), ClusteredLinear)
        assert np.array_equal(weight.quantized().codebook, expected.codebook)
        assert np.array_equal(weight.load(), expected.dense())
    for name in model.weights.keys() - set(names):
        assert made.weights[name] is model.weights[name]
    text = windows_for(model, lengths=(48,) * 40)
    fed = through(model, [{"codebook": {"weights": "lut4-g32"}}], tmp_path / "fed", text=text)
    assert distance(model, fed) < distance(model, made)
    (step,) = fed.provenance
    assert (step.transform, step.settings["weights"]) == ("codebook", "lut4-g32")
    save_checked(fed, tmp_path / "kept")
    same(fed, load_directory(tmp_path / "kept", "kept"))


def test_threads_change_no_bit(tmp_path):
    model = small("MoE")
    same(*(through(model, ["codebook"], tmp_path / str(threads), threads) for threads in (1, 3)))


def test_text_is_needed_where_activations_are_looked_at(tmp_path):
    transform = find_transform("codebook")
    assert transform.needs_text(Cluster())
    assert transform.needs_text(Cluster(feedback=False))
    assert transform.needs_text(Cluster(fit="weights"))
    assert not transform.needs_text(Cluster(fit="weights", feedback=False))
    carry_out(small(), recipe_of([{"codebook": {"fit": "weights", "feedback": False}}]), None, Run(tmp_path, 1))


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([{"codebook": {"weights": "int4-g64"}}], "no codebook"),
        ([{"codebook": {"weights": "lut4-zp"}}], "no variant"),
        ([{"codebook": {"rounds": 0}}], "rounds"),
        ([{"codebook": {"damp": 1}}], "damp"),
        ([{"codebook": {"layers": ["blocks.7.*"]}}], "mean no weight"),
        ([{"rtn": {"weights": "lut4"}}], "codebook clusters"),
        ([{"gptq": {"weights": "lut4-g64"}}], "codebook clusters"),
        ([{"awq": {"weights": "lut4"}}, "rtn"], "awq has nothing"),
        ([{"codebook": {"head": "lut4"}}], "codebook clusters"),
        (["codebook", "gptq"], "would be rounded"),
        (["codebook", "awq"], "put it before"),
        (["magnitude", "codebook"], "no sparse form"),
    ],
)
def test_what_cannot_work_is_refused(listed, said, tmp_path):
    with pytest.raises(UserError, match=said):
        through(small(), listed, tmp_path / "work")


def test_what_is_clustered_is_not_rounded_again(tmp_path):
    made = through(small(), [{"codebook": {"fit": "weights", "feedback": False}}], tmp_path)
    with pytest.raises(UserError, match="quantized already"):
        check_recipe(made, recipe_of(["gptq"]))


def test_every_expert_has_a_codebook_of_its_own_and_plays_with_it(tmp_path):
    model = small("MoE")
    made = through(model, [{"codebook": {"weights": "lut4-g32", "rounds": 1}}], tmp_path)
    stacked = {name: weight for name, weight in made.weights.items() if isinstance(weight, QuantizedWeight) and len(weight.shape) == 3}
    assert stacked
    packed = CpuBackend().session(made, 48).compiled.store._made
    for name, weight in stacked.items():
        books = weight.quantized().codebook
        assert books.shape == (weight.shape[0], 16)
        assert len(np.unique(books, axis=0)) > 1
        for index, matrix in enumerate(weight.load()):
            np.testing.assert_array_equal(packed[f"{name}[{index}]", "lut4-g32"].unpack(), matrix)
