"""Checkpoints in GPTQ's and AWQ's layouts, packed here in loops after the formats' descriptions."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from hasten import load
from hasten.base.errors import UserError
from hasten.checkpoint.quantized import read_quantized
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight
from hasten.formats.safetensors import SafetensorsFile
from hasten.formats.weights import Weight

MODEL = load("code-8m")


def words_of(numbers, bits):
    """Numbers one after the other from the lowest bit of the first word on."""
    whole = sum(int(number) << (bits * index) for index, number in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    return [(whole >> (32 * index) & 0xFFFFFFFF) - (whole >> (32 * index) & 0x80000000) * 2 for index in range(count)]


def gptq(bits, width, out, size, version, symmetric=False, order=None, seed=0):
    """Tensors of one GPTQ weight and what they stand for, [out, width]."""
    random = np.random.default_rng(seed)
    groups = -(-width // size)
    q = random.integers(0, 2**bits, (width, out))
    zeros = np.full((groups, out), 2 ** (bits - 1)) if symmetric else random.integers(0, 2**bits, (groups, out))
    scales = random.uniform(0.01, 1, (groups, out)).astype(np.float16)
    kept = (zeros - 1) % 2**bits if version == 1 else zeros
    group_of = np.arange(width) // size if order is None else order
    found = {
        "qweight": np.array([words_of(q[:, o], bits) for o in range(out)], np.int32).T.copy(),
        "qzeros": np.array([words_of(kept[g], bits) for g in range(groups)], np.int32),
        "scales": scales,
        "g_idx": group_of.astype(np.int32),
    }
    meant = np.empty((out, width), np.float32)
    for o in range(out):
        for i in range(width):
            g = group_of[i]
            meant[o, i] = np.float32(q[i, o] - zeros[g, o]) * np.float32(scales[g, o])
    return found, meant


def awq(width, out, size, seed=0):
    """The same of AWQ: of eight outputs, nibble i of a word is number order[i]."""
    random, groups, order = np.random.default_rng(seed), width // size, [0, 2, 4, 6, 1, 3, 5, 7]
    q, zeros = random.integers(0, 16, (width, out)), random.integers(0, 16, (groups, out))
    scales = random.uniform(0.01, 1, (groups, out)).astype(np.float16)

    def packed(numbers):
        lines = np.zeros((len(numbers), out // 8), np.uint32)
        for r in range(len(numbers)):
            for c in range(out // 8):
                for i in range(8):
                    lines[r, c] |= np.uint32(int(numbers[r, 8 * c + order[i]]) << (4 * i))
        return lines.view(np.int32)

    meant = np.empty((out, width), np.float32)
    for o in range(out):
        for i in range(width):
            meant[o, i] = np.float32(q[i, o] - zeros[i // size, o]) * np.float32(scales[i // size, o])
    return {"qweight": packed(q), "qzeros": packed(zeros), "scales": scales}, meant


def tensors(found, name="m", **more):
    arrays = {f"{name}.{end}": array for end, array in found.items() if array is not None} | more
    return {name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def gptq_config(bits, size, version, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": "gptq" if version == 1 else "gptq_v2", **more}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("width", "out", "size"), [(64, 32, 32), (96, 64, 96), (160, 32, 64)])
def test_gptq(bits, version, width, out, size):
    found, meant = gptq(bits, width, out, size, version)
    config = gptq_config(bits, size if size < width else -1, version, sym=False, desc_act=False, damp_percent=0.01, meta={"quantizer": "x"})
    read = read_quantized(config, tensors(found, norm=np.ones(3, np.float32)))
    assert set(read) == {"m.weight", "norm"}
    weight = read["m.weight"]
    assert weight.form == LinearFormat(f"int{bits}", size if size < width else 0, True)
    np.testing.assert_array_equal(weight.load(), meant)
    assert weight.nbytes == sum(array.nbytes for array in found.values())
    del found["g_idx"]
    np.testing.assert_array_equal(read_quantized(config, tensors(found))["m.weight"].load(), meant)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("said", [1, 2])
def test_symmetric_gptq_has_no_zero_points_whatever_version_the_file_says(bits, version, said):
    found, meant = gptq(bits, 64, 32, 32, version, symmetric=True)
    weight = read_quantized(gptq_config(bits, 32, said, sym=True), tensors(found))["m.weight"]
    assert weight.form == LinearFormat(f"int{bits}", 32)
    np.testing.assert_array_equal(weight.load(), meant)


def test_gptq_that_calls_itself_symmetric_and_is_not():
    found, meant = gptq(4, 64, 32, 32, 2)
    weight = read_quantized(gptq_config(4, 32, 2, sym=True), tensors(found))["m.weight"]
    assert weight.form.zero_points
    np.testing.assert_array_equal(weight.load(), meant)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_in_activation_order(version):
    order = np.random.default_rng(5).permutation(np.arange(96) // 32)
    found, meant = gptq(4, 96, 32, 32, version, order=order)
    weight = read_quantized(gptq_config(4, 32, version, desc_act=True, sym=False), tensors(found))["m.weight"]
    assert isinstance(weight, DequantizedWeight)
    np.testing.assert_array_equal(weight.load(), meant)


def test_modules_of_gptq_with_settings_of_their_own():
    eight, meant_eight = gptq(8, 64, 32, 64, 2, seed=1)
    four, meant_four = gptq(4, 64, 32, 32, 2, seed=2)
    config = gptq_config(4, 32, 2, sym=False, dynamic={"-:.*norm": {}, "+:.*down.*": {"bits": 8, "group_size": -1}})
    read = read_quantized(config, {**tensors(eight, "a.down"), **tensors(four, "a.up")})
    np.testing.assert_array_equal(read["a.down.weight"].load(), meant_eight)
    np.testing.assert_array_equal(read["a.up.weight"].load(), meant_four)


@pytest.mark.parametrize(("width", "out", "size"), [(64, 8, 32), (96, 40, 96), (128, 16, 16)])
def test_awq(width, out, size):
    found, meant = awq(width, out, size)
    config = {"quant_method": "awq", "bits": 4, "group_size": size if size < width else -1, "zero_point": True, "version": "gemm"}
    weight = read_quantized(config, tensors(found))["m.weight"]
    assert weight.form == LinearFormat("int4", size if size < width else 0, True)
    np.testing.assert_array_equal(weight.load(), meant)
    assert weight.nbytes == sum(array.nbytes for array in found.values())


# --- a whole checkpoint of the bundled model


def checkpoint(directory, method, config, beside=False, bias=0):
    """The bundled model with every product quantized in loops; the meaning by canonical name of block 0's feed-forward."""
    file = SafetensorsFile.open(next(iter((bundled() / "model.safetensors",))))
    arrays, meant = {}, {}
    for name in file.entries:
        array = file.read(name)
        if ".layers.0." in name and array.ndim == 2:
            out, width = array.shape
            found, meant[name] = gptq(4, width, out, 32, 1, seed=len(name)) if method == "gptq" else awq(width, out, 32, len(name))
            shrink = np.float16(0.004)
            found["scales"] = found["scales"] * shrink
            module = name.removesuffix(".weight")
            arrays.update({f"{module}.{end}": each for end, each in found.items()})
            arrays.update({f"{module}.bias": np.full(out, bias, np.float16)})
        else:
            arrays[name] = array
    directory.mkdir()
    for path in bundled().iterdir():
        if path.suffix == ".json":
            (directory / path.name).write_bytes(path.read_bytes())
    whole = json.loads((directory / "config.json").read_text())
    if beside:
        (directory / beside).write_text(json.dumps(config))
    else:
        whole["quantization_config"] = config
    (directory / "config.json").write_text(json.dumps(whole))
    save_file(arrays, directory / "model.safetensors")
    return directory


