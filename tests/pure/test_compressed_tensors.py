"""Checkpoints in compressed-tensors: written here and read back to the bit, and written in loops after the format's description."""

import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import pytest

from hasten import load, save
from hasten.base.errors import UserError
from hasten.checkpoint.quantized import read_quantized
from hasten.formats import bits as bit_packing
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight
from hasten.formats.weights import Weight, Weights

MODEL = load("code-8m")


# --- words, against integers of any length


@pytest.mark.parametrize("bits", bit_packing.BITS)
@pytest.mark.parametrize("count", [1, 7, 32, 33, 100])
def test_words_hold_numbers_from_their_lowest_bits_on(bits, count):
    numbers = np.random.default_rng(count).integers(0, 2**bits, (2, 3, count), dtype=np.uint8)
    words = bit_packing.pack(numbers, bits)
    assert words.shape == (2, 3, math.ceil(count * bits / 32))
    assert words.dtype == np.int32
    for row, line in zip(numbers.reshape(-1, count), words.reshape(6, -1), strict=True):
        whole = sum(int(word) % 2**32 << (32 * index) for index, word in enumerate(line))
        assert [whole >> (bits * index) & (2**bits - 1) for index in range(count)] == row.tolist()
    np.testing.assert_array_equal(bit_packing.unpack(words, bits, count), numbers)


def test_words_that_keep_numbers_whole():
    words = np.array([[0b01_111_110_101_100_011_010_001_000_111_110, -1]], np.int64).astype(np.int32)
    assert bit_packing.unpack_within(words, 3, 12).tolist() == [[6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7]]


# --- the bundled model, stored quantized


def quantized(forms, activations="bf16", head=None):
    """Products of block i in forms[i % len(forms)], with scales that rounding again would not find."""
    weights = dict(MODEL.weights)
    for name, weight in MODEL.weights.items():
        pieces = name.split(".")
        if pieces[0] == "blocks" and len(weight.shape) == 2:
            form = forms[int(pieces[1]) % len(forms)]
        elif pieces[0] == "head" and head is not None:
            form = head
        else:
            continue
        its = form.quantize(weight.load())
        its = dataclasses.replace(its, scales=its.scales * np.float32(0.93))
        fed = activations if activations in form.activations else "bf16"
        weights[name] = QuantizedWeight.of(weight.shape, form, lambda its=its: its, fed)
    return dataclasses.replace(MODEL, weights=Weights(weights))


def same(one, other):
    assert list(one.weights) == list(other.weights)
    for name, weight in one.weights.items():
        found = other.weights[name]
        assert (type(found), found.shape) == (type(weight), weight.shape), name
        if isinstance(weight, QuantizedWeight):
            assert (found.form, found.activations) == (weight.form, weight.activations)
            a, b = weight.quantized(), found.quantized()
            for x, y in ((a.q, b.q), (a.scales, b.scales), (a.zeros, b.zeros)):
                assert (x is None) == (y is None)
                if x is not None:
                    assert x.dtype == y.dtype
                    np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))
        np.testing.assert_array_equal(found.load(), weight.load())


