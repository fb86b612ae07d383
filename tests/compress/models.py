"""Small models to compress, and text for them."""

import dataclasses

import numpy as np

from hasten.backends.reference import ReferenceBackend
from hasten.compress.data import text_of
from hasten.compress.recipe import recipe_of
from hasten.compress.walk import Run
from hasten.formats.weights import Weight, Weights
from hasten.model import Model
from hasten.program import Batch, Precision, lower
from tests.soak.models import model_of

KINDS = ["grouped-query", "multi-query", "MoE"]


def small(kind="grouped-query", seed=11, dtype=np.float32):
    """Two blocks of float32 weights, for what must hold closer than bf16 can say."""
    model = model_of(kind, seed)
    weights = {}
    for name, weight in model.weights.items():
        array = weight.load().astype(dtype)
        weights[name] = Weight(array.shape, array.dtype, lambda array=array: array)
    return Model(name=model.name, spec=model.spec, weights=Weights(weights))


def random_weights(spec, seed=0):
    """A float32 model of any Spec."""
    random, weights = np.random.default_rng(seed), {}
    for name, shape in lower(spec).params.items():
        array = random.normal(size=shape).astype(np.float32) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        array += name.endswith("norm.weight")
        weights[name] = Weight(shape, array.dtype, lambda array=array: array)
    return Model(name="random", spec=spec, weights=Weights(weights))


def native_error(model, ids):
    """How far natively played logits are from float32, over how far torch in bf16 is; on average."""
    expected = model.logits(ids)
    in_bf16 = ReferenceBackend(precision=Precision(compute="bfloat16")).session(model).score(Batch.of([ids]))
    return np.abs(model.logits(ids, backend="cpu") - expected).mean() / np.abs(in_bf16 - expected).mean()


def windows_for(model, seed=0, lengths=(40, 33, 40, 7, 25, 40)):
    random = np.random.default_rng(seed)
    longest = min(model.spec.context, 48)
    return text_of("random ids", [random.integers(0, model.spec.vocab, min(length, longest)).tolist() for length in lengths])


def changed(model, arrays):
    """``model`` with other numbers for some weights."""
    made = {name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}
    return dataclasses.replace(model, weights=Weights({**model.weights, **made}))


def cut(model, listed, work, text=None):
    """``model`` through one transform of a recipe, on ``text`` or random ids, in ``work``."""
    (step,) = recipe_of([listed])
    step.transform.check(model, step.settings)
    return step.transform.apply(model, step.settings, text or windows_for(model), Run(work, 2))
