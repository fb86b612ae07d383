"""Rows that leave at a cut: what the Program, Batch and State say about early exit."""

import numpy as np
import pytest
import torch

from hasten.backends.reference import State, play, weights_of
from hasten.base.errors import ConfigError
from hasten.checkpoint import load
from hasten.program import Batch, lower

MODEL = load("code-8m")
IDS = np.random.default_rng(0).integers(0, MODEL.spec.vocab, (2, 9)).tolist()


def parts():
    program = lower(MODEL.spec, context=16)
    return (*program.cut("blocks.3"), weights_of(program, MODEL.weights))


@torch.inference_mode()
def test_a_row_that_left_is_caught_up_with_exactly():
    first, second, weights = parts()
    whole, _ = play(lower(MODEL.spec, context=16), weights, Batch.of(IDS))
    shallow, deep = State(2), State(2)
    middle, shallow = play(first, weights, Batch.of([row[:6] for row in IDS]), shallow)
    _, deep = play(second, weights, Batch.of([row[:6] for row in IDS]), deep, given=middle)
    # position 6: sequence 0 leaves at the cut, sequence 1 goes on alone; what crossed for 0 is kept
    middle, shallow = play(first, weights, Batch.of([row[6:7] for row in IDS], [6, 6]), shallow)
    owed = {name: value[:1] for name, value in middle.items()}
    only_one = {name: value[1:] for name, value in middle.items()}
    out, deep_of_one = play(second, weights, Batch.of([IDS[1][6:7]], [6]), deep.select([1]), given=only_one)
    assert torch.allclose(out["logits"], whole["logits"][9 + 6 : 9 + 7], atol=1e-4)
    # position 7: both go on; sequence 0 brings both of its rows
    deep = deep.select([0]).joined(deep_of_one)
    assert deep.lengths == (6, 7)
    middle, shallow = play(first, weights, Batch.of([row[7:8] for row in IDS], [7, 7]), shallow)
    both = {name: torch.cat([owed[name], middle[name]]) for name in middle}
    out, deep = play(second, weights, Batch.of([IDS[0][6:8], IDS[1][7:8]], [6, 7]), deep, given=both)
    assert torch.allclose(out["logits"][1], whole["logits"][7], atol=1e-4)
    assert torch.allclose(out["logits"][2], whole["logits"][9 + 7], atol=1e-4)


def test_a_row_that_was_forgotten_is_noticed():
    first, second, weights = parts()
    middle, _ = play(first, weights, Batch.of([IDS[0][:6]]), State(1))
    _, deep = play(second, weights, Batch.of([IDS[0][:6]]), State(1), given=middle)
    with pytest.raises(ConfigError, match="position 7, but 6"):
        play(second, weights, Batch.of([IDS[0][7:8]], [7]), deep, given={name: value[:1] for name, value in middle.items()})
    with pytest.raises(ConfigError, match="2 sequences"):
        play(second, weights, Batch.of([[1], [2]], [6, 6]), deep, given={name: value[:2] for name, value in middle.items()})