F = LinearFormat
CASES = {
    "int4 g128": ([F("int4", 128)], "bf16", "pack-quantized"),
    "int4 g32 zp": ([F("int4", 32, True)], "bf16", "pack-quantized"),
    "int4 channel": ([F("int4", 0)], "bf16", "pack-quantized"),
    "int4 channel zp": ([F("int4", 0, True)], "int8", "pack-quantized"),
    "int2 g32 zp": ([F("int2", 32, True)], "bf16", "pack-quantized"),
    "int8 w8a16": ([F("int8")], "bf16", "pack-quantized"),
    "int8 w8a8": ([F("int8")], "int8", "int-quantized"),
    "int8 g32 zp": ([F("int8", 32, True)], "int8", "int-quantized"),
    "fp8": ([F("fp8")], "bf16", "float-quantized"),
    "fp8 w8a8": ([F("fp8")], "fp8", "float-quantized"),
    "fp8 g64": ([F("fp8", 64)], "bf16", "float-quantized"),
    "mixed": ([F("int4", 64), F("int8"), F("fp8"), F("int4", 16, True)], "bf16", "mixed-precision"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_loads_to_the_bit(name, tmp_path):
    forms, activations, layout = CASES[name]
    model = quantized(forms, activations)
    save(model, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["model_type"], config["quantization_config"]["format"]) == (MODEL.source.config["model_type"], layout)
    first = load(tmp_path / "one")
    same(model, first)
    assert first.weights.nbytes == pytest.approx(model.weights.nbytes, rel=1e-3)
    assert "quantization_config" not in first.source.config
    save(first, tmp_path / "two")
    same(model, load(tmp_path / "two"))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    linear = sum(weight.nbytes for weight in model.weights.values() if isinstance(weight, QuantizedWeight))
    plain = sum(weight.nbytes for weight in model.weights.values() if not isinstance(weight, QuantizedWeight))
    assert (tmp_path / "one" / "model.safetensors").stat().st_size == pytest.approx(linear + plain, abs=60_000)


@pytest.mark.parametrize("forms", [[F("int3", 32)], [F("int4", 48)], [F("int3", 64, True), F("int8")]], ids=str)
def test_what_compressed_tensors_cannot_say_is_in_hastens_own_layout(forms, tmp_path):
    model = quantized(forms)
    save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "hasten"
    same(model, load(tmp_path / "m"))


def test_a_recipe_names_how_the_files_are_read(tmp_path):
    """Packed weights are kept under it: the same files with another quantization_config are other numbers."""
    save(quantized([F("int4", 32)]), tmp_path / "m")
    one = load(tmp_path / "m").weights.origin
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    path.write_text(json.dumps(config))
    other = load(tmp_path / "m").weights
    assert other.origin.files == one.files
    assert other.origin.recipe != one.recipe
    assert {weight.activations for weight in other.values() if isinstance(weight, QuantizedWeight)} == {"int8"}


# --- one weight, written in loops


def scheme(**weights):
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, **weights}


def whole(groups, **more):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        **more,
    }


def group(targets=("Linear",), inputs=None, layout=None, **weights):
    return {
        "targets": list(targets),
        "weights": scheme(**weights),
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }


