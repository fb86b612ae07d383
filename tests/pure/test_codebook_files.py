"""Weights with a codebook in files: read back to the bit, written as the layout says, and refused where they are damaged."""

import dataclasses
import json

import numpy as np
import pytest

from hasten import load, save
from hasten.base.errors import CheckpointError, UserError
from hasten.checkpoint import unread_elsewhere
from hasten.checkpoint.quantized import read_quantized
from hasten.checkpoint.quantized.writing import quantization_config, stored_bytes, stored_tensors
from hasten.formats.linear import ClusteredLinear, LinearFormat
from hasten.formats.quantized import QuantizedWeight, static
from hasten.formats.tensor_map import TRANSPOSE, Stack, TensorMapping, apply_map
from hasten.formats.weights import Weight, Weights

MODEL = load("code-8m")


def weight_of(name, seed, *shape, activations="bf16"):
    """Every place, codebooks and scales that no rounding comes to."""
    form, random = LinearFormat.parse(name), np.random.default_rng(seed)
    others = [np.delete(np.arange(-127, 128), 127)] * int(np.prod(shape[:-2]))
    books = np.array([np.sort([0, *random.permutation(each)[:15]]) for each in others], np.int8).reshape(*shape[:-2], 16)
    scales = random.uniform(0.001, 2, (*shape[:-1], -(-shape[-1] // form.group) if form.group else 1)).astype(np.float32)
    its = ClusteredLinear(random.integers(0, 16, shape, dtype=np.int8), scales, None, form.group or shape[-1], books)
    return QuantizedWeight.of(shape, form, lambda: its, activations)


def config_of(weight):
    return quantization_config({"m.weight": weight}, None, by_name=True)


@pytest.mark.parametrize("name", ["lut4", "lut4-g32", "lut4-channel"])
@pytest.mark.parametrize("shape", [(5, 64), (17, 301), (3, 4, 130), (1, 1)])
def test_a_weight_comes_back_to_the_bit(name, shape):
    weight = weight_of(name, 1, *shape)
    stored = stored_tensors({"m.weight": weight})
    (read,) = read_quantized(config_of(weight), stored).values()
    its, found = weight.quantized(), read.quantized()
    assert isinstance(found, ClusteredLinear)
    for part in ("q", "scales", "codebook"):
        np.testing.assert_array_equal(getattr(found, part), getattr(its, part))
        assert getattr(found, part).dtype == getattr(its, part).dtype
    np.testing.assert_array_equal(read.load(), weight.load())
    assert read.form.number == "lut4"
    assert read.form.group in {weight.form.group, 0}
    parts = sum(tensor.nbytes for part, tensor in stored.items() if not part.endswith("_shape"))
    assert stored_bytes(shape, weight.form) == parts
    if shape[-1] % 8 == 0:  # words are full
        assert weight.nbytes == parts == np.prod(shape) // 2 + its.scales.nbytes + its.codebook.nbytes


def test_the_layout_in_loops():
    weight = weight_of("lut4-g32", 2, 6, 45)
    its = weight.quantized()
    stored = {part.removeprefix("m."): tensor.load() for part, tensor in stored_tensors({"m.weight": weight}).items()}
    assert stored.keys() == {"weight_packed", "weight_shape", "weight_scale", "weight_codebook"}
    assert stored["weight_shape"].tolist() == [6, 45]
    for o, i in np.ndindex(6, 45):
        place = int(stored["weight_packed"][o, i // 8]) >> (4 * (i % 8)) & 15
        meant = np.float32(stored["weight_codebook"][place]) * stored["weight_scale"][o, i // 32]
        assert place == its.q[o, i]
        assert meant == weight.load()[o, i]


def with_codebooks(activations="bf16"):
    weights = dict(MODEL.weights)
    names = ("lut4-g64", "lut4-channel", "int4-g64")
    for name, weight in MODEL.weights.items():
        if name.startswith("blocks.") and len(weight.shape) == 2:
            form = LinearFormat.parse(names[len(name) % 3])
            weights[name] = QuantizedWeight.from_array(weight.load(), form, activations)
    return dataclasses.replace(MODEL, weights=Weights(weights))


@pytest.mark.parametrize("activations", ["bf16", "int8", "int8-static"])
def test_what_is_saved_loads_to_the_bit(activations, tmp_path):
    model = with_codebooks("int8" if activations == "int8-static" else activations)
    if activations == "int8-static":
        steps = {name: static(weight, 0.02) for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight)}
        model = dataclasses.replace(model, weights=Weights({**model.weights, **steps}))
    save(model, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["model_type"] == "hasten"
    assert "codebook-quantized" in {each["format"] for each in config["quantization_config"]["config_groups"].values()}
    read = load(tmp_path / "one")
    for name, weight in model.weights.items():
        other = read.weights[name]
        assert np.array_equal(weight.load(), other.load()), name
        if isinstance(weight, QuantizedWeight):
            assert (weight.form, weight.activations) == (other.form, other.activations)
            assert np.array_equal(weight.quantized().q, other.quantized().q)
    save(read, tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert "own layout" in unread_elsewhere(model)


# --- damaged and hostile ones


def book(*numbers):
    return Weight((len(numbers),), np.dtype(np.int8), lambda: np.array(numbers, np.int8))


GOOD = tuple(range(-8, 8))
DAMAGED = {
    "no codebook": ({"weight_codebook": None}, "weight_codebook is missing"),
    "15 numbers": ({"weight_codebook": book(*GOOD[:15])}, "shape"),
    "17 numbers": ({"weight_codebook": book(*GOOD, 8)}, "shape"),
    "twice the same": ({"weight_codebook": book(-8, -8, *GOOD[2:])}, "ascending"),
    "falling": ({"weight_codebook": book(*GOOD[::-1])}, "ascending"),
    "no zero": ({"weight_codebook": book(*range(1, 17))}, "0 among them"),
    "-128": ({"weight_codebook": book(-128, *GOOD[1:])}, "-127 to 127"),
    "whole words": ({"weight_codebook": Weight((16,), np.dtype(np.int32), lambda: np.arange(-8, 8, dtype=np.int32))}, "dtype int32"),
    "one for each row": ({"weight_codebook": Weight((6, 16), np.dtype(np.int8), lambda: np.array([GOOD] * 6, np.int8))}, "shape"),
    "no scales": ({"weight_scale": None}, "weight_scale is missing"),
    "a scale of 0": ({"weight_scale": Weight((6, 2), np.dtype(np.float32), lambda: np.zeros((6, 2), np.float32))}, "positive"),
    "an order": ({"weight_g_idx": Weight((64,), np.dtype(np.int32), lambda: np.zeros(64, np.int32))}, "weight_g_idx"),
    "too few words": ({"weight_packed": Weight((6, 7), np.dtype(np.int32), lambda: np.zeros((6, 7), np.int32))}, "weight_packed"),
    "a mask": ({"weight_bitmask": Weight((6, 8), np.dtype(np.uint8), lambda: np.zeros((6, 8), np.uint8))}, "weight_bitmask"),
}


def read_all(config, tensors):
    return [each.load() for each in read_quantized(config, tensors).values()]


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_one_clear_error(case):
    weight, (parts, said) = weight_of("lut4-g32", 3, 6, 64), DAMAGED[case]
    stored = stored_tensors({"m.weight": weight})
    tensors = {name: each for name, each in {**stored, **{f"m.{end}": part for end, part in parts.items()}}.items() if each is not None}
    with pytest.raises(CheckpointError, match=said) as caught:
        read_all(config_of(weight), tensors)
    assert "\n" not in str(caught.value)
    assert "m.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_bits": 8}, "stored in"),
        ({"symmetric": False}, "stored in"),
        ({"num_bits": 3}, "stored in"),
        ({"strategy": "tensor", "group_size": None}, "strategy"),
        ({"strategy": "block", "group_size": None, "block_structure": [2, 32]}, "strategy"),
        ({"type": "float", "num_bits": 8}, "stored in"),
    ],
)
def test_configs_that_mean_nothing_are_refused(change, said):
    weight = weight_of("lut4-g32", 4, 6, 64)
    config = config_of(weight)
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(UserError, match=said):
        read_quantized(config, stored_tensors({"m.weight": weight}))


def test_a_codebook_that_the_config_does_not_mention_is_refused():
    weight = weight_of("lut4-g32", 5, 6, 64)
    config = config_of(weight)
    config["format"] = config["config_groups"]["group_0"]["format"] = "pack-quantized"
    with pytest.raises(CheckpointError, match="weight_codebook is there"):
        read_quantized(config, stored_tensors({"m.weight": weight}))


# --- tensor maps


def test_a_map_keeps_a_codebook_only_where_its_matrix_stays_whole():
    one, two = weight_of("lut4-g32", 6, 4, 64), weight_of("lut4-g32", 7, 4, 64)
    kept = apply_map((TensorMapping(("a",), ("b",)),), {"a": one})["b"]
    assert isinstance(kept, QuantizedWeight)
    assert isinstance(kept.quantized(), ClusteredLinear)
    np.testing.assert_array_equal(kept.load(), one.load())
    for mapping, sources, meant in [
        (TensorMapping(("a", "b"), ("c",), (Stack(2),)), {"a": one, "b": two}, np.stack([one.load(), two.load()])),
        (TensorMapping(("a",), ("c",), (TRANSPOSE,)), {"a": one}, one.load().T),
    ]:
        made = apply_map((mapping,), sources)["c"]
        assert not isinstance(made, QuantizedWeight)
        np.testing.assert_array_equal(made.load(), meant)
