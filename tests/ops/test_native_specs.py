"""Specs that no family writes, played natively: every mixer, feed-forward and wiring whose ops are native, and latent attention."""

import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu import CpuBackend, unsupported_ops
from hasten.backends.reference import ReferenceBackend
from hasten.base.errors import UnsupportedError
from hasten.engine.stepper import Stepper
from hasten.formats.weights import Weight, Weights
from hasten.model import Model
from hasten.program import Batch, Formats, Precision, lower
from hasten.spec import LatentAttention
from tests.cuts import assert_the_same_bits_however_cut
from tests.pure.specs import RMS, ROPE, SPECS, block, spec_of

NATIVE = {name: spec for name, spec in SPECS.items() if not unsupported_ops(lower(spec))}
LEVELS = list(reversed(_native.available_isas()))

LATENT = LatentAttention(heads=5, q_rank=40, kv_rank=48, nope_dim=24, rope_dim=4, value_dim=20, scale=0.3, rotary=ROPE, norm=RMS)
WIDE = LatentAttention(heads=2, q_rank=None, kv_rank=92, nope_dim=16, rope_dim=4, value_dim=33, scale=0.2, rotary=ROPE, norm=RMS)
LONG = spec_of(block(LATENT), block("gqa"), block(WIDE), vocab=200, width=64, context=256)


def model_of(spec, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: (rng.standard_normal(shape) / 2).astype(np.float32) for name, shape in lower(spec).params.items()}
    return Model("random", spec, Weights({name: Weight(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}))


def check(model, ids, isa):
    """How far from float32, over how far torch in bf16 is; the same bits in pieces of five."""
    expected = ReferenceBackend().session(model).score(Batch.of([ids]))
    in_bf16 = ReferenceBackend(precision=Precision(compute="bfloat16")).session(model).score(Batch.of([ids]))
    session = Stepper(CpuBackend(isa=isa).session(model))
    whole = session.score(Batch.of([ids]))
    state, rows = session.start(1), []
    for begin in range(0, len(ids), 5):
        logits, state = session.step(Batch.of([ids[begin : begin + 5]], [begin]), state)
        rows.append(logits)
    assert np.array_equal(np.concatenate(rows), whole)
    return np.abs(whole - expected).mean() / np.abs(in_bf16 - expected).mean()


def test_what_must_be_native():
    parts = {
        "mixer-gqa",
        "mixer-latent",
        "mixer-latent-full-q",
        "mixer-mamba",
        "mixer-mamba2",
        "mixer-delta",
        "mixed",
        "feed-forward-mlp",
        "feed-forward-gated",
        "feed-forward-clamped",
        "feed-forward-moe-groups",
        "feed-forward-moe-shared",
        "ends",
    }
    assert parts <= set(NATIVE)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", NATIVE)
def test_every_native_spec(name, isa):
    """Of three sets of weights the middle one: in models this small an expert chosen otherwise outweighs every rounding."""
    ids = np.random.default_rng(1).integers(0, NATIVE[name].vocab, NATIVE[name].context).tolist()
    assert np.median([check(model_of(NATIVE[name], seed), ids, isa) for seed in range(3)]) <= 1.2


@pytest.mark.parametrize("isa", LEVELS)
def test_latent_attention_over_many_blocks_of_keys(isa):
    assert check(model_of(LONG), np.random.default_rng(2).integers(0, LONG.vocab, 200).tolist(), isa) <= 1.2


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_latent_attention_gives_the_same_bits_however_the_batch_is_cut(weights):
    sessions = [CpuBackend(threads=threads).session(model_of(LONG), 256, Formats(weights)) for threads in (1, 2)]
    assert_the_same_bits_however_cut(sessions, np.random.default_rng(3).integers(0, LONG.vocab, 150).tolist())


def test_latent_rows_are_forked_and_kept_in_bf16():
    ids = np.random.default_rng(4).integers(0, LONG.vocab, 60).tolist()
    session = Stepper(CpuBackend().session(model_of(LONG), 256))
    _, state = session.step(Batch.of([ids[:37]], rows="none"), session.start(1))
    logits, _ = session.step(Batch.of([ids[37:], ids[:9]], [37, 37]), state.select([0, 0]))
    assert np.array_equal(logits[:23], session.score(Batch.of([ids]))[37:])
    assert np.array_equal(logits[23:], session.score(Batch.of([ids[:37] + ids[:9]]))[37:])
    with pytest.raises(UnsupportedError, match="latent"):
        CpuBackend().session(model_of(LONG), 256, Formats(cache="int8"))
