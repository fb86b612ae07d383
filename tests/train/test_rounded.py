"""Weights that are rounded while they learn: they mean what is stored, and gradients are LSQ's."""

import numpy as np
import pytest
import torch

from hasten.formats.linear import LinearFormat
from hasten.train import Grid, Plain, Rounded
from hasten.train.rounded import INSIDE, SCALE

FORMS = ["int4-g32", "int4-channel", "int3-g64", "int8", "int4-g32-zp", "int2-g32-zp"]


def dense(shape=(5, 100), seed=3):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def grid(name, codes, seed=3, near=None):
    form = LinearFormat.parse(name)
    weight = dense(seed=seed)
    made = form.quantize(weight)
    return Grid.of("w", made, form, (weight if near is None else near) if codes else None), made, weight


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("codes", [False, True])
def test_it_begins_as_what_is_stored(name, codes):
    one, made, _ = grid(name, codes)
    assert torch.equal(one.weight().detach(), torch.tensor(made.dense()))
    after = one.made()
    assert np.array_equal(after.q, made.q)
    assert np.array_equal(after.scales, made.scales)
    assert (after.zeros is None) == (made.zeros is None)
    assert after.zeros is None or np.array_equal(after.zeros, made.zeros)


@pytest.mark.parametrize("name", FORMS)
def test_masters_begin_near_what_was_before(name):
    """Within their code, also where the codes are not the nearest."""
    form, weight = LinearFormat.parse(name), dense()
    made = form.quantize(dense(seed=4))  # of something else
    one = Grid.of("w", made, form, weight)
    assert np.array_equal(one.made().q, made.q)
    (master,) = one.codes.masters.values()
    steps = (master / one.scales.repeat_interleave(made.group, -1)[..., :100]).detach().numpy()
    codes = made.q - (0 if made.zeros is None else np.repeat(made.zeros, made.group, -1)[:, :100])
    assert np.abs(steps - codes).max() <= INSIDE + 1e-3
    assert np.abs(steps - codes).max() > 0.4


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_lsq(name):
    """Of (clamp(w / s) rounded) · s: to w 1 inside the range and 0 beyond, to s rounded − exact inside and the last code beyond."""
    form, weight = LinearFormat.parse(name), dense()
    made = form.quantize(weight)
    one = Grid.of("w", made, form, weight)
    (master,) = one.codes.masters.values()
    with torch.no_grad():
        master *= 1.5  # so that some lie beyond
    upstream = torch.tensor(dense(seed=9))
    one.weight().backward(upstream)
    scales = np.repeat(made.scales, made.group, -1)[:, :100]
    zeros = 0 if made.zeros is None else np.repeat(made.zeros, made.group, -1)[:, :100]
    most = 2 ** (form.bits - 1) - 1
    least = -most - (made.zeros is not None)
    exact = master.detach().numpy() / scales
    held = np.clip(exact, least - zeros, most - zeros)
    inside = exact == held
    assert 0.02 < (~inside).mean() < 0.9
    assert np.allclose(master.grad.numpy(), upstream.numpy() * inside, atol=1e-6)
    to_scale = upstream.numpy() * (np.rint(held) - np.where(inside, exact, 0)) * scales  # of its logarithm
    groups = [to_scale[:, begin : begin + made.group].sum(1) for begin in range(0, 100, made.group)]
    assert np.allclose(one.share.grad.numpy(), np.stack(groups, 1), atol=2e-3)


def test_kept_codes_stay_and_their_scales_learn():
    one, made, _ = grid("int4-g32", False)
    inner = Plain({"norm": torch.ones(4, requires_grad=True)}, frozenset())
    rounded = Rounded(inner, {"w": one})
    assert set(rounded.masters) == {"norm", "w" + SCALE}
    assert rounded.matrices == frozenset()
    with torch.no_grad():
        rounded.masters["w" + SCALE] += 0.5
    after = one.made()
    assert np.array_equal(after.q, made.q)
    assert np.allclose(after.scales, made.scales * np.exp(0.5))
    assert np.allclose(rounded.weights()["w"].detach().numpy(), after.dense(), rtol=1e-6)
    learned, _, _ = grid("int4-g32", True)
    assert Rounded(inner, {"w": learned}).matrices == {"w"}
