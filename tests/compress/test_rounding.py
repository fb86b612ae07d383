"""Rounding one matrix: each method against its definition, an independent implementation, or what must hold of it."""

import itertools

import numpy as np
import pytest
import torch

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.descend import descend, output_loss
from hasten.compress.gptq import aimed, damped, gptq, inverse_factor
from hasten.compress.grid import Grid
from hasten.compress.rtn import round_to_nearest
from hasten.formats.linear import LinearFormat
from tests.compress.matrices import inputs_of, loss_of, slow_gptq, weight_of

NAMES = ["int8", "int4-g32", "int4-g64-zp", "int4-channel", "int3-g32", "int3-g32-zp", "int2-g64-zp", "fp8", "fp8-g128"]
formats = pytest.mark.parametrize("name", NAMES)
SHAPES = [(1, 1), (5, 31), (17, 96), (3, 130), (40, 200)]  # out, in


@formats
@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_round_to_nearest_is_what_the_format_says(name, out, size):
    form, weight = LinearFormat.parse(name), weight_of(out + size, out, size).float()
    made, expected = round_to_nearest(weight, form), form.quantize(weight.numpy())
    assert np.array_equal(made.q, expected.q)
    assert np.array_equal(made.scales, expected.scales)
    assert np.array_equal(made.dense(), expected.dense())


@formats
@pytest.mark.parametrize("seed", range(3))
def test_a_search_never_does_worse_by_its_own_measure(name, seed):
    form, weight, x = LinearFormat.parse(name), weight_of(seed, 20, 130), inputs_of(seed, 300, 130)
    moments = x.T @ x
    plain, searched = (round_to_nearest(weight, form, clip=clip) for clip in ("none", "weights"))
    by_group = form.group or 130

    def plain_error(made):
        return ((weight.numpy() - made.dense()) ** 2).sum()

    def output_error(made):  # every group by itself, as the search sees it
        error = weight.numpy() - made.dense()
        cut = [slice(begin, begin + by_group) for begin in range(0, 130, by_group)]
        return sum(((error[:, part] @ moments.numpy()[part, part]) * error[:, part]).sum() for part in cut)

    assert plain_error(searched) <= plain_error(plain) * (1 + 1e-6)
    weighed = round_to_nearest(weight, form, clip="outputs", moments=moments)
    assert output_error(weighed) <= output_error(plain) * (1 + 1e-6)
    if form.bits < 5:
        assert plain_error(searched) < plain_error(plain)
        assert searched.q.min() == -(2 ** (form.bits - 1)) < plain.q.min() or form.zero_points  # the number that a whole range cannot use
        assert output_error(weighed) < output_error(plain)


def test_formats_without_scales_are_refused():
    with pytest.raises(UnsupportedError, match="no scales"):
        round_to_nearest(weight_of(0, 4, 8), LinearFormat("bf16"))


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64-zp", "int3-channel", "int8"])
@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("seed", range(2))
def test_gptq_is_the_papers_equations(name, order, seed):
    form, size = LinearFormat.parse(name), 150  # more than one lazy block, and a group that is not whole
    weight, x = weight_of(seed, 12, size), inputs_of(seed, 400, size)
    moments = x.T @ x
    made = gptq(weight, moments, form, order=order)
    grid = Grid.fit(weight, form)
    diagonal = moments.diagonal().numpy()
    columns = np.arange(size) if order == "given" else np.argsort(-diagonal, kind="stable")
    zeros = None if grid.zeros is None else grid.zeros.numpy()
    expected = slow_gptq(weight.numpy(), damped(moments, 0.01).numpy(), form, grid.scales.numpy(), zeros, columns)
    assert np.array_equal(made.q, expected)
    assert not np.array_equal(made.q, round_to_nearest(weight, form).q)  # it did something


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64-zp", "int3-g32", "int2-g64-zp"])
@pytest.mark.parametrize("clip", ["none", "outputs"])
@pytest.mark.parametrize(("order", "static"), [("given", True), ("given", False), ("activation", True)])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_loses_less_than_rounding_to_nearest(name, clip, order, static, seed):
    form, weight, x = LinearFormat.parse(name), weight_of(seed, 24, 160).float(), inputs_of(seed, 500, 160)
    moments = x.T @ x
    made = gptq(weight, moments, form, order=order, static_groups=static, clip=clip)
    assert loss_of(weight, made, x) < loss_of(weight, round_to_nearest(weight, form), x)


