"""The native mixture-of-experts kernels at every instruction-set level of this machine, against plain loops and one row alone."""

import zlib

import numpy as np
import pytest

from hasten import _native
from hasten.program import ops
from tests.ops import naive
from tests.ops.packing import weight_buffer
from tests.ops.test_native_linear import FORMATS, as_bf16, as_float, check, quantized

ISAS = _native.available_isas()
POOL = _native.ThreadPool(1)


def random(*key):
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def normal(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


# --- choosing

ROUTERS = {
    "softmax": (6, 2, {"score": "softmax", "normalize": True, "scale": 1.0}),
    "many": (128, 8, {"score": "softmax", "normalize": False, "scale": 2.5}),
    "all": (5, 5, {"score": "softmax", "normalize": True, "scale": 1.5}),
    "one": (1, 1, {"score": "sigmoid", "normalize": True, "scale": 1.0}),
    "sigmoid-corrected": (7, 3, {"score": "sigmoid", "normalize": True, "scale": 1.5, "correction": "c"}),
    "groups": (12, 3, {"score": "sigmoid", "normalize": True, "scale": 2.5, "correction": "c", "groups": 4, "top_groups": 2}),
    "groups-of-one": (4, 2, {"score": "sigmoid", "normalize": False, "scale": 1.0, "groups": 4, "top_groups": 3}),
    "groups-filled": (16, 8, {"score": "softmax", "normalize": True, "scale": 1.0, "groups": 4, "top_groups": 2}),
    "deepseek": (256, 8, {"score": "sigmoid", "normalize": True, "scale": 2.5, "correction": "c", "groups": 8, "top_groups": 4}),
}


def routed(op, logits, correction):
    """Native experts and weights, over poison."""
    experts, weights = np.full((len(logits), op.top_k), -1, np.int32), np.full((len(logits), op.top_k), np.nan, np.float32)
    given = correction if op.correction else None
    _native.route(logits, given, op.score == "sigmoid", op.normalize, op.scale, op.groups, op.top_groups, experts, weights)
    return experts, weights


def route_op(name):
    count, top_k, fields = ROUTERS[name]
    return count, ops.Route(logits="x", experts="e", weights="w", top_k=top_k, **fields)


@pytest.mark.parametrize("rows", [0, 1, 17, 70])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tied", [False, True])
def test_route(name, rows, tied):
    """The loops' experts exactly, ties and all; weights within 1e-6 of themselves."""
    count, op = route_op(name)
    rng = random("route", name, rows)
    logits = rng.integers(-1, 2, (rows, count)).astype(np.float32) if tied else normal(rng, rows, count, scale=3)
    correction = np.zeros(count, np.float32) if tied else normal(rng, count, scale=0.2)
    experts, weights = routed(op, logits, correction)
    world = naive.World({}, {"c": correction}, None, {}, {})
    expected, expected_weights = naive.route(op, world, logits)
    np.testing.assert_array_equal(experts, expected.reshape(rows, op.top_k))
    np.testing.assert_allclose(weights, expected_weights.reshape(rows, op.top_k), rtol=1e-6)
    for row in range(rows):
        alone = routed(op, logits[row : row + 1], correction)
        assert np.array_equal(alone[0][0], experts[row])
        assert np.array_equal(alone[1][0], weights[row])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_route_stays_in_range_whatever_the_logits_are(name, poison):
    count, op = route_op(name)
    logits = normal(random("poison"), 9, count)
    logits[::2] = poison
    logits[1, ::2] = poison
    experts, _ = routed(op, logits, np.zeros(count, np.float32))
    assert experts.min() >= 0
    assert experts.max() < count
    assert all(len(set(row)) == op.top_k for row in experts.tolist())


def test_what_route_refuses():
    logits, experts, weights = np.zeros((2, 6), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32)
    for groups, top_groups in ((4, 1), (0, 0), (3, 4), (3, 1)):
        with pytest.raises(ValueError, match="groups"):
            _native.route(logits, None, False, True, 1.0, groups, top_groups, experts, weights)


# --- laying out


def choices(rng, tokens, top_k, count):
    """Distinct experts for every token."""
    return np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]).astype(np.int32).reshape(tokens, top_k)


def awkward(rng, tokens, count):
    """Choices [tokens, top_k] by name: spread, one expert idle, all rows on one expert, every expert by every row."""
    without_last = choices(rng, tokens, 2, count - 1)
    return {
        "spread": choices(rng, tokens, 2, count),
        "idle": np.where(without_last >= 1, without_last + 1, without_last).astype(np.int32),  # nobody chose expert 1
        "one": np.full((tokens, 1), count - 2, np.int32),
        "all": choices(rng, tokens, count, count),
    }


