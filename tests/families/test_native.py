"""Every family whose ops are all native: the cpu backend against the reference, whole and in pieces."""

import numpy as np
import pytest

from hasten.backends.cpu import CpuBackend, unsupported_ops
from hasten.backends.reference import ReferenceBackend
from hasten.checkpoint import load
from hasten.engine.stepper import Stepper
from hasten.families import all_families
from hasten.program import Batch, Formats, Precision, lower, ops
from tests.cuts import assert_the_same_bits_however_cut
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
    session = Stepper(CpuBackend().session(model, LENGTH))
    whole = session.score(Batch.of([ids]))
    # What bf16 costs a model is measured, not guessed: torch playing the same Program in bf16 is the yardstick.
    in_bf16 = ReferenceBackend(precision=Precision(compute="bfloat16")).session(model, LENGTH).score(Batch.of([ids]))
    assert away(model, whole, expected) <= 1.2 * away(model, in_bf16, expected)
    state, rows = session.start(1), []
    for begin in range(0, LENGTH, 5):
        logits, state = session.step(Batch.of([ids[begin : begin + 5]], [begin]), state)
        rows.append(logits)
    assert np.array_equal(np.concatenate(rows), whole)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("name", "index"),
    [("gpt2", 0), ("gpt_neox", 1), ("bloom", 1), ("mpt", 1), ("gemma2", 0), ("mamba", 1), ("mamba2", 0), ("qwen3_next", 1)],
)
def test_the_same_bits_however_the_batch_is_cut(name, index, weights, tmp_path):
    """Learned positions, parallel branches, ALiBi, clips, soft caps, windows and recurrent states, on one thread and two."""
    (config,) = (family.examples[index] for family in all_families() if family.name == name)
    make_checkpoint(config, tmp_path)
    model = load(tmp_path)
    length = min(100, model.spec.context)
    assert length > 50
    ids = np.random.default_rng(index).integers(0, config["vocab_size"], length).tolist()
    sessions = [CpuBackend(threads=threads).session(model, length, Formats(weights)) for threads in (1, 2)]
    assert_the_same_bits_however_cut(sessions, ids)


NATIVE = [
    "bloom", "deepseek_v3", "falcon", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "llama", "mamba", "mamba2", "mistral", "mixtral",
    "mpt", "phi3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next",
]  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_every_example_runs_natively(name):
    (family,) = (family for family in all_families() if family.name == name)
    assert len(family.examples) >= 2
    for example in family.examples:
        assert unsupported_ops(lower(family.spec(example))) == ()
