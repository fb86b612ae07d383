"""What is pruned, by hand and by brute force, and that what looks at inputs gives smaller errors than what does not."""

import itertools

import numpy as np
import pytest
import torch

from hasten.base.errors import ConfigError
from hasten.compress.prune import OfEvery, Share, magnitude, parse_pattern, sparsegpt, wanda


def data(out, size, seed=0, rows=400):
    """A weight, and second moments of inputs that go together and differ in size."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=draw)
    mixing = torch.randn(size, size, generator=draw) / size**0.5 + torch.eye(size)
    x = torch.randn(rows, size, generator=draw) @ mixing * (0.1 + 3 * torch.rand(size, generator=draw))
    return weight, (x.double().T @ x.double())


def error(weight, made, moments):
    difference = (weight - made).double()
    return ((difference @ moments) * difference).sum().item()


def test_magnitude_takes_the_smallest_of_all():
    weight, _ = data(7, 30)
    keep = magnitude(weight, Share(0.7))
    assert keep.sum() == 210 - 147
    assert weight.abs()[keep].min() >= weight.abs()[~keep].max()


def test_wanda_takes_the_smallest_of_each_row():
    weight, moments = data(7, 30)
    keep = wanda(weight, moments, Share(0.5))
    scores = weight.abs().numpy() * np.sqrt(np.diag(moments.numpy()))
    for row, kept in zip(scores, keep.numpy()):
        assert kept.sum() == 15
        assert row[kept].min() >= row[~kept].max()


def test_wanda_takes_the_smallest_of_the_matrix_where_asked():
    weight, moments = data(7, 30)
    keep = wanda(weight, moments, Share(0.7), "matrix")
    scores = weight.abs() * moments.diagonal().sqrt()
    assert keep.sum() == 210 - 147
    assert scores[keep].min() >= scores[~keep].max()
    assert len(set(keep.sum(1).tolist())) > 1  # rows keep what they deserve


@pytest.mark.parametrize("size", [32, 30])
def test_groups_keep_their_largest(size):
    weight, moments = data(5, size)
    for keep, scores in (
        (magnitude(weight, OfEvery(2, 4)), weight.abs()),
        (wanda(weight, moments, OfEvery(2, 4)), weight.abs() * moments.diagonal().sqrt()),
    ):
        for begin in range(0, size, 4):
            part, kept = scores[:, begin : begin + 4], keep[:, begin : begin + 4]
            assert (kept.sum(1) == 2).all()
            assert (part.masked_fill(~kept, torch.inf).amin(1) >= part.masked_fill(kept, -torch.inf).amax(1)).all()


def test_equal_ones_are_kept_from_the_left():
    keep = Share(0.5).keep(torch.ones(2, 6))
    assert keep.tolist() == [[True, True, True, False, False, False]] * 2


@pytest.mark.parametrize("pattern", [Share(0.5), Share(0.8), OfEvery(2, 4), OfEvery(1, 4)])
@pytest.mark.parametrize("size", [64, 200, 270])
def test_sparsegpt_is_as_sparse_and_closer(pattern, size):
    weight, moments = data(24, size, seed=size)
    made = sparsegpt(weight, moments, pattern)
    zeros = (made == 0).float().mean().item()
    share = pattern.share if isinstance(pattern, Share) else 1 - pattern.kept / pattern.of
    assert zeros == pytest.approx(share, abs=0.01)
    if isinstance(pattern, OfEvery):
        for begin in range(0, size, pattern.of):
            assert ((made[:, begin : begin + pattern.of] != 0).sum(1) <= pattern.kept).all()
    by_wanda = weight * wanda(weight, moments, pattern)
    by_size = weight * magnitude(weight, pattern)
    assert error(weight, made, moments) < 0.98 * error(weight, by_wanda, moments)
    assert error(weight, by_wanda, moments) < error(weight, by_size, moments)


def test_sparsegpt_makes_one_weight_good_as_the_formula_says():
    """One of a row goes: the rest becomes what least squares says, where nothing stands before it."""
    weight, moments = data(1, 6, seed=3)
    hessian = moments + 0.01 * moments.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    made = sparsegpt(weight.double(), moments, Share(1 / 6))
    gone = int((made[0] == 0).nonzero()[0])
    rest = [place for place in range(6) if place > gone]
    expected = weight.double().clone()
    expected[0, gone] = 0
    if rest:
        inside = hessian[rest][:, rest]
        expected[0, rest] += torch.linalg.solve(inside, hessian[rest][:, gone]) * weight[0, gone].double()
    torch.testing.assert_close(made, expected)


def test_no_choice_of_two_in_four_is_much_better():
    """Against every mask of one group, each with its least-squares weights: greedy is not far from the best."""
    weight, moments = data(6, 4, seed=5)
    made = error(weight, sparsegpt(weight, moments, OfEvery(2, 4), damp=1e-6), moments)
    best = 0.0
    for row in weight.double():
        found = []
        for kept in itertools.combinations(range(4), 2):
            kept = list(kept)
            solved = torch.linalg.solve(moments[kept][:, kept], moments[kept] @ row)
            whole = torch.zeros(4, dtype=torch.float64)
            whole[kept] = solved
            found.append(float((row - whole) @ moments @ (row - whole)))
        best += min(found)
    assert best <= made * (1 + 1e-6)
    assert made < 3 * best


@pytest.mark.parametrize(
    ("text", "pattern"), [("50%", Share(0.5)), ("12.5%", Share(0.125)), ("2:4", OfEvery(2, 4)), ("1:8", OfEvery(1, 8))]
)
def test_patterns(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize("text", ["", "0%", "100%", "4:2", "2:2", "0:4", "half", "50", "-5%", "1e1%"])
def test_what_is_no_pattern(text):
    with pytest.raises(ConfigError, match=r"as 50%, or how many of how many stay, as 2:4"):
        parse_pattern(text)
