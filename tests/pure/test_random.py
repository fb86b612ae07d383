"""``random:SHAPE``: published shapes have the published sizes, and the weights are random in the way that speed work needs."""

import math
import time

import numpy as np
import pytest

from hasten import load
from hasten.base.errors import TokenizerError, UnsupportedError
from hasten.checkpoint import SHAPES, random_model

# Parameters as their authors' checkpoints have them; a tied head counts once.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "gpt2": 124_439_808,
    "gemma-3-1b": 999_885_952,
    # 48 · (2048 · 8512 in + 4352 · 5 convolution + 3 · 64 + 4096 gated norm + 4096 · 2048 out + 2048 norm) + 50288 · 2048 + 2048
    "mamba2-1.3b": 1_343_757_312,
}
SAMPLED = ("gpt2", "qwen3-0.6b", "gemma-3-1b", "mamba2-1.3b", "mixtral-8x7b")


@pytest.mark.timed
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_the_published_ones(shape):
    began = time.perf_counter()
    model = random_model(shape)
    assert model.weights.parameters == PUBLISHED[shape]
    assert model.weights.nbytes == 2 * PUBLISHED[shape]
    assert time.perf_counter() - began < 5  # nothing was made


def test_every_shape_is_counted():
    assert SHAPES.keys() == PUBLISHED.keys()


def small(model, most=3_000_000):
    return [name for name, weight in model.weights.items() if weight.size <= most and name.split(".")[1] in {"0", "weight", "1"}]


@pytest.mark.parametrize("shape", SAMPLED)
def test_weights_have_the_spread_of_their_fan_in(shape):
    model = random_model(shape)
    checked = 0
    for name in small(model):
        array = model.weights.array(name)
        weight = model.weights[name]
        assert array.dtype == weight.dtype
        assert array.shape == weight.shape
        numbers = array.astype(np.float32).reshape(-1)
        assert np.isfinite(numbers).all(), name
        if len(weight.shape) == 1 and "norm" in name:
            assert len(set(numbers.tolist())) == 1, name
        elif numbers.size >= 4096:
            fan_in = weight.shape[-1]
            # the exponent is a whole number, so the spread is right to a factor of the square root of 2
            assert fan_in**-0.5 / math.sqrt(2) * 0.98 <= numbers.std() <= fan_in**-0.5 * math.sqrt(2) * 1.02, name
            assert abs(numbers.mean()) < 4 * numbers.std() / math.sqrt(numbers.size), name
            assert len(np.unique(numbers)) > 64, name
            checked += 1
    assert checked >= 2


def test_norms_begin_as_no_change():
    for shape, value in (("gpt2", 1.0), ("gemma-3-1b", 0.0), ("qwen3-0.6b", 1.0)):  # Gemma adds 1 to its norms' weights
        model = random_model(shape)
        assert set(model.weights.array("norm.weight").astype(np.float32).tolist()) == {value}
    assert set(random_model("gpt2").weights.array("norm.bias").astype(np.float32).tolist()) == {0.0}


def test_weights_repeat_by_seed_and_name():
    name, other = "blocks.0.mixer.q.weight", "blocks.1.mixer.q.weight"
    model = random_model("qwen3-0.6b")
    array = model.weights.array(name)
    assert np.array_equal(array, random_model("qwen3-0.6b").weights.array(name))
    assert not np.array_equal(array, model.weights.array(other))
    assert not np.array_equal(array, random_model("qwen3-0.6b", seed=1).weights.array(name))


def test_weights_live_on_pages_of_their_own():
    model = random_model("qwen3-0.6b")
    arrays = [model.weights.array(f"blocks.{index}.mixer.{part}.weight") for index in range(4) for part in "qkv"]
    begins = sorted((array.__array_interface__["data"][0], array.nbytes) for array in arrays)
    for (begin, size), (following, _) in zip(begins, begins[1:]):
        assert begin + size <= following
    # Every page is written, so none is the kernel's shared page of zeros: a row of zeros would say otherwise.
    for array in arrays:
        pages = array.reshape(-1).view(np.uint8)[: array.nbytes // 4096 * 4096].reshape(-1, 4096)
        assert pages.any(axis=1).all()


def test_provenance_and_no_tokenizer():
    model = load("random:gpt2")
    assert model.name == "random:gpt2"
    assert model.provenance[0].transform == "random"
    assert model.provenance[0].settings == {"shape": "gpt2", "seed": 0}
    with pytest.raises(TokenizerError, match="random:gpt2 has random weights and no tokenizer"):
        model.text_tokenizer()


@pytest.mark.parametrize(
    "spelt", ["TinyLlama-1.1B", "Llama-2-7B", "Llama-3.2-1B", "Llama-3.1-8B", "Qwen3-0.6B", "Mixtral-8x7B", "MIXTRAL-8X7B", "GPT2"]
)
def test_shapes_may_be_spelt_as_their_authors_do(spelt):
    model = load(f"random:{spelt}")
    assert model.name == f"random:{spelt.lower()}"
    assert model.weights.parameters == PUBLISHED[spelt.lower()]


def test_unknown_shape_lists_the_known():
    with pytest.raises(UnsupportedError, match="'gpt5'.*tinyllama-1.1b.*mamba2-1.3b"):
        load("random:gpt5")


@pytest.mark.parametrize("zeros", ["2:4", "50%"])
def test_zeros_where_they_are_asked_for(zeros):
    dense, sparse = random_model("smollm2-135m"), random_model(f"smollm2-135m@{zeros}")
    name = "blocks.3.feed_forward.down.weight"
    array, other = dense.weights.array(name), sparse.weights.array(name)
    kept = other != 0
    assert abs(kept.mean() - 0.5) < 0.01
    sizes = np.abs(array.astype(np.float32))
    assert sizes.min() <= np.abs(other[kept].astype(np.float32)).min() <= np.abs(other.astype(np.float32)).max() <= sizes.max()
    if zeros == "2:4":
        assert (kept.reshape(-1, 4).sum(axis=1) == 2).all()
        assert (kept.reshape(-1, 4).mean(axis=0) > 0.49).all()
    assert np.array_equal(sparse.weights.array("embedding.weight"), dense.weights.array("embedding.weight"))
    assert sparse.weights.origin != dense.weights.origin


def test_zeros_nobody_has_are_refused():
    for shape in ("smollm2-135m@", "smollm2-135m@3:4", "smollm2-135m@0.5"):
        with pytest.raises(UnsupportedError, match="2:4, 50%"):
            random_model(shape)
