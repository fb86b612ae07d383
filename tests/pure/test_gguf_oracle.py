"""GGUF against the gguf package: what it writes, and what it says blocks mean."""

import numpy as np
import pytest

from hasten import load
from hasten.checkpoint.gguf import _weight
from hasten.formats.gguf import GgufFile
from tests.pure.test_gguf import MODEL, SIZES, blocks, model_tensors

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks(kind, tmp_path):
    raw = blocks(kind, 64, seed=3)
    theirs = gguf.quants.dequantize(raw.reshape(8, -1), gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", raw.reshape(8, -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)
    file = GgufFile.open(tmp_path / "m.gguf")
    np.testing.assert_array_equal(_weight(file, file.tensors["w"]).load(), theirs)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_a_model_that_it_writes(kind, tmp_path):
    """The bundled model, rounded and written by the package."""
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in SIZES.items():
        match value:
            case float():
                writer.add_float32(key, value)
            case int():
                writer.add_uint32(key, value)
            case list():
                writer.add_array(key, value)
            case str() if key != "general.architecture":
                writer.add_string(key, value)
    plain, _ = model_tensors(["F32"])
    meant = {}
    for name, (form, shape, raw) in plain.items():
        array = np.frombuffer(raw, np.float32).reshape(shape) if form == "F32" else None
        if array is None:
            writer.add_tensor(name, np.frombuffer(raw, np.uint8).reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.BF16)
        elif array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            data = gguf.quants.quantize(array, quantization)
            meant[name] = gguf.quants.dequantize(data, quantization)
            writer.add_tensor(name, data, raw_dtype=quantization)
    finish(writer)
    model = load(tmp_path / "m.gguf")
    assert list(model.weights) == list(MODEL.weights)
    np.testing.assert_array_equal(model.weights["blocks.3.feed_forward.up.weight"].load(), meant["blk.3.ffn_up.weight"])
    q = meant["blk.2.attn_q.weight"]
    heads = SIZES["llama.attention.head_count"]
    apart = q.reshape(heads, -1, 2, q.shape[1]).swapaxes(1, 2).reshape(q.shape)
    np.testing.assert_array_equal(model.weights["blocks.2.mixer.q.weight"].load(), apart)
    step = {"Q4_0": 0.2, "Q8_0": 0.01}.get(kind, 0.005)
    for name, weight in MODEL.weights.items():
        near = weight.load().astype(np.float32)
        assert np.abs(model.weights[name].load().astype(np.float32) - near).max() <= step * np.abs(near).max()
