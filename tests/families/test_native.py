"""Every family whose ops are all native: the cpu backend against the reference, whole and in pieces."""

import numpy as np
import pytest

from hasten.backends.cpu import CpuBackend, unsupported_ops
from hasten.backends.reference import ReferenceBackend
from hasten.checkpoint import load
from hasten.families import all_families
from hasten.program import Batch, Precision, lower, ops
from tests.families.oracles import make_checkpoint

LENGTH = 37
CASES = [
    (family, index)
    for family in all_families()
    for index, example in enumerate(family.examples)
    if not unsupported_ops(lower(family.spec(example)))
]


def away(model, logits, expected):
    """Mean difference; that of nine rows in ten at most where there are experts, for a row whose two best are near may choose otherwise."""
    rows = np.abs(logits - expected).mean(axis=-1)
    has_experts = any(isinstance(op, ops.Route) for op in lower(model.spec).ops)
    return np.quantile(rows, 0.9) if has_experts else rows.mean()


@pytest.mark.parametrize(("family", "index"), CASES, ids=lambda value: getattr(value, "name", value))
def test_logits(family, index, tmp_path):
    config = family.examples[index]
    make_checkpoint(config, tmp_path)
    model = load(tmp_path)
    ids = np.random.default_rng(index).integers(0, config["vocab_size"], LENGTH).tolist()
    expected = ReferenceBackend().session(model, LENGTH).score(Batch.of([ids]))
    session = CpuBackend().session(model, LENGTH)
    whole = session.score(Batch.of([ids]))
    # What bf16 costs a model is measured, not guessed: torch playing the same Program in bf16 is the yardstick.
    in_bf16 = ReferenceBackend(precision=Precision(compute="bfloat16")).session(model, LENGTH).score(Batch.of([ids]))
    assert away(model, whole, expected) <= 1.2 * away(model, in_bf16, expected)
    state, rows = session.start(1), []
    for begin in range(0, LENGTH, 5):
        logits, state = session.step(Batch.of([ids[begin : begin + 5]], [begin]), state)
        rows.append(logits)
    assert np.array_equal(np.concatenate(rows), whole)


def test_the_readmes_families_run_natively():
    assert {"llama", "mistral", "qwen2", "qwen3", "phi3"} <= {family.name for family, _ in CASES}


def test_mixtures_of_experts_run_natively():
    for name in ("mixtral", "qwen3_moe"):
        assert sum(family.name == name for family, _ in CASES) == 3
