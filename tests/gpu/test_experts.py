"""Mixtures of experts against the reference backend in float64: choosing, telling rows apart, products, sums."""

import numpy as np
import pytest
import torch

from hasten.backends.cuda.kernels import experts as kernel
from hasten.backends.cuda.kernels.experts import Blocks, combine, expert_linear, most_blocks, route, tell_apart
from hasten.backends.cuda.kernels.linear import Order, Tiles, default_order, linear
from hasten.backends.cuda.kernels.pack import pack
from hasten.formats.linear import LinearFormat, stacked
from hasten.program import ops
from tests.gpu.test_linear import rows_of
from tests.gpu.test_pack import stored
from tests.gpu.test_rows import DTYPES, empty, near, numbers, reference

both = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SCORES = pytest.mark.parametrize("score", ["softmax", "sigmoid"])


def router(experts, top_k, score, **more):
    return ops.Route(logits="l", experts="e", weights="w", top_k=top_k, score=score, **{"normalize": True, "scale": 1.0, **more}), experts


def of_somebody(count, device):
    """Sequences of rows of which none is padding."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def chosen_by(op, logits, correction, dtype, device, sequence=None):
    experts = torch.full((len(logits), op.top_k), -7, dtype=torch.int32, device=device)
    weights = empty((len(logits), op.top_k), dtype, device)
    sequence = of_somebody(len(logits), device) if sequence is None else sequence.to(device)
    route(op, logits.to(device), experts, weights, sequence, None if correction is None else correction.to(device))
    return experts.cpu(), weights


@SCORES
@pytest.mark.parametrize(
    ("experts", "top_k", "more"),
    [
        (5, 2, {}), (8, 8, {"normalize": False}), (60, 4, {"scale": 2.5}), (1, 1, {}),
        (12, 3, {"groups": 3, "top_groups": 2}), (10, 2, {"groups": 10, "top_groups": 4}), (64, 6, {"groups": 8, "top_groups": 3}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("corrected", [False, True])
def test_route(experts, top_k, more, corrected, score, device):
    dtype = torch.float32 if experts % 2 or corrected else torch.bfloat16
    op, _ = router(experts, top_k, score, correction="c" if corrected else None, **more)
    correction = numbers(1, experts, scale=0.3) if corrected else None
    logits = numbers(2, 4, experts, scale=2).to(dtype)
    logits[1] = torch.from_numpy(np.random.default_rng(3).integers(-1, 2, experts)).to(dtype)  # ties
    made, weights = chosen_by(op, logits, correction, dtype, device)
    expected, exact = reference([op], {"l": logits}, {} if correction is None else {"c": correction})
    if corrected and score == "softmax":
        made, expected = made[[0, 2, 3]], expected[[0, 2, 3]]  # sums of a score and a correction may tie in float64 alone
        weights, exact = weights[[0, 2, 3]], exact[[0, 2, 3]]
    assert torch.equal(made, expected.int())
    near(weights, exact, op)


def test_what_is_not_a_number_is_chosen_and_nobody_twice(device):
    op, _ = router(6, 4, "sigmoid")
    logits = numbers(4, 3, 6)
    logits[0, 4], logits[1], logits[2] = float("nan"), float("nan"), float("-inf")
    made, weights = chosen_by(op, logits, None, torch.float32, device)
    assert made[0, 0] == 4
    assert made[1].tolist() == made[2].tolist() == [0, 1, 2, 3]
    assert weights[0].isnan().all()


@SCORES
def test_rows_of_nobody_choose_nobody(score, device):
    """Whatever their logits are, and the others as ever."""
    op, _ = router(7, 3, score)
    logits, sequence = numbers(5, 6, 7), torch.tensor([0, -1, 0, 1, -1, -1], dtype=torch.int32)
    logits[4] = float("nan")
    everybody, said = chosen_by(op, logits, None, torch.float32, device)
    made, weights = chosen_by(op, logits, None, torch.float32, device, sequence)
    real = sequence >= 0
    assert (everybody >= 0).all()
    assert (made[~real] == -1).all()
    assert (weights[~real] == 0).all()
    assert torch.equal(made[real], everybody[real])
    assert torch.equal(weights[real], said[real])


def told_apart(experts, count, block, device):
    bound = most_blocks(experts.numel(), count, block)
    blocks = Blocks(*(torch.full((size,), -9, dtype=torch.int32, device=device) for size in (bound * block, bound, count)))
    tell_apart(experts.to(device), blocks)
    return blocks


@pytest.mark.parametrize(("tokens", "chosen", "count", "block"), [(1, 1, 1, 16), (3, 2, 5, 16), (40, 4, 7, 16), (700, 2, 3, 64)])
def test_every_choice_has_one_place_of_its_expert(tokens, chosen, count, block, device):
    """In order of token, and nobody's rows in none: expert −1, as padding rows have it."""
    random = np.random.default_rng(5)
    experts = torch.from_numpy(random.integers(0, count, (tokens, chosen)).astype(np.int32))
    if tokens > 3:
        experts[experts == 2] = 0  # one that nobody chose
        experts[3] = -1
    blocks = told_apart(experts, count, block, device)
    flat = experts.flatten().tolist()
    assert blocks.counts.tolist() == [flat.count(expert) for expert in range(count)]
    used = int((blocks.experts >= 0).sum())
    assert (blocks.experts[used:] == -1).all()
    found = {expert: [] for expert in range(count)}
    for number, expert in enumerate(blocks.experts[:used].tolist()):
        places = blocks.places[number * block : (number + 1) * block].tolist()
        kept = [place for place in places if place >= 0]
        assert kept
        assert places == kept + [-1] * (block - len(kept))
        found[expert] += kept
    assert found == {expert: [place for place, its in enumerate(flat) if its == expert] for expert in range(count)}


