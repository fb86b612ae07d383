"""Fused Programs played by the reference backend: the same bits as one op at a time, state included."""

import pytest
import torch

from hasten.backends.reference import State, play
from hasten.program import Batch, Fused, LinearFormats, Precision, fuse, lower, ops
from tests.ops.test_played_programs import BATCH, random_weights
from tests.pure.specs import SPECS

torch.set_num_threads(1)


def programs(spec, activations, compute):
    linear = [op.weight for op in lower(spec).ops if isinstance(op, ops.Linear)]
    formats = LinearFormats(activations=dict.fromkeys(linear, activations))
    program = lower(spec, formats=formats, precision=Precision(compute=compute))
    fused = fuse(program)
    assert any(isinstance(op, Fused) for op in fused.ops)
    return program, fused


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("activations", "compute"), [("none", "float32"), ("bf16", "float32"), ("int8", "float32"), ("none", "bfloat16")])
def test_fused_and_plain_give_the_same_bits(name, activations, compute):
    program, fused = programs(SPECS[name], activations, compute)
    weights = random_weights(program, dtype=getattr(torch, compute))
    expected, state = play(program, weights, BATCH, State(3))
    got, after = play(fused, weights, BATCH, State(3))
    more = Batch.of([[3, 1], [2], [5]], [5, 2, 1])
    then_expected, then_got = play(program, weights, more, state)[0], play(fused, weights, more, after)[0]
    for output in program.outputs:
        assert expected[output].isfinite().all()
        assert torch.equal(expected[output], got[output])
        assert torch.equal(then_expected[output], then_got[output])
    assert state.entries.keys() == after.entries.keys()
    for ref, entries in state.entries.items():
        assert all(
            torch.equal(a, b) for one, other in zip(entries, after.entries[ref], strict=True) for a, b in zip(one, other, strict=True)
        )


@pytest.mark.parametrize("name", ["mixer-norms", "feed-forward-moe-shared", "mixed", "exits"])
def test_every_value_tapped_is_the_same_fused(name):
    program = lower(SPECS[name])
    tapped = program.with_outputs(program.values)
    weights = random_weights(program)
    expected, _ = play(tapped, weights, BATCH)
    got, _ = play(fuse(tapped), weights, BATCH)
    assert all(torch.equal(expected[value], got[value]) for value in program.values)


def test_gradients_flow_through_fused_ops():
    program = lower(SPECS["mixer-norms"], precision=Precision("float64", "float64", "float64"))
    gradients = []
    for played in (program, fuse(program)):
        weights = {name: tensor.requires_grad_() for name, tensor in random_weights(program, dtype=torch.float64).items()}
        play(played, weights, BATCH)[0]["logits"].square().sum().backward()
        gradients.append({name: tensor.grad for name, tensor in weights.items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in program.params)
