"""Sparse weights in files: read back to the bit, written as the layout says bit by bit, smaller, and refused where they are damaged."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from hasten import load, save
from hasten.base.errors import UserError
from hasten.checkpoint import unread_elsewhere
from hasten.checkpoint.quantized import read_quantized
from hasten.checkpoint.quantized.writing import quantization_config, stored_tensors
from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.formats.quantized import QuantizedWeight, static
from hasten.formats.weights import Weights
from tests.pure.test_compressed_tensors import group, same, tensors, whole

MODEL = load("code-8m")
NAMES = ["bf16-sparse", "int8-sparse", "int8-g64-sparse", "int4-sparse", "int4-g32-sparse", "int4-channel-sparse"]


def numbers(name, seed, *shape, share=0.5):
    """Stored numbers of every size that the format has, so many of them zeros, with scales that no rounding comes to."""
    form, random = LinearFormat.parse(name), np.random.default_rng(seed)
    keep = random.random(shape) >= share
    if form.number == "bf16":
        values = random.normal(size=shape) * 10.0 ** random.integers(-30, 30, shape)
        return QuantizedLinear(np.where(keep, values, 0).astype(ml_dtypes.bfloat16).astype(np.float32), None, None, 0)
    most = 2 ** (form.bits - 1) - 1
    q = np.where(keep, random.integers(-most - (form.bits < 8), most + 1, shape), 0).astype(np.int8)
    groups = -(-shape[-1] // form.group) if form.group else 1
    scales = random.uniform(0.1, 2, (*shape[:-1], groups)).astype(np.float32)
    return QuantizedLinear(q, scales, None, form.group or shape[-1])


def weight_of(name, seed, *shape, share=0.5, activations="bf16"):
    its = numbers(name, seed, *shape, share=share)
    return QuantizedWeight.of(shape, LinearFormat.parse(name), lambda: its, activations)


# --- one weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "share"), [((5, 64), 0.5), ((17, 131), 0.9), ((3, 4, 130), 0.3), ((2, 9), 0.0), ((4, 33), 1.0), ((1, 1), 0.0)]
)
def test_a_weight_comes_back_to_the_bit(name, shape, share):
    weight = weight_of(name, 1, *shape, share=share)
    stored = stored_tensors({"m.weight": weight})
    (read,) = read_quantized(quantization_config({"m.weight": weight}, None, by_name=True), stored).values()
    its, found = weight.quantized(), read.quantized()
    assert read.activations == "bf16"
    assert str(read.form) in {name, name.replace("-sparse", "-channel-sparse"), name.replace("-g32", "-channel").replace("-g64", "")}
    np.testing.assert_array_equal(found.q.view(np.uint8), its.q.view(np.uint8))
    assert found.q.dtype == its.q.dtype
    assert (found.scales is None) == (its.scales is None)
    if its.scales is not None:
        np.testing.assert_array_equal(found.scales, its.scales)
    np.testing.assert_array_equal(read.load(), weight.load())
    assert read.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert abs(read.nbytes - weight.nbytes) <= 8 * len(shape) + 4  # the shape, and the last word


@pytest.mark.parametrize("name", ["bf16-sparse", "int8-sparse", "int4-g32-sparse"])
def test_the_layout_in_loops(name):
    weight, (out, width) = weight_of(name, 2, 6, 45), (6, 45)
    its, form = weight.quantized(), weight.form
    stored = {part.removeprefix("m."): tensor.load() for part, tensor in stored_tensors({"m.weight": weight}).items()}
    assert stored["weight_shape"].tolist() == [out, width]
    kept, mask = [], stored["weight_bitmask"]
    assert (mask.shape, mask.dtype) == ((out, 6), np.uint8)
    for o in range(out):
        for i in range(48):
            bit = int(mask[o, i // 8]) >> (i % 8) & 1
            assert bit == (i < width and its.q[o, i] != 0)
            kept += [its.q[o, i]] if bit else []
    if form.number == "int4":
        line = sum(int(word) % 2**32 << (32 * index) for index, word in enumerate(stored["weight_packed"]))
        assert [(line >> (4 * index) & 15) - 8 for index in range(len(kept))] == kept
        assert len(stored["weight_packed"]) == -(-len(kept) // 8)
    else:
        assert stored["weight_compressed"].tolist() == kept
        assert stored["weight_compressed"].dtype == (ml_dtypes.bfloat16 if form.number == "bf16" else np.int8)
    assert stored.keys() - {"weight_scale"} == {
        "weight_shape",
        "weight_bitmask",
        "weight_packed" if form.bits == 4 else "weight_compressed",
    }


def test_bytes_are_those_of_mask_and_numbers():
    half = np.tile(np.array([1, 0], np.float32), (64, 128))
    for name, bits in [("bf16-sparse", 1 + 8), ("int8-sparse", 1 + 4 + 32 / 256), ("int4-sparse", 1 + 2 + 64 / 256)]:
        weight = QuantizedWeight.from_array(half, LinearFormat.parse(name))
        assert weight.bits == bits
        assert weight.nbytes == 64 * 256 * bits / 8
    assert QuantizedWeight.from_array(half, LinearFormat.parse("bf16-sparse")).nbytes == 0.5625 * 2 * half.size


def test_a_zero_with_a_sign_is_left_out_too():
    weight = QuantizedWeight.from_array(np.array([[-0.0, 1e-45, 2, -1e-45]], np.float32), LinearFormat.parse("bf16-sparse"))
    array = weight.load()
    assert not np.signbit(array).any()
    assert np.count_nonzero(array) == 1


# --- a model


def sparse(names, activations="bf16", share=0.5):
    """Products of block i in names[i % len(names)]."""
    weights = dict(MODEL.weights)
    for name, weight in MODEL.weights.items():
        pieces = name.split(".")
        if pieces[0] == "blocks" and len(weight.shape) == 2:
            form = names[int(pieces[1]) % len(names)]
            fed = activations if activations in LinearFormat.parse(form).activations else "bf16"
            weights[name] = weight_of(form, len(weights), *weight.shape, share=share, activations=fed)
    return dataclasses.replace(MODEL, weights=Weights(weights))


@pytest.mark.parametrize(
    ("names", "activations"),
    [
        (["bf16-sparse"], "bf16"),
        (["int4-g64-sparse"], "bf16"),
        (["int8-sparse"], "int8"),
        (["bf16-sparse", "int4-sparse", "int8", "int3"], "int8"),
    ],
)
def test_what_is_saved_loads_to_the_bit_and_is_smaller(names, activations, tmp_path):
    model = sparse(names, activations)
    if names == ["int8-sparse"]:
        steps = {name: static(weight, 0.03) for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight)}
        model = dataclasses.replace(model, weights=Weights({**model.weights, **steps}))
    save(model, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["model_type"] == "hasten"
    assert "bitmask-sparse" in {each["format"] for each in config["quantization_config"]["config_groups"].values()}
    read = load(tmp_path / "one")
    same(model, read)
    assert read.weights.nbytes == pytest.approx(model.weights.nbytes, rel=1e-3)
    assert (tmp_path / "one" / "model.safetensors").stat().st_size == pytest.approx(model.weights.nbytes, abs=60_000)
    save(read, tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    why = unread_elsewhere(model)
    assert f"compressed-tensors cannot say {names[0]}" in why
    assert "hasten's own layout" in why


# --- what is wrong with it


def broken(name="bf16-sparse", **changes):
    """Of one good weight [6, 45], some tensors replaced (None: missing)."""
    stored = {part: tensor.load() for part, tensor in stored_tensors({"m.weight": weight_of(name, 3, 6, 45)}).items()}
    stored.update({f"m.{part}": array for part, array in changes.items()})
    return tensors(**{part: array for part, array in stored.items() if array is not None})


def config_of(name="bf16-sparse"):
    return quantization_config({"m.weight": weight_of(name, 3, 6, 45)}, None, by_name=True)


def one_bit_more(name):
    mask = broken(name)["m.weight_bitmask"].load().copy()
    zero = np.argwhere(np.unpackbits(mask, axis=-1, bitorder="little")[:, :45] == 0)[0]
    mask[zero[0], zero[1] // 8] |= 1 << (zero[1] % 8)
    return mask


def a_bit_behind_the_row():
    mask = broken()["m.weight_bitmask"].load().copy()
    mask[2, 5] |= 0x80
    return mask


KEPT, KEPT_BYTES = (len(broken(name)["m.weight_compressed"].load()) for name in ("bf16-sparse", "int8-sparse"))
BAD = {
    "no mask": ("bf16-sparse", {"weight_bitmask": None, "weight_scale": np.ones((6, 1), np.float32)}, "weight_bitmask is missing"),
    "a mask of another type": ("bf16-sparse", {"weight_bitmask": np.zeros((6, 6), np.int8)}, "dtype int8"),
    "a mask of too few bits": ("bf16-sparse", {"weight_bitmask": np.zeros((6, 5), np.uint8)}, "weight_bitmask has shape"),
    "a mask of too many bits": ("bf16-sparse", {"weight_bitmask": np.zeros((6, 7), np.uint8)}, "weight_bitmask has shape"),
    "a mask of too few rows": ("bf16-sparse", {"weight_bitmask": np.zeros((5, 6), np.uint8)}, "weight_bitmask has shape"),
    "a mask of one axis": ("bf16-sparse", {"weight_bitmask": np.zeros(36, np.uint8)}, "weight_shape has shape"),
    "an empty mask": ("bf16-sparse", {"weight_bitmask": np.zeros((0, 6), np.uint8)}, "weight_bitmask has shape"),
    "no shape": ("bf16-sparse", {"weight_shape": None}, "weight_shape is missing"),
    "a huge shape": ("bf16-sparse", {"weight_shape": np.array([6, 1 << 62])}, "1 to"),
    "a negative shape": ("bf16-sparse", {"weight_shape": np.array([6, -45])}, "1 to"),
    "a shape of three": ("bf16-sparse", {"weight_shape": np.array([1, 6, 45])}, "weight_shape has shape"),
    "no numbers": ("bf16-sparse", {"weight_compressed": None}, "weight_compressed is missing"),
    "numbers of another type": ("bf16-sparse", {"weight_compressed": np.zeros(KEPT, np.float32)}, "dtype float32"),
    "numbers in rows": ("bf16-sparse", {"weight_compressed": np.zeros((KEPT, 1), ml_dtypes.bfloat16)}, "one axis"),
    "no words": ("int4-sparse", {"weight_packed": None}, "weight_packed is missing"),
    "words that are bytes": ("int4-sparse", {"weight_packed": np.zeros(99, np.int8)}, "dtype int8"),
    "no scales": ("int8-sparse", {"weight_scale": None}, "weight_scale is missing"),
    "too few scales": ("int8-sparse", {"weight_scale": np.ones((5, 1), np.float32)}, "weight_scale has shape"),
}  # fmt: skip
BAD_NUMBERS = {
    "one number too few": ("bf16-sparse", {"weight_compressed": np.zeros(KEPT - 1, ml_dtypes.bfloat16)}, "bits of the mask"),
    "one number too many": ("bf16-sparse", {"weight_compressed": np.zeros(KEPT + 1, ml_dtypes.bfloat16)}, "bits of the mask"),
    "no number at all": ("bf16-sparse", {"weight_compressed": np.zeros(0, ml_dtypes.bfloat16)}, "bits of the mask"),
    "one bit too many": ("bf16-sparse", {"weight_bitmask": one_bit_more("bf16-sparse")}, "bits of the mask"),
    "one bit too many, of bytes": ("int8-sparse", {"weight_bitmask": one_bit_more("int8-sparse")}, "bits of the mask"),
    "all bits": ("int4-sparse", {"weight_bitmask": np.full((6, 6), 0x1F, np.uint8)}, "bits of the mask"),
    "a bit behind the row": ("bf16-sparse", {"weight_bitmask": a_bit_behind_the_row()}, "behind the 45 inputs"),
    "the smallest byte": ("int8-sparse", {"weight_compressed": np.full(KEPT_BYTES, -128, np.int8)}, "-127 to 127"),
    "a scale of 0": ("int4-sparse", {"weight_scale": np.zeros((6, 1), np.float32)}, "scale of 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_do_not_belong_together_are_refused(name):
    form, changes, why = BAD[name]
    read_quantized(config_of(form), broken(form))["m.weight"].load()
    with pytest.raises(UserError, match=why) as caught:
        read_quantized(config_of(form), broken(form, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_numbers_that_do_not_fit_their_mask_are_refused_when_they_are_read(name):
    form, changes, why = BAD_NUMBERS[name]
    weight = read_quantized(config_of(form), broken(form, **changes))["m.weight"]
    for use in (weight.load, weight.quantized):
        with pytest.raises(UserError, match=why) as caught:
            use()
        assert "\n" not in str(caught.value)


SPARSE = "bitmask-sparse"
BAD_CONFIGS = {
    "three bits": (group(layout=SPARSE, num_bits=3), SPARSE),
    "eight-bit floats": (group(layout=SPARSE, num_bits=8, type="float"), SPARSE),
    "zero points": (group(layout=SPARSE, symmetric=False), SPARSE),
    "one scale": (group(layout=SPARSE, strategy="tensor"), "strategy 'channel' or group"),
    "groups of floats": (group(layout=SPARSE, num_bits=16, type="float", strategy="group", group_size=32), "strategy 'channel'"),
    "blocks": (group(layout=SPARSE, strategy="block", block_structure=[4, 4]), "strategy 'channel' or group"),
    "floats that are dense": (group(layout="float-quantized", num_bits=16, type="float"), SPARSE),
    "integers that are dense": (group(layout="int-quantized", num_bits=8), "weight_bitmask is there"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_no_sparse_weight_goes_with_are_refused(name):
    config, why = BAD_CONFIGS[name]
    with pytest.raises(UserError, match=why) as caught:
        read_quantized(whole({"g": config}), broken("int8-sparse"))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line_when_the_model_is_read(tmp_path):
    """A bit of a mask falls over, as on a bad disk: the load says so, whoever asks first."""
    save(sparse(["bf16-sparse"]), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    raw[8 + length + header["blocks.0.mixer.q.weight_bitmask"]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)
    read = load(tmp_path / "m")
    with pytest.raises(UserError, match=r"blocks\.0\.mixer\.q\.weight_compressed has") as caught:
        read.weights.array("blocks.0.mixer.q.weight")
    assert "\n" not in str(caught.value)
    read.weights.array("blocks.0.mixer.k.weight")
