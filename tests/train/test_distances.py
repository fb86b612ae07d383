"""Distances between models: each against a few lines of numpy, token by token."""

import math

import numpy as np
import pytest
import torch

from hasten.backends.reference import play, weights_of
from hasten.base.errors import ConfigError
from hasten.checkpoint import load_directory
from hasten.program import Batch
from hasten.train import AttentionMaps, Example, Hidden, Relations, Soft, objectives
from hasten.train.objectives import divergence, in_pieces, log_probabilities
from tests.train.small import settings, small_llama, windows

EXAMPLES = (Example(tuple(range(8))), Example(tuple(range(5)), 3), Example(tuple(range(8)), 6), Example((1, 2)))
BATCH = Batch.of([list(example.ids[:-1]) for example in EXAMPLES])
ROWS = 7 + 4 + 7 + 1
LEARNED = [*range(7), 9, 10, 11 + 5, 11 + 6, 18]
"""Rows whose next token is learned, by hand."""


def some(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), dtype=torch.float32, requires_grad=True)


def sequences():
    """First row and length of each example."""
    return [(0, 7), (7, 4), (11, 7), (18, 1)]


def softmax(x):
    made = np.exp(x - x.max(-1, keepdims=True))
    return made / made.sum(-1, keepdims=True)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


@pytest.mark.parametrize("rows", [1, 4, 13])
def test_pieces_add_up_to_the_whole_and_so_do_their_gradients(rows, monkeypatch):
    monkeypatch.setattr(objectives, "PIECE", 4 * 11 + 3)  # four rows at once
    logits, teacher, seen = some(rows, 11), some(rows, 11, seed=1).detach(), []

    def apart(piece, at):
        seen.append(len(piece))
        return divergence(log_probabilities(piece, 2.0), log_probabilities(teacher[at], 2.0), "reverse"), {"squares": piece.square().sum()}

    total, parts = in_pieces(logits * 3, apart)
    assert seen == [4] * (rows // 4) + [rows % 4] * (rows % 4 > 0)
    (5 * total).backward()
    pieced, logits.grad = logits.grad, None
    whole = divergence(log_probabilities(logits * 3, 2.0), log_probabilities(teacher, 2.0), "reverse")
    (5 * whole).backward()
    torch.testing.assert_close(pieced, logits.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(parts["squares"], (logits * 3).square().sum().detach())
    with torch.no_grad():
        again, _ = in_pieces(logits * 3, apart)
    assert torch.equal(again, total)
    assert not again.requires_grad


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
def test_divergences_by_hand(kind):
    s, t = np.random.default_rng(0).normal(size=(2, 5, 11))
    q, p = softmax(s), softmax(t)
    m = (p + q) / 2
    expected = sum(
        {"forward": kl(p[row], q[row]), "reverse": kl(q[row], p[row]), "jensen-shannon": (kl(p[row], m[row]) + kl(q[row], m[row])) / 2}[
            kind
        ]
        for row in range(5)
    )
    own, other = (log_probabilities(torch.tensor(each), 1.0) for each in (s, t))
    assert divergence(own, other, kind).item() == pytest.approx(expected)
    assert divergence(own, own, kind).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
def test_gradients_of_divergences_are_those_of_differences(kind):
    s, t = (torch.tensor(np.random.default_rng(seed).normal(size=(2, 5)), requires_grad=seed == 0) for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda each: divergence(log_probabilities(each, 2.0), log_probabilities(t, 2.0), kind), s)


def test_soft_labels_of_learned_rows_at_a_temperature():
    own, other = some(ROWS, 13), some(ROWS, 13, seed=1)
    found = Soft(2.0)({"logits": own}, {"logits": other}, BATCH, EXAMPLES)
    q, p = (softmax(each.detach().numpy().astype(np.float64) / 2) for each in (own, other))
    assert found.item() == pytest.approx(4 * sum(kl(p[row], q[row]) for row in LEARNED), rel=1e-5)


@pytest.mark.parametrize("measure", ["mse", "cosine"])
def test_hidden_states(measure):
    own = {name: some(ROWS, 6, seed=place) for place, name in enumerate("ab")}
    other = {name: some(ROWS, 6, seed=place + 5) for place, name in enumerate("cd")}
    distance = Hidden((("a", "c"), ("b", "d")), measure)
    assert (distance.own, distance.others) == (("a", "b"), ("c", "d"))
    expected = 0.0
    for mine, theirs in ("ac", "bd"):
        for row in LEARNED:
            s, t = own[mine][row].detach().numpy(), other[theirs][row].detach().numpy()
            if measure == "mse":
                expected += ((s - t) ** 2).sum() / (t**2).sum() / 2
            else:
                expected += (1 - s @ t / np.sqrt(s @ s) / np.sqrt(t @ t)) / 2
    found = distance(own, other, BATCH, EXAMPLES)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert distance(own, {"c": own["a"], "d": own["b"]}, BATCH, EXAMPLES).item() == pytest.approx(0, abs=1e-5)
    found.backward()
    unlearned = [row for row in range(ROWS) if row not in LEARNED]
    assert (own["a"].grad[unlearned] == 0).all()
    assert (own["a"].grad[LEARNED] != 0).any()


def test_attention_maps_and_what_one_cannot_see():
    heads, context = 3, 7
    own, other = (softmax(np.random.default_rng(seed).normal(size=(ROWS, heads, context))) for seed in (0, 1))
    own[2, 0] = [0.5, 0.5, 0, 0, 0, 0, 0]  # a narrower window than the other's
    other[5, 1] = [1, 0, 0, 0, 0, 0, 0]
    distance = AttentionMaps((("m", "n"),))
    student = torch.tensor(own, dtype=torch.float32, requires_grad=True)
    found = distance({"m": student}, {"n": torch.tensor(other, dtype=torch.float32)}, BATCH, EXAMPLES)
    floored = np.maximum(own, 1e-9)
    expected = sum(kl(other[row, head], floored[row, head]) for row in LEARNED for head in range(heads)) / heads
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert student.grad.isfinite().all()
    assert distance({"m": student}, {"n": student}, BATCH, EXAMPLES).item() == 0


def test_relations_by_hand():
    kinds, heads = ("q", "k", "v"), 2
    own = {f"x.{kind}": some(ROWS, 4, seed=place) for place, kind in enumerate(kinds)}
    other = {f"y.{kind}": some(ROWS, 6, seed=place + 5) for place, kind in enumerate(kinds)}  # of another width
    expected = 0.0
    for kind in kinds:
        for begin, length in sequences():
            for row in range(begin, begin + length):
                if row not in LEARNED:
                    continue
                for head in range(heads):
                    made = []
                    for values in (own[f"x.{kind}"], other[f"y.{kind}"]):
                        x = values.detach().numpy().astype(np.float64)
                        size = x.shape[1] // heads
                        x = x[:, head * size : (head + 1) * size]
                        made.append(softmax(x[begin : row + 1] @ x[row] / math.sqrt(size)))
                    expected += kl(made[1], made[0]) / heads / 3
    distance = Relations((("x", "y"),), heads)
    found = distance(own, other, BATCH, EXAMPLES)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert all(each.grad.isfinite().all() and (each.grad != 0).any() for each in own.values())
    assert distance(own, {f"y.{kind}": own[f"x.{kind}"] for kind in kinds}, BATCH, EXAMPLES).item() == pytest.approx(0, abs=1e-6)


def test_the_taps_are_what_the_model_attends_with(tmp_path):
    """A Program's map is softmax(q·k·scale) of its own queries and keys, over each sequence apart."""
    model = load_directory(small_llama(tmp_path, layers=1), "small")
    program = settings().program(model.spec, 32)
    taps = ("blocks.0.mixer.map", "blocks.0.mixer.q_rotated", "blocks.0.mixer.k_rotated")
    examples = windows(4)
    batch = Batch.of([list(example.ids[:-1]) for example in examples])
    weights = weights_of(program, model.weights, dtype=torch.float32)
    values = play(program.with_outputs(taps), weights, batch)[0]
    map, q, k = (values[name].numpy() for name in taps)
    begin = 0
    for example in examples:
        length = len(example.ids) - 1
        for head in range(4):
            for row in range(length):
                mine = q[begin + row].reshape(4, 8)[head]
                keys = k[begin : begin + row + 1].reshape(-1, 2, 8)[:, head // 2]
                np.testing.assert_allclose(map[begin + row, head, : row + 1], softmax(keys @ mine / math.sqrt(8)), atol=1e-5)
        begin += length


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none(temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        Soft(temperature)