def tensors(**arrays):
    return {name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def stored(base, bits, out, width, groups, zero_points=False, seed=0):
    """Tensors of pack-quantized, and the numbers they stand for, element by element."""
    random = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    q = random.integers(-half, half, (out, width))
    zeros = random.integers(-half, half, (out, groups)) if zero_points else np.zeros((out, groups), int)
    scales = random.uniform(0.01, 2, (out, groups)).astype(ml_dtypes.bfloat16)
    packed = np.zeros((out, math.ceil(width * bits / 32)), np.uint32)
    for o in range(out):
        line = sum(int(q[o, i] + half) << (bits * i) for i in range(width))
        for word in range(packed.shape[1]):
            packed[o, word] = line >> (32 * word) & 0xFFFFFFFF
    found = {f"{base}.weight_packed": packed.view(np.int32), f"{base}.weight_scale": scales, f"{base}.weight_shape": np.array([out, width])}
    if zero_points:
        words = np.zeros((math.ceil(out * bits / 32), groups), np.uint32)
        for g in range(groups):
            column = sum(int(zeros[o, g] + half) << (bits * o) for o in range(out))
            for word in range(words.shape[0]):
                words[word, g] = column >> (32 * word) & 0xFFFFFFFF
        found[f"{base}.weight_zero_point"] = words.view(np.int32)
    size = math.ceil(width / groups)
    meant = [[np.float32(q[o, i] - zeros[o, i // size]) * np.float32(scales[o, i // size]) for i in range(width)] for o in range(out)]
    return found, np.array(meant, np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("out", "width", "groups"), [(5, 64, 1), (17, 96, 3), (33, 128, 2)])
def test_pack_quantized_in_loops(bits, zero_points, out, width, groups):
    found, meant = stored("a.q_proj", bits, out, width, groups, zero_points)
    strategy = {"strategy": "group", "group_size": width // groups} if groups > 1 else {"strategy": "channel"}
    config = whole({"g": group(num_bits=bits, symmetric=not zero_points, **strategy)})
    read = read_quantized(config, tensors(**found, norm=np.ones(3, np.float32)))
    assert set(read) == {"a.q_proj.weight", "norm"}
    weight = read["a.q_proj.weight"]
    np.testing.assert_array_equal(weight.load(), meant)
    assert weight.form == F(f"int{bits}", width // groups if groups > 1 else 0, zero_points)
    assert weight.nbytes == sum(array.nbytes for array in found.values())


def test_three_bits_as_they_were_packed_before_they_crossed_words():
    random = np.random.default_rng(1)
    q = random.integers(-4, 4, (5, 64))
    packed = np.zeros((5, 7), np.uint32)
    for o in range(5):
        for i in range(64):
            packed[o, i // 10] |= np.uint32((q[o, i] + 4) << (3 * (i % 10)))
    found = {"m.weight_packed": packed.view(np.int32), "m.weight_scale": np.ones((5, 1), np.float32), "m.weight_shape": np.array([5, 64])}
    read = read_quantized(whole({"g": group(num_bits=3)}), tensors(**found))
    np.testing.assert_array_equal(read["m.weight"].load(), q)


@pytest.mark.parametrize(
    ("strategy", "shape", "more"),
    [
        ("tensor", (1,), {}), ("tensor", (), {}), ("channel", (6, 1), {}), ("channel", (6,), {}), ("group", (6, 4), {"group_size": 32}),
        ("block", (2, 2), {"block_structure": [4, 64]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized", "float-quantized"])
def test_numbers_that_are_not_packed(strategy, shape, more, layout):
    random = np.random.default_rng(2)
    scales = random.uniform(0.1, 1, shape).astype(np.float32)
    floats = layout == "float-quantized"
    codes = random.normal(size=(6, 128)).astype(ml_dtypes.float8_e4m3fn) if floats else random.integers(-128, 128, (6, 128), dtype=np.int8)
    kind = {"type": "float"} if floats else {}
    config = whole({"g": group(num_bits=8, strategy=strategy, **more, **kind)}, format=layout)
    read = read_quantized(config, tensors(**{"m.weight": codes, "m.weight_scale": scales}))["m.weight"]

    def scale(o, i):
        match strategy:
            case "tensor":
                return scales.reshape(())
            case "channel":
                return scales.reshape(6)[o]
            case "group":
                return scales[o, i // 32]
            case _:
                return scales[o // 4, i // 64]

    meant = [[np.float32(codes[o, i]) * scale(o, i) for i in range(128)] for o in range(6)]
    np.testing.assert_array_equal(read.load(), np.array(meant, np.float32))
    assert type(read) is QuantizedWeight


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_activation_order(layout):
    order = np.random.default_rng(3).permutation(np.arange(128) // 32).astype(np.int32)
    found, _ = stored("m", 8, 6, 128, 4, True)
    q = np.array([[int(found["m.weight_packed"].view(np.uint8)[o, i]) - 128 for i in range(128)] for o in range(6)], int)
    zeros = (
        np.array([
            [int(found["m.weight_zero_point"].view(np.uint32)[o // 4, g]) >> (8 * (o % 4)) & 255 for g in range(4)] for o in range(6)
        ])
        - 128
    )
    if layout == "int-quantized":
        found = {"m.weight": q.astype(np.int8), "m.weight_scale": found["m.weight_scale"], "m.weight_zero_point": zeros.astype(np.int8)}
    scales = found["m.weight_scale"].astype(np.float32)
    config = whole({"g": group(num_bits=8, symmetric=False, strategy="group", group_size=32, actorder="group")}, format=layout)
    read = read_quantized(config, tensors(**found, **{"m.weight_g_idx": order}))["m.weight"]
    meant = [[np.float32(q[o, i] - zeros[o, order[i]]) * scales[o, order[i]] for i in range(128)] for o in range(6)]
    np.testing.assert_array_equal(read.load(), np.array(meant, np.float32))
    assert isinstance(read, DequantizedWeight)
    for usual in (np.arange(128, dtype=np.int32) // 32, np.full(128, -1, np.int32)):
        assert type(read_quantized(config, tensors(**found, **{"m.weight_g_idx": usual}))["m.weight"]) is QuantizedWeight


def test_which_group_a_module_belongs_to():
    """Its own name first, then patterns, then classes, whatever the order of the groups."""
    groups = {
        "a": group(["Linear"], num_bits=8),
        "b": group(["re:.*down_proj$", "re:model\\.layers\\.[01]\\.mlp\\..*"], num_bits=2),
        "c": group(["model.layers.0.mlp.down_proj"], num_bits=4),
    }
    names = {"model.layers.0.mlp.down_proj": 4, "model.layers.1.mlp.up_proj": 2, "model.layers.7.mlp.down_proj": 2, "lm_head": 8}
    found = {}
    for name, bits in names.items():
        found.update(stored(name, bits, 4, 64, 1)[0])
    read = read_quantized(whole(groups, ignore=["re:.*gate"]), tensors(**found))
    assert {name: weight.form.bits for name, weight in read.items()} == {f"{name}.weight": bits for name, bits in names.items()}


def test_scales_of_the_cache_are_left_to_the_session():
    found, _ = stored("m", 4, 4, 64, 1)
    given = tensors(**found, **{"attn.k_scale": np.ones(1, np.float32), "attn.v_scale": np.ones(1, np.float32)})
    assert set(read_quantized(whole({"g": group()}, kv_cache_scheme={"num_bits": 8}), given)) == {"m.weight"}
    assert "attn.k_scale" in read_quantized(whole({"g": group()}), given)


# --- what is wrong with it


def broken(**changes):
    """Of one good weight of 4 bits in groups with zero points, some tensors replaced (None: missing)."""
    found, _ = stored("m", 4, 6, 64, 2, True)
    found.update({f"m.{name}": array for name, array in changes.items()})
    return tensors(**{name: array for name, array in found.items() if array is not None})


GOOD = group(symmetric=False, strategy="group", group_size=32)
BAD_TENSORS = {
    "too few words": ({"weight_packed": np.zeros((6, 7), np.int32)}, "weight_packed has shape"),
    "too many words": ({"weight_packed": np.zeros((6, 16), np.int32)}, "weight_packed has shape"),
    "words of another type": ({"weight_packed": np.zeros((6, 8), np.float32)}, "dtype float32"),
    "no words": ({"weight_packed": None}, "weight_packed is missing"),
    "no shape": ({"weight_shape": None}, "weight_shape is missing"),
    "a huge shape": ({"weight_shape": np.array([6, 1 << 62])}, "weight_shape"),
    "a negative shape": ({"weight_shape": np.array([6, -64])}, "weight_shape"),
    "a shape of one": ({"weight_shape": np.array([384])}, "weight_shape has 1 numbers"),
    "a shape of no numbers": ({"weight_shape": np.ones((2, 2), np.int64)}, "weight_shape"),
    "too few scales": ({"weight_scale": np.ones((6, 1), np.float32)}, "weight_scale has shape"),
    "scales of integers": ({"weight_scale": np.ones((6, 2), np.int32)}, "dtype int32"),
    "no zero points": ({"weight_zero_point": None}, "weight_zero_point is missing"),
    "zero points not packed": ({"weight_zero_point": np.zeros((6, 2), np.int32)}, "weight_zero_point has shape"),
    "an order of too few": ({"weight_g_idx": np.zeros(63, np.int32)}, "weight_g_idx has shape"),
    "an order beyond the groups": ({"weight_g_idx": np.full(64, 2, np.int32)}, "weight_g_idx has groups"),
}  # fmt: skip
BAD_NUMBERS = {
    "zero": 0.0, "negative": -1.0, "nan": np.nan, "inf": np.inf, "-inf": -np.inf,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_belong_together_are_refused(name):
    changes, why = BAD_TENSORS[name]
    read_quantized(whole({"g": GOOD}), broken())["m.weight"].load()
    with pytest.raises(UserError, match=why) as caught:
        read_quantized(whole({"g": GOOD}), broken(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_scales_that_are_no_scales_are_refused_when_they_are_read(name):
    scales = np.ones((6, 2), np.float32)
    scales[3, 1] = BAD_NUMBERS[name]
    weight = read_quantized(whole({"g": GOOD}), broken(weight_scale=scales))["m.weight"]
    for use in (weight.load, weight.quantized):
        with pytest.raises(UserError, match=r"m\.weight_scale has a scale of"):
            use()


def test_numbers_that_do_not_fit_their_bits_are_refused():
    config = whole({"g": group(num_bits=4)}, format="int-quantized")
    found = {"m.weight": np.full((4, 32), 8, np.int8), "m.weight_scale": np.ones((4, 1), np.float32)}
    with pytest.raises(UserError, match="4 bits"):
        read_quantized(config, tensors(**found))["m.weight"].load()
    fp8 = whole({"g": group(num_bits=8, type="float")}, format="float-quantized")
    codes = np.zeros((4, 32), np.uint8)
    codes[1, 1] = 0x7F
    given = tensors(**{"m.weight": codes.view(ml_dtypes.float8_e4m3fn), "m.weight_scale": np.ones((4, 1), np.float32)})
    with pytest.raises(UserError, match="NaN"):
        read_quantized(fp8, given)["m.weight"].load()


TOKENS = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}


@pytest.mark.parametrize(
    ("inputs", "fed"),
    [
        (None, "bf16"), (TOKENS, "fp8"), ({**TOKENS, "strategy": "tensor"}, "fp8"), ({**TOKENS, "type": "int"}, "bf16"),
        ({**TOKENS, "strategy": "group", "group_size": 128}, "bf16"), ({**TOKENS, "strategy": "tensor_group", "dynamic": "local"}, "bf16"),
        ({**TOKENS, "dynamic": False, "strategy": "tensor"}, "bf16"),
    ],
)  # fmt: skip
def test_what_weights_in_fp8_are_fed(inputs, fed):
    """Fp8 where each step finds its scales; one scale for all, and integers, give way to bf16."""
    config = whole({"g": group(num_bits=8, type="float", inputs=inputs)}, format="float-quantized")
    codes = np.random.default_rng(0).integers(0, 127, (4, 32)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    weight = read_quantized(config, tensors(**{"m.weight": codes, "m.weight_scale": np.ones((4, 1), np.float32)}))["m.weight"]
    assert (str(weight.form), weight.activations) == ("fp8", fed)
    integers = whole({"g": group(num_bits=8, inputs=TOKENS)}, format="int-quantized")
    given = tensors(**{"m.weight": np.ones((4, 32), np.int8), "m.weight_scale": np.ones((4, 1), np.float32)})
    assert read_quantized(integers, given)["m.weight"].activations == "bf16"


BAD_CONFIGS = {
    "no object": ([1], "object"),
    "no method": ({"bits": 4}, "quant_method"),
    "another method": ({"quant_method": "aqlm"}, "aqlm"),
    "no groups": (whole({}), "config_groups"),
    "groups of words": (whole({"g": ["Linear"]}), "config_groups"),
    "no targets": (whole({"g": {**GOOD, "targets": []}}), "targets"),
    "no weights": (whole({"g": {**GOOD, "weights": None}}), "weights"),
    "five bits": (whole({"g": group(num_bits=5)}), "num_bits"),
    "four-bit floats": (whole({"g": group(type="float")}), "num_bits"),
    "another type": (whole({"g": group(type="complex")}), "type"),
    "asymmetric floats": (whole({"g": group(type="float", num_bits=8, symmetric=False)}), "symmetric"),
    "another strategy": (whole({"g": group(strategy="tensor_group")}), "tensor_group"),
    "groups of none": (whole({"g": group(strategy="group")}), "group_size"),
    "groups of a million million": (whole({"g": group(strategy="group", group_size=10**12)}), "group_size"),
    "blocks of nothing": (whole({"g": group(strategy="block", block_structure=[0, 4])}), "block_structure"),
    "dynamic weights": (whole({"g": group(dynamic=True)}), "dynamic"),
    "another layout": (whole({"g": group()}, format="nvfp4-pack-quantized"), "nvfp4"),
    "floats packed": (whole({"g": group(type="float", num_bits=8)}), "pack-quantized"),
    "outputs": (whole({"g": {**GOOD, "output_activations": {"num_bits": 8}}}), "output_activations"),
    "four-bit inputs": (whole({"g": group(inputs={"num_bits": 4})}), "num_bits"),
    "an unknown key": (whole({"g": group(sparkle=True)}), "sparkle"),
    "rotations": (whole({"g": group()}, transform_config={"config_groups": {"R1": {}}}), "config_groups"),
    "sparsity": (whole({"g": group()}, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24"),
    "a status": (whole({"g": group()}, quantization_status="calibration"), "calibration"),
    "a repeated group": (whole({"g": group(["re:(a+)+$"])}), "pattern"),
    "too many repetitions": (whole({"g": group(["re:.*.*.*.*.*x"])}), "pattern"),
    "a malformed pattern": (whole({"g": group(["re:[a"])}), "pattern"),
    "many patterns": (whole({"g": group([f"re:{i}" for i in range(1000)])}), "too many"),
    "nobody's": (whole({"g": group(["re:z.*"])}), "no group"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_are_not_understood_are_refused(name):
    config, why = BAD_CONFIGS[name]
    with pytest.raises(UserError, match=why) as caught:
        read_quantized(config, broken())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