@pytest.mark.parametrize("tokens", [0, 1, 17, 200])
def test_group_by_expert(tokens):
    for name, experts in awkward(random("group", tokens), max(tokens, 1), 6).items():
        experts = experts[:tokens]
        starts, places = _native.group_by_expert(experts, 6)
        order = np.argsort(experts.ravel(), kind="stable")
        assert np.array_equal(np.argsort(places), order), name
        assert starts == [0, *np.cumsum(np.bincount(experts.ravel(), minlength=6)).tolist()], name


# --- products


def poisoned_product(isa, threads, weights, x, experts, bias, out):
    y = np.full((experts.size, out), np.nan, np.float32)
    _native.expert_linear(isa, threads, weights, x, experts, bias, y)
    return y


def expert_weights(form, group, dense):
    return _native.ExpertWeights([weight_buffer(form, group, each) for each in dense])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("form", "group"), FORMATS)
@pytest.mark.parametrize(("tokens", "size", "out"), [(1, 100, 33), (17, 257, 40), (40, 24, 16), (3, 1, 1)])
@pytest.mark.parametrize("own", [False, True], ids=["shared-rows", "own-rows"])
def test_expert_linear(isa, form, group, tokens, size, out, own):
    """Within float32 rounding of float64, and the bits that each row gets alone, however the panels are cut."""
    count = 5
    rng = random("experts", form, group, tokens, size, out)
    dense = as_bf16(normal(rng, count, out, size))
    bias = normal(rng, count, out)
    weights = expert_weights(form, group, dense)
    alone = [weight_buffer(form, group, dense[e]) for e in range(count)]
    for name, experts in awkward(rng, tokens, count).items():
        rows = experts.size if own else tokens
        x = normal(rng, rows, size, scale=2)
        y = poisoned_product(isa, 1, weights, x, experts, bias, out)
        for threads in (2, 3):
            assert np.array_equal(y, poisoned_product(isa, threads, weights, x, experts, bias, out)), name
        each = experts.ravel()
        laid = x if own else np.repeat(x, experts.shape[1], axis=0)
        if form == "bf16":
            fed = as_float(as_bf16(laid)).astype(np.float64)
        else:
            q, scales = quantized(laid)
            fed = q.astype(np.float64) * scales[:, None]
        for e in range(count):
            chosen = each == e
            if chosen.any():
                check(y[chosen], fed[chosen], alone[e].unpack(), bias[e].astype(np.float64))
        for row in random("rows").permutation(len(each))[:7]:
            single = np.full((1, out), np.nan, np.float32)
            _native.linear(isa, alone[each[row]], laid[row : row + 1], bias[each[row]], 0, alone[0].panels, single)
            assert np.array_equal(single[0], y[row]), name


@pytest.mark.parametrize("isa", ISAS)
def test_experts_nobody_chose_are_not_read(isa):
    dense = as_bf16(normal(random("idle"), 4, 20, 70))
    dense[2] = 0x7FC0  # NaN
    experts = np.array([[0, 3], [3, 1], [1, 0]], np.int32)
    weights = expert_weights("bf16", 0, dense)
    x = normal(random("idle-x"), 3, 70)
    assert np.isfinite(poisoned_product(isa, 2, weights, x, experts, None, 20)).all()
    experts[1, 1] = 2
    assert np.isnan(poisoned_product(isa, 2, weights, x, experts, None, 20)[3]).all()


def test_what_expert_linear_refuses():
    weights = expert_weights("int8", 0, np.zeros((3, 8, 4), np.uint16))
    x, y = np.zeros((2, 4), np.float32), np.zeros((4, 8), np.float32)
    for experts in ([[0, 3], [0, 1]], [[0, -1], [0, 1]]):
        with pytest.raises(ValueError, match="range"):
            _native.expert_linear("generic", 1, weights, x, np.array(experts, np.int32), None, y)
    with pytest.raises(ValueError, match="at least one"):
        _native.ExpertWeights([])
    with pytest.raises(ValueError, match="alike"):
        _native.ExpertWeights([
            weight_buffer("int8", 0, np.zeros((8, 4), np.uint16)),
            weight_buffer("int8", 0, np.zeros((8, 5), np.uint16)),
        ])


# --- the sum


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("n", [1, 7, 16, 33])
def test_combine(tokens, n):
    """float32 products added in the order of choice, to the bit."""
    rng = random("combine", tokens, n)
    for name, experts in awkward(rng, max(tokens, 1), 6).items():
        experts = experts[:tokens]
        top_k = experts.shape[1]
        x, weights = normal(rng, tokens, top_k, n), normal(rng, tokens, top_k)
        expected = np.zeros((tokens, n), np.float32)
        for a in range(top_k):
            expected += weights[:, a, None] * x[:, a]
        y = np.full((tokens, n), np.nan, np.float32)
        _native.combine(x, weights, experts, 6, y)
        assert np.array_equal(y, expected), name