def bundled():
    from hasten.checkpoint.locate import bundled_directory

    return bundled_directory("code-8m")


@pytest.mark.parametrize(
    ("method", "config", "beside"),
    [
        ("gptq", gptq_config(4, 32, 1, sym=False), ""),
        ("gptq", {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}, "quantize_config.json"),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, ""),
        ("awq", {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}, "quant_config.json"),
    ],
)
def test_a_whole_checkpoint(method, config, beside, tmp_path):
    model = load(checkpoint(tmp_path / "m", method, config, beside))
    stored = {name: weight for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight)}
    assert stored
    assert all(name.startswith("blocks.0.") for name in stored)
    assert {str(weight.form) for weight in stored.values()} == {"int4-g32-zp"}
    assert {name for name in MODEL.weights if name.startswith("blocks.0.") and len(MODEL.weights[name].shape) == 2} == set(stored)


def test_a_bias_that_the_model_has_not_is_refused_unless_it_is_zero(tmp_path):
    with pytest.raises(UserError, match="bias.*not part of this model"):
        load(checkpoint(tmp_path / "m", "gptq", gptq_config(4, 32, 1, sym=False), bias=1))


# --- what is wrong with it

GOOD, _ = gptq(4, 64, 32, 32, 2)
BAD = {
    "words of floats": ({"qweight": GOOD["qweight"].astype(np.float32)}, "dtype float32"),
    "words in one row": ({"qweight": GOOD["qweight"].reshape(-1)}, "qweight has shape"),
    "too few inputs": ({"qweight": GOOD["qweight"][:4]}, "scales has shape"),
    "too few outputs": ({"qweight": GOOD["qweight"][:, :16]}, "scales has shape"),
    "no scales": ({"scales": None}, "scales is missing"),
    "no zero points": ({"qzeros": None}, "qzeros is missing"),
    "zero points of another width": ({"qzeros": GOOD["qzeros"][:, :2]}, "qzeros has shape"),
    "an order of too few": ({"g_idx": GOOD["g_idx"][:9]}, "g_idx has shape"),
    "a group that is not there": ({"g_idx": GOOD["g_idx"] + 1}, "g_idx has groups"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_gptq_is_refused(name):
    changes, why = BAD[name]
    with pytest.raises(UserError, match=why):
        read_quantized(gptq_config(4, 32, 2, sym=False), tensors({**GOOD, **changes}))


@pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_scales_that_are_no_scales_are_refused(method, bad):
    found = {**(GOOD if method == "gptq" else awq(64, 32, 32)[0])}
    found["scales"] = found["scales"].copy()
    found["scales"][1, 2] = bad
    config = gptq_config(4, 32, 2, sym=False) if method == "gptq" else {"quant_method": "awq", "bits": 4, "group_size": 32}
    weight = read_quantized(config, tensors(found))["m.weight"]
    with pytest.raises(UserError, match="has a scale of"):
        weight.load()


AWQ, _ = awq(64, 32, 32)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"qweight": AWQ["qweight"][:, :2]}, "qzeros has shape"), ({"qweight": AWQ["qweight"][:32]}, "qzeros has shape"),
        ({"scales": AWQ["scales"].T.copy()}, "scales has shape"), ({"qzeros": None}, "qzeros is missing"),
        ({"qweight": AWQ["qweight"].reshape(-1)}, "qweight has shape"),
    ],
)  # fmt: skip
def test_damaged_awq_is_refused(changes, why):
    with pytest.raises(UserError, match=why):
        read_quantized({"quant_method": "awq", "bits": 4, "group_size": 32}, tensors({**AWQ, **changes}))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (gptq_config(5, 32, 1), "bits"), (gptq_config(4, 0, 1), "group_size"), (gptq_config("4", 32, 1), "bits"),
        (gptq_config(4, 32, 1, checkpoint_format="marlin"), "marlin"), (gptq_config(4, 32, 1, pack_dtype="int16"), "pack_dtype"),
        (gptq_config(4, 32, 1, dynamic=[1]), "dynamic"), (gptq_config(4, 32, 1, dynamic={"(a+)+": {}}), "pattern"),
        (gptq_config(4, 32, 1, dynamic={"m": {"bits": 5}}), "bits"), ({"quant_method": "gptq", "bits": 4}, "group_size"),
        ({"quant_method": "awq", "bits": 8, "group_size": 32}, "bits"), ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 4, "group_size": -2}, "group_size"),
    ],
)  # fmt: skip
def test_configs_that_are_not_understood_are_refused(config, why):
    with pytest.raises(UserError, match=why):
        read_quantized(config, tensors(GOOD if config["quant_method"] == "gptq" else AWQ))
