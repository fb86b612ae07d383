"""What linear ops name beside their weight: the adapter slot, how activations are fed, how the weight is stored."""

import dataclasses

import numpy as np
import pytest
import torch

from hasten.backends.reference import Adapter, play, weights_of
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load
from hasten.families import all_families
from hasten.program import Batch, LinearFormats, Precision, lower
from hasten.program.ops import ExpertLinear, HeadLinear, Linear, QuantizeFp8, QuantizeRows

MODEL = load("code-8m")
SLOT = "blocks.3.feed_forward.up"
BATCH = Batch.of([np.random.default_rng(0).integers(0, MODEL.spec.vocab, 20).tolist()])
DOUBLE = Precision("float64", "float64", "float64")


def run(formats=None, weights=None, adapters=None):
    program = lower(MODEL.spec, context=32, precision=DOUBLE, formats=formats)
    base = weights_of(program, MODEL.weights, dtype=torch.float64)
    return play(program, {**base, **(weights or {})}, BATCH, adapters=adapters)[0]["logits"]


def test_an_adapter_is_the_same_as_adding_its_product_to_the_weight():
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, 256, generator=generator, dtype=torch.float64)
    up = torch.randn(768, 4, generator=generator, dtype=torch.float64)
    merged = weights_of(lower(MODEL.spec), MODEL.weights, dtype=torch.float64)[f"{SLOT}.weight"] + 0.5 * up @ down
    by_slot = run(adapters={SLOT: Adapter(down, up, 0.5)})
    assert torch.allclose(by_slot, run(weights={f"{SLOT}.weight": merged}), atol=1e-9)
    assert not torch.allclose(by_slot, run(), atol=1e-3)


def test_every_linear_layer_has_a_slot_of_its_own():
    program = lower(MODEL.spec)
    slots = [op.adapter for op in program.ops if type(op).__name__ == "Linear"]
    assert len(slots) == len(set(slots)) == 7 * 8 + 1


@pytest.mark.parametrize(("form", "op"), [("int8", "QuantizeRows"), ("fp8", "QuantizeFp8")])
def test_rounded_activations_change_the_product_a_little_and_only_where_named(form, op):
    name = f"{SLOT}.weight"
    plain, rounded = run(), run(LinearFormats(activations={name: form}))
    change = (plain - rounded).abs().max() / plain.abs().max()
    assert 1e-6 < change < 0.05
    program = lower(MODEL.spec, formats=LinearFormats(activations={name: form}))
    assert [op.weight for op in program.ops if isinstance(op, Linear) and op.scale is not None] == [name]
    assert f"{op}(blocks.3.feed_forward_norm)" in program.text()


def test_products_that_read_one_value_share_its_rounding():
    names = {f"blocks.0.mixer.{part}.weight": "int8" for part in "qkv"}
    program = lower(MODEL.spec, formats=LinearFormats(activations=names))
    assert sum(isinstance(op, QuantizeRows) for op in program.ops) == 1


def test_two_roundings_of_one_value_lie_apart():
    names = {f"blocks.0.mixer.{part}.weight": form for part, form in zip("qkv", ("int8", "fp8", "fp8"), strict=True)}
    ops = [op for op in lower(MODEL.spec, formats=LinearFormats(activations=names)).ops if isinstance(op, QuantizeRows | QuantizeFp8)]
    assert [type(op) for op in ops] == [QuantizeRows, QuantizeFp8]
    assert len({name for op in ops for name in op.outputs}) == 4
    assert torch.isfinite(run(LinearFormats(activations=names))).all()


def test_formats_and_slots_that_name_nothing_are_refused():
    with pytest.raises(ConfigError, match="Q.weight"):
        lower(MODEL.spec, formats=LinearFormats(weights={"blocks.0.mixer.Q.weight": "int4"}))
    with pytest.raises(ConfigError, match="nope"):
        run(adapters={"nope": Adapter(torch.zeros(1, 256), torch.zeros(768, 1))})
    program = lower(MODEL.spec, context=32)
    with pytest.raises(ConfigError, match="nope"):
        play(program, weights_of(program, MODEL.weights), BATCH, given={"nope": torch.zeros(1)})


@pytest.mark.parametrize("family", [f for f in all_families() if f.name in {"deepseek_v3", "qwen3_next", "gpt_oss"}], ids=lambda f: f.name)
def test_every_product_has_a_slot_and_a_shard_or_a_reason(family):
    program = lower(family.spec(family.examples[0]))
    products = [op for op in program.ops if isinstance(op, Linear | HeadLinear | ExpertLinear)]
    assert len({op.adapter for op in products}) == len(products)
    assert None not in {op.adapter for op in products}


@pytest.mark.parametrize("field", ["weights", "activations"])
def test_a_format_the_backend_does_not_know_is_refused(field):
    formats = dataclasses.replace(LinearFormats(), **{field: {f"{SLOT}.weight": "int5"}})
    with pytest.raises(UnsupportedError, match="int5"):
        run(formats)
