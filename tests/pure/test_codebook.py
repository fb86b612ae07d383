"""Codebooks: that the best is found, that 0 stays 0, and what stored places mean."""

import itertools

import numpy as np
import pytest

from hasten.formats.codebook import LIMIT, SIZE, fitted, nearest, places
from hasten.formats.linear import ClusteredLinear, LinearFormat

KINDS = ["normal", "above", "below", "few", "two heaps", "zeros"]


def weight_of(kind, seed=0, out=9, size=70):
    random = np.random.default_rng(seed)
    dense = random.normal(size=(out, size)) * random.uniform(0.1, 3, size=(out, 1))
    match kind:
        case "above":
            dense = np.abs(dense)
        case "below":
            dense = -np.abs(dense)
        case "few":
            dense = np.rint(dense)
        case "two heaps":
            dense = np.where(dense > 0, 0.01 * dense + 1, 0.3 * dense - 4)
        case "zeros":
            dense *= 0
    return dense.astype(np.float32)


def cost_of(codebook, steps, weights):
    return float((np.abs(steps.astype(np.float64)[..., None] - np.asarray(codebook, np.float64)).min(-1) ** 2 * weights).sum())


def slow_best_cost(steps, weights):
    """Of all increasing paths of 16 numbers through -127 to 127 and through 0, the cheapest, by its definition."""
    steps, weights, levels = steps.astype(np.float64).ravel(), np.broadcast_to(weights, steps.shape).ravel(), range(-LIMIT, LIMIT + 1)

    def between(a, b):
        inside = (steps > a) & (steps <= b)
        return (np.minimum((steps - a) ** 2, (steps - b) ** 2) * weights)[inside].sum()

    pairs = {(a, b): between(a, b) for a, b in itertools.combinations(levels, 2)}
    reached = {a: ((steps - a) ** 2 * weights)[steps <= a].sum() for a in levels if a <= 0}  # paths that have not passed 0 unseen
    for _ in range(SIZE - 1):
        reached = {b: min((cost + pairs[a, b] for a, cost in reached.items() if a < b and not a < 0 < b), default=np.inf) for b in levels}
    return min(cost + ((steps - a) ** 2 * weights)[steps > a].sum() for a, cost in reached.items() if a >= 0)


@pytest.mark.parametrize(("kind", "weighed"), [("normal", False), *((kind, True) for kind in KINDS)])
def test_the_best_codebook_is_found(kind, weighed):
    weight = weight_of(kind)
    importance = np.random.default_rng(1).uniform(0, 4, weight.shape[1]) if weighed else np.ones(weight.shape[1])
    scales = np.maximum(np.abs(weight).max(axis=1, keepdims=True), np.float32(1e-9)) / np.float32(LIMIT)
    codebook = fitted(weight, scales, weight.shape[1], importance if weighed else None)
    assert codebook.dtype == np.int8
    assert len(codebook) == SIZE
    assert 0 in codebook
    assert (np.diff(codebook.astype(int)) > 0).all()
    assert np.abs(codebook.astype(int)).max() <= LIMIT
    steps, weights = weight / scales, scales.astype(np.float64) ** 2 * importance
    found = cost_of(codebook, steps, weights)
    assert found <= slow_best_cost(steps, weights) * (1 + 1e-6) + 1e-12
    random = np.random.default_rng(2)
    for _ in range(20):
        other = [0, *random.permutation(np.delete(np.arange(-LIMIT, LIMIT + 1), LIMIT))[: SIZE - 1]]
        assert found <= cost_of(other, steps, weights)


def test_every_step_goes_to_the_nearest():
    codebook = np.array([-127, -90, -61, -40, -22, -9, -2, -1, 0, 3, 8, 20, 41, 60, 99, 127], np.int8)
    steps = np.linspace(-127, 127, 254 * 8 + 1, dtype=np.float32)
    away = np.abs(steps[:, None].astype(np.float64) - codebook)
    found = away[np.arange(len(steps)), nearest(steps, codebook)]
    np.testing.assert_array_equal(found, away.min(axis=1))
    tie = np.float32((3 + 8) / 2)
    assert codebook[nearest(np.array([tie, -5.5, 0, -0.0], np.float32), codebook)].tolist() == [8, -2, 0, 0]


@pytest.mark.parametrize("name", ["lut4", "lut4-g64", "lut4-g32", "lut4-channel"])
@pytest.mark.parametrize("shape", [(1, 1), (9, 70), (33, 300), (3, 8, 100)])
def test_what_places_mean_in_loops(name, shape):
    form = LinearFormat.parse(name)
    dense = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    its = form.quantize(dense)
    assert isinstance(its, ClusteredLinear)
    assert its.codebook.shape == (*shape[:-2], SIZE)
    meant = np.full(shape, np.nan, np.float32)
    for at in np.ndindex(shape):
        scale = its.scales[(*at[:-1], at[-1] // its.group)]
        meant[at] = np.float32(its.codebook[(*at[:-2], its.q[at])]) * scale
    np.testing.assert_array_equal(its.dense(), meant)
    if len(shape) == 3:
        for index in range(shape[0]):
            alone = form.quantize(dense[index])
            np.testing.assert_array_equal(its[index].dense(), alone.dense())
            np.testing.assert_array_equal(its[index].codebook, alone.codebook)


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("group", [0, 32])
def test_it_is_nearer_than_even_steps(kind, group):
    """Every grid of int4 lies on numbers of one byte but for rounding, so the best codebook is at least about as near."""
    weight = weight_of(kind, 4, 40, 256)
    lost = {number: np.square(weight - LinearFormat(number, group).quantize(weight).dense()).sum() for number in ("lut4", "int4")}
    assert lost["lut4"] < lost["int4"] * 1.01 + 1e-9, lost


def test_zeros_stay_zeros():
    weight = weight_of("two heaps", 5, 8, 100)
    weight[:, ::3] = 0
    made = LinearFormat("lut4", 32).quantize(weight).dense()
    assert (made[:, ::3] == 0).all()
    np.testing.assert_array_equal(LinearFormat("lut4").quantize(0 * weight).dense(), 0 * weight)


def test_what_is_not_finite_shows_in_its_group_and_spoils_no_other():
    weight = weight_of("normal", 6, 4, 128)
    expected = LinearFormat("lut4", 64).quantize(weight)
    weight[1, 70], weight[2, 3] = np.nan, np.inf
    made = LinearFormat("lut4", 64).quantize(weight).dense()
    assert not np.isfinite(made[1, 64:]).any()
    assert not np.isfinite(made[2, :64]).any()
    assert np.isfinite(np.delete(made, [1, 2], axis=0)).all()
    assert np.abs(made[0] - expected.dense()[0]).max() < np.abs(weight[0]).max() / 4


def test_places_are_those_of_the_codebook_given():
    codebook = np.arange(-8, 8, dtype=np.int8)
    weight = np.array([[-8, -7.6, 0.4, 7.9, 20, -20]], np.float32)
    assert codebook[places(weight, np.ones((1, 1), np.float32), 6, codebook)].tolist() == [[-8, -8, 0, 7, 7, -8]]