def test_groups_that_are_not_static_take_their_scales_from_what_the_columns_became():
    form, weight, x = LinearFormat.parse("int3-g32"), weight_of(1, 8, 96), inputs_of(1, 300, 96)
    moving, fixed = (gptq(weight, x.T @ x, form, order="given", static_groups=static) for static in (False, True))
    assert np.array_equal(moving.scales[:, 0], fixed.scales[:, 0])  # nothing had moved yet
    assert not np.allclose(moving.scales[:, 1:], fixed.scales[:, 1:])


def test_activation_order_needs_static_groups():
    with pytest.raises(ConfigError, match="static groups"):
        gptq(weight_of(0, 4, 64), torch.eye(64), LinearFormat.parse("int4-g32"), static_groups=False)


def test_inputs_that_were_never_seen_are_rounded_to_nearest():
    form, weight = LinearFormat.parse("int4-g32"), weight_of(3, 8, 64).float()
    made = gptq(weight, torch.zeros(64, 64), form)
    assert np.array_equal(made.q, round_to_nearest(weight, form).q)


def test_moments_that_are_singular_are_told_so():
    x = inputs_of(0, 3, 40)
    with pytest.raises(ConfigError, match="damping"):
        gptq(weight_of(0, 4, 40), x.T @ x, LinearFormat.parse("int4-g32"), damp=0.0)


def test_the_factors_rows_factor_what_is_left():
    x = inputs_of(5, 100, 20)
    hessian = damped(x.T @ x, 0.01)
    factor = inverse_factor(hessian)
    for begin in range(20):
        left = factor[begin:, begin:]
        assert torch.allclose(left.T @ left, torch.linalg.inv(hessian[begin:, begin:]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64-zp", "int3-channel"])
@pytest.mark.parametrize("start", ["rtn", "gptq"])
@pytest.mark.parametrize("seed", range(2))
def test_descent_only_goes_down(name, start, seed):
    form, weight, x = LinearFormat.parse(name), weight_of(seed, 16, 150).float(), inputs_of(seed, 400, 150)
    moments = x.T @ x
    begun = round_to_nearest(weight, form) if start == "rtn" else gptq(weight, moments, form)
    made = descend(weight, begun, moments, form)
    before, after = (output_loss(weight, torch.from_numpy(each.dense()), damped(moments, 0.01)) for each in (begun, made))
    assert after < before
    limits = (-8, 7) if form.bits == 4 else (-4, 3)
    assert limits[0] <= made.q.min() <= made.q.max() <= limits[1]
    assert np.array_equal(made.q, np.rint(made.q))
    assert (made.scales > 0).all()


def test_descent_ends_where_no_single_code_can_be_bettered():
    form, weight, x = LinearFormat.parse("int3-g32"), weight_of(2, 3, 40).float(), inputs_of(2, 200, 40)
    hessian = damped(x.T @ x, 0.01)
    made = descend(weight, round_to_nearest(weight, form), x.T @ x, form, rounds=100)
    best = output_loss(weight, torch.from_numpy(made.dense()), hessian)
    spread = np.repeat(made.scales, 32, axis=1)[:, :40]
    for row, column, step in itertools.product(range(3), range(40), (-1, 1)):
        dense = made.dense()
        if abs(made.q[row, column] + step) <= 3:
            dense[row, column] += step * spread[row, column]
            assert output_loss(weight, torch.from_numpy(dense), hessian) >= best * (1 - 1e-5)


def test_the_aim_is_the_least_squares_solution():
    weight, u = weight_of(4, 6, 30), inputs_of(4, 500, 30)
    x = u + 0.1 * torch.from_numpy(np.random.default_rng(9).normal(size=u.shape))
    made = aimed(weight, x.T @ x, u.T @ x, 1e-9)
    expected = np.linalg.lstsq(x.numpy(), (u @ weight.T).numpy(), rcond=None)[0].T
    assert np.allclose(made.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(aimed(weight, u.T @ u, u.T @ u, 0.01), weight, rtol=1e-6, atol=1e-8)  # where nothing differs, itself