def test_as_many_blocks_as_can_ever_be_needed(device):
    """The worst case of choices: one row more than whole blocks for every expert."""
    experts = torch.tensor([[0]] * 17 + [[1]] * 17 + [[2]])
    blocks = told_apart(experts.int(), 3, 16, device)
    assert len(blocks.experts) == 5
    assert (blocks.experts >= 0).all()
    with pytest.raises(ValueError, match="need 5 blocks"):
        tell_apart(experts.int(), Blocks(blocks.places[:64], blocks.experts[:4], blocks.counts))


@pytest.mark.parametrize(
    ("name", "fed", "shared"),
    [
        ("bf16", "bf16", True), ("bf16", "bf16", False), ("int8", "int8", False), ("int4-g64-zp", "int8", True), ("fp8", "bf16", False),
        ("fp8", "fp8", True),
    ],
)  # fmt: skip
def test_expert_linear(name, fed, shared, device):
    """Against float64, and to the bit what the expert's own linear layer gives the row."""
    form, tokens, chosen, count, size, out = LinearFormat.parse(name), 9, 2, 4, 150, 70
    each = [stored(name, seed, out, size)[1] for seed in range(count)]
    weight = pack(form, stacked(each)).to(device)
    bias = numbers(6, count, out)
    x, scale, seen = rows_of(7, tokens if shared else tokens * chosen, size, fed, device)
    experts = torch.from_numpy(np.random.default_rng(8).integers(0, count, (tokens, chosen)).astype(np.int32))
    experts[4] = -1
    tiles, order = Tiles(rows=16, out=64), Order(default_order(weight).step, 2)
    y = empty((tokens, chosen, out), torch.float32, device)
    shaped = (lambda each: each) if shared else (lambda each: None if each is None else each.unflatten(0, (tokens, chosen)))
    expert_linear(
        shaped(x), weight, y, told_apart(experts, count, 16, device), tiles, scale=shaped(scale), bias=bias.to(device), order=order
    )
    assert y[4].isnan().all(), "nobody's rows are not written"
    for token, which in [(0, 0), (3, 1), (5, 0), (8, 1)]:
        expert, row = int(experts[token, which]), token if shared else token * chosen + which
        alone = empty((1, out), torch.float32, device)
        linear(
            x[row : row + 1], pack(form, each[expert]).to(device), alone, scale=None if scale is None else scale[row : row + 1],
            bias=bias[expert].to(device), order=order, tiles=Tiles(out=128, rows=32),
        )  # fmt: skip
        assert torch.equal(y[token, which], alone[0])
        exact = torch.from_numpy(each[expert].dense()).double() @ seen[row] + bias[expert].double()
        near(y[token, which], exact, ops.ExpertLinear(x="x", experts="e", weight="w", y="y"))


@both
def test_combine(dtype, device):
    x, weights = numbers(9, 3, 4, 1100).to(dtype), numbers(10, 3, 4).abs().to(dtype)
    op = ops.Combine(x="x", weights="w", y="y")
    y = empty((3, 1100), dtype, device)
    combine(x.to(device), weights.to(device), y, of_somebody(3, device))
    near(y, reference([op], {"x": x, "w": weights})[0], op)
    alone = empty((1, 1100), dtype, device)
    combine(x[1:2].to(device), weights[1:2].to(device), alone, of_somebody(1, device))
    assert torch.equal(alone[0], y[1])
    x[1], beside = float("nan"), empty((3, 1100), dtype, device)  # what no expert wrote
    combine(x.to(device), weights.to(device), beside, torch.tensor([0, -1, 0], dtype=torch.int32, device=device))
    assert (beside[1] == 0).all()
    assert torch.equal(beside[[0, 2]], y[[0, 2]])


def test_no_tokens_are_no_work(monkeypatch, device):
    for name in ("_route", "_count", "_place", "_experts", "_combine"):
        monkeypatch.setattr(kernel, name, None)
    op, _ = router(4, 2, "softmax")
    nothing = torch.empty(0, 2, dtype=torch.int32)
    route(op, torch.empty(0, 4), nothing, torch.empty(0, 2), of_somebody(0, "cpu"))
    tell_apart(nothing, Blocks(nothing.flatten(), nothing.flatten(), torch.empty(4, dtype=torch.int32)))
    combine(torch.empty(0, 2, 8), torch.empty(0, 2), torch.empty(0, 8), of_somebody(0, "cpu"))
