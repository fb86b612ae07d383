"""Every family with its products quantized: what the file joins, splits and stacks comes apart again, to the bit."""

import dataclasses

import numpy as np
import pytest

from hasten import load, save
from hasten.backends.cpu import CpuBackend
from hasten.backends.reference import ReferenceBackend
from hasten.families import all_families
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weights
from hasten.program import lower, ops
from tests.families.oracles import make_checkpoint
from tests.pure.test_compressed_tensors import same


def with_products_in(model, form, activations):
    weights = dict(model.weights)
    products = {op.weight for op in lower(model.spec).ops if isinstance(op, ops.Linear | ops.ExpertLinear)}
    for name in products - {"embedding.weight"}:
        weights[name] = QuantizedWeight.from_array(weights[name].load(), form, activations)
    return dataclasses.replace(model, weights=Weights(weights))


@pytest.mark.parametrize("family", [family for family in all_families() if family.name != "transformer_xl"], ids=lambda family: family.name)
def test_every_family_is_written_and_read_to_the_bit(family, tmp_path):
    make_checkpoint(family.examples[0], tmp_path / "plain")
    model = with_products_in(load(tmp_path / "plain"), LinearFormat("int4", 0, True), "int8")
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    same(model, again)
    ids = np.random.default_rng(1).integers(0, model.spec.vocab, 12).tolist()
    np.testing.assert_array_equal(ReferenceBackend().logits(model, ids), ReferenceBackend().logits(again, ids))
    if not CpuBackend().refusals(model):
        np.testing.assert_array_equal(CpuBackend().logits(model, ids), CpuBackend().logits(again, ids))
