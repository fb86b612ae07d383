"""Mixtures of experts on the native backend: the reference's numbers, and the same bits however a batch is cut."""

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch

from hasten import _native
from hasten.backends.cpu import CpuBackend, unsupported_ops
from hasten.backends.reference import play, weights_of
from hasten.formats.weights import Weight, Weights
from hasten.model import Model
from hasten.program import Batch, Formats, linear_formats, lower, ops
from hasten.spec import (
    Attention,
    Block,
    Embedding,
    GatedMLP,
    Head,
    MixtureOfExperts,
    PreNorm,
    RMSNorm,
    Rotary,
    Router,
    Spec,
)
from tests.cuts import assert_the_same_bits_however_cut

ISAS = _native.available_isas()
VOCAB, WIDTH, CONTEXT = 97, 72, 256
NORM = RMSNorm(eps=1e-6)
SOFTMAX = MixtureOfExperts(experts=6, top_k=2, expert=GatedMLP(hidden=40, activation="silu"), router=Router())
GROUPED = MixtureOfExperts(  # everything a router may have, biases, and a feed-forward that all tokens share
    experts=8, top_k=3, expert=GatedMLP(hidden=24, activation="gelu", bias=True), shared=GatedMLP(hidden=20, activation="silu"),
    router=Router(score="sigmoid", normalize=True, scale=2.5, bias=True, correction=True, groups=4, top_groups=2),
)  # fmt: skip


def model_of(*parts):
    mixer = Attention(
        heads=4, kv_heads=2, head_dim=16, value_dim=16, scale=0.25, position=Rotary(base=10000.0, dims=16),
    )  # fmt: skip
    blocks = tuple(Block(mixer=mixer, feed_forward=part, wiring=PreNorm(mixer=NORM, feed_forward=NORM)) for part in parts)
    spec = Spec(vocab=VOCAB, width=WIDTH, context=1024, embedding=Embedding(), blocks=blocks, norm=NORM, head=Head(tied=False))
    rng = np.random.default_rng(5)
    arrays = {}
    for name, shape in lower(spec).params.items():
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        arrays[name] = (rng.standard_normal(shape) * spread + centre).astype(ml_dtypes.bfloat16)
    return Model(name="experts", spec=spec, weights=weights_from(arrays))


def weights_from(arrays):
    return Weights({name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()})


MODEL = model_of(SOFTMAX, GROUPED, msgspec.structs.replace(SOFTMAX, experts=4, top_k=4))
IDS = np.random.default_rng(0).integers(0, VOCAB, 150).tolist()


def expected(model, ids, weights, taps=()):
    """What the reference makes of the same roundings of weights and activations."""
    formats = linear_formats(lower(model.spec), Formats(weights))
    program = lower(model.spec, context=CONTEXT, formats=formats).with_outputs(["logits", *taps])
    outputs, _ = play(program, weights_of(program, model.weights, dtype=torch.float32), Batch.of([ids]))
    return {name: value.numpy() for name, value in outputs.items()}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("weights", "near"), [("bf16", 2e-2), ("int8", 6e-2), ("int4", 6e-2)])
def test_logits_are_the_references(isa, weights, near):
    """Nine rows of ten at least, for a choice may flip: keys and values are bf16, which also moves numbers to the next int8."""
    logits = CpuBackend(isa=isa).session(MODEL, CONTEXT, Formats(weights)).score(Batch.of([IDS]))
    reference = expected(MODEL, IDS, weights)["logits"]
    away = np.abs(logits - reference).max(axis=-1) / np.abs(reference).max()
    assert np.quantile(away, 0.9) <= near


@pytest.mark.parametrize(("weights", "near"), [("bf16", 2e-2), ("int8", 6e-2), ("int4", 8e-2)])
def test_every_row_is_near_where_all_experts_are_chosen(weights, near):
    """No choice can flip; their order can, which costs rounding alone."""
    router = msgspec.structs.replace(GROUPED.router, top_groups=4)
    model = model_of(msgspec.structs.replace(SOFTMAX, top_k=6), msgspec.structs.replace(GROUPED, top_k=8, router=router))
    logits = CpuBackend().session(model, CONTEXT, Formats(weights)).score(Batch.of([IDS]))
    reference = expected(model, IDS, weights)["logits"]
    assert np.abs(logits - reference).max() <= near * np.abs(reference).max()


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_the_same_bits_however_the_batch_is_cut(weights):
    taps = [f"blocks.{index}.feed_forward.chosen" for index in (0, 1)]
    for chosen in (expected(MODEL, IDS, weights, taps)[tap] for tap in taps):
        assert len({tuple(row) for row in chosen.tolist()}) > 5  # rows differ in what they choose
        assert len(np.unique(chosen)) == chosen.max() + 1 > 5  # and every expert is somebody's
    sessions = [CpuBackend(threads=threads).session(MODEL, CONTEXT, Formats(weights)) for threads in (1, 2)]
    assert_the_same_bits_however_cut(sessions, IDS, seeds=3)


def test_more_tokens_than_a_step_takes():
    ids = np.random.default_rng(1).integers(0, VOCAB, 700).tolist()
    session = CpuBackend().session(MODEL, 1024, Formats("int8"))
    assert np.array_equal(session.score(Batch.of([ids, ids[:5]]))[:700], session.score(Batch.of([ids])))


def test_experts_follow_the_weights_and_routers_do_not():
    program = lower(MODEL.spec)
    assert unsupported_ops(program) == ()
    experts = {op.weight for op in program.ops if isinstance(op, ops.ExpertLinear)}
    routers = {name for name in program.params if name.endswith("router.weight")}
    assert len(experts) == 9
    assert len(routers) == 3
    for form in ("int8", "int4"):
        formats = linear_formats(program, Formats(form))
        assert {formats.weights[name] for name in experts} == {form}
        assert {formats.activations[name] for name in experts} == {"int8"}
        assert not routers & {*formats.weights, *formats.activations}


def test_a_step_of_one_token_reads_only_the_experts_it_chooses():
    few, many = (model_of(msgspec.structs.replace(SOFTMAX, experts=count)) for count in (2, 12))
    read = [CpuBackend().session(model, CONTEXT).compiled.weight_bytes for model in (few, many)]
    router = _native.WeightBuffer("bf16", 2, WIDTH).nbytes
    assert read[0] == read[1]  # both routers fill one panel
    assert read[0] > router
