"""GGUF files: what their blocks mean in loops, a whole model, and files that are damaged on purpose."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from hasten import load, save
from hasten.base.errors import UserError
from hasten.checkpoint import bundled_directory
from hasten.formats.gguf import COUNT_LIMIT, GgufFile
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight

MODEL = load("code-8m")
CONFIG = json.loads((bundled_directory("code-8m") / "config.json").read_text())
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
         "Q6_K": (14, 256, 210), "BF16": (30, 1, 2)}  # fmt: skip
HALF = np.dtype("<f2")


def f16(raw):
    return float(np.frombuffer(bytes(raw), HALF)[0])


def scale_min(raw, j):
    """6-bit scale and minimum of sub-block j, as ggml's get_scale_min_k4 says it."""
    if j < 4:
        return raw[j] & 63, raw[j + 4] & 63
    return (raw[j + 4] & 0xF) | (raw[j - 4] >> 6) << 4, (raw[j + 4] >> 4) | (raw[j] >> 6) << 4


def meaning(kind, block):
    """The numbers of one block, in loops."""
    raw = [int(byte) for byte in block]
    f = np.float32
    if kind == "Q8_0":
        return [f(f16(raw[:2])) * f(np.int8(np.uint8(byte))) for byte in raw[2:]]
    if kind == "Q4_0":
        d = f(f16(raw[:2]))
        return [f((byte & 15) - 8) * d for byte in raw[2:]] + [f((byte >> 4) - 8) * d for byte in raw[2:]]
    if kind == "Q6_K":
        low, high, scales, d = raw[:128], raw[128:192], raw[192:208], f(f16(raw[208:]))
        out = [f(0)] * 256
        for half in range(2):
            for line in range(32):
                bits = high[half * 32 + line]
                a, b = low[half * 64 + line], low[half * 64 + line + 32]
                for part, q in enumerate([(a & 15) | (bits & 3) << 4, (b & 15) | (bits >> 2 & 3) << 4, (a >> 4) | (bits >> 4 & 3) << 4,
                                          (b >> 4) | (bits >> 6 & 3) << 4]):  # fmt: skip
                    at = half * 128 + part * 32 + line
                    out[at] = d * f(np.int8(np.uint8(scales[at // 16]))) * f(q - 32)
        return out
    d, least, scales = f(f16(raw[:2])), f(f16(raw[2:4])), raw[4:16]
    fifth, nibbles = (raw[16:48], raw[48:]) if kind == "Q5_K" else ([0] * 32, raw[16:])
    out = []
    for j in range(8):
        sc, m = scale_min(scales, j)
        for line in range(32):
            byte = nibbles[j // 2 * 32 + line]
            q = (byte >> 4 if j % 2 else byte & 15) | (fifth[line] >> j & 1) << 4
            out.append(d * f(sc) * f(q) - least * f(m))
    return out


def blocks(kind, count, seed=0):
    """Random bytes, with scales that are small numbers of either sign."""
    random = np.random.default_rng(seed)
    size = TYPES[kind][2]
    raw = random.integers(0, 256, (count, size), dtype=np.uint8)
    for at in {"Q8_0": [0], "Q4_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}[kind]:
        raw[:, at : at + 2] = random.normal(0, 0.01, count).astype(HALF)[:, None].view(np.uint8)
    return raw


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key, value):
    if isinstance(value, bool):
        return text(key) + struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", 6, value)
    if isinstance(value, np.ndarray):
        return text(key) + struct.pack("<IIQ", 9, 5, len(value)) + value.astype("<i4").tobytes()
    if isinstance(value, list):
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(each) for each in value)
    return text(key) + struct.pack("<I", 8) + text(value)


def gguf(metadata, tensors, version=3, alignment=32):
    """A whole file; ``tensors`` are name → (type, shape, bytes)."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata)) + b"".join(entry(*each) for each in metadata.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", TYPES[kind][0], len(body))
        body += raw + b"\0" * (-len(raw) % alignment)
    return head + b"\0" * (-len(head) % alignment) + body


SIZES = {"llama.context_length": CONFIG["max_position_embeddings"], "llama.embedding_length": CONFIG["hidden_size"],
         "llama.block_count": CONFIG["num_hidden_layers"], "llama.feed_forward_length": CONFIG["intermediate_size"],
         "llama.attention.head_count": CONFIG["num_attention_heads"], "llama.attention.head_count_kv": CONFIG["num_key_value_heads"],
         "llama.attention.layer_norm_rms_epsilon": float(CONFIG["rms_norm_eps"]), "general.architecture": "llama",
         "llama.rope.freq_base": 10000.0, "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.eos_token_id": 1}  # fmt: skip


def model_tensors(kinds):
    """The bundled model under GGUF's names, queries and keys interleaved, matrices of block i in kinds[i % len(kinds)]; and by canonical
    name what they mean."""
    from hasten.families import find_family
    from hasten.formats.tensor_map import apply_map, inverse

    family = find_family(CONFIG["model_type"])
    theirs = apply_map(inverse(family.tensors(MODEL.spec, MODEL.source.config)), MODEL.weights)
    renamed = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
               "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
               "self_attn.o_proj": "attn_output"}  # fmt: skip
    tensors, meant = {}, {}
    for name, weight in theirs.items():
        array = weight.load().astype(np.float32)
        pieces = name.split(".")
        if pieces[1] == "layers":
            ours = f"blk.{pieces[2]}.{renamed['.'.join(pieces[3:-1])]}.weight"
            kind = kinds[int(pieces[2]) % len(kinds)] if array.ndim == 2 else "F32"
        else:
            ours = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
            kind = "BF16" if array.ndim == 2 else "F32"
        if kind in {"F32", "F16", "BF16"}:
            kept = array.astype({"F32": np.float32, "F16": HALF, "BF16": ml_dtypes.bfloat16}[kind])
        else:
            raw = blocks(kind, array.size // TYPES[kind][1], len(tensors))
            sample = [np.array(meaning(kind, block), np.float32) for block in raw[:2]]
            meant[ours] = (kind, np.concatenate(sample))
            tensors[ours] = (kind, array.shape, raw.tobytes())
            continue
        if pieces[-2] in {"q_proj", "k_proj"}:
            heads = CONFIG["num_attention_heads" if pieces[-2] == "q_proj" else "num_key_value_heads"]
            kept = kept.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        tensors[ours] = (kind, array.shape, np.ascontiguousarray(kept).tobytes())
    return tensors, meant


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_what_blocks_mean(kind, tmp_path):
    raw = blocks(kind, 12)
    shape = (4, 3 * TYPES[kind][1])
    (tmp_path / "m.gguf").write_bytes(gguf({}, {"w": (kind, shape, raw.tobytes())}))
    from hasten.checkpoint.gguf import _weight

    file = GgufFile.open(tmp_path / "m.gguf")
    weight = _weight(file, file.tensors["w"])
    expected = np.array([meaning(kind, block) for block in raw], np.float32).reshape(shape)
    np.testing.assert_allclose(weight.load(), expected, rtol=1e-6, atol=1e-9)
    assert weight.nbytes == raw.size
    if kind in {"Q8_0", "Q4_0"}:
        assert isinstance(weight, QuantizedWeight)
        assert weight.form == LinearFormat("int8" if kind == "Q8_0" else "int4", 32)
        np.testing.assert_array_equal(weight.load(), expected)
    else:
        assert isinstance(weight, DequantizedWeight)


def test_the_model_in_plain_numbers_is_the_model(tmp_path):
    tensors, _ = model_tensors(["F32", "F16", "BF16"])
    (tmp_path / "m.gguf").write_bytes(gguf(SIZES, tensors))
    model = load(tmp_path / "m.gguf")
    assert list(model.weights) == list(MODEL.weights)
    for name, weight in model.weights.items():
        expected = MODEL.weights[name].load().astype(np.float32)
        if name.startswith(("blocks.1.", "blocks.4.", "blocks.7.")) and expected.ndim == 2:
            expected = expected.astype(HALF).astype(np.float32)
        np.testing.assert_array_equal(weight.load().astype(np.float32), expected, name)
    assert model.spec.blocks == MODEL.spec.blocks
    assert model.eos_token_ids == (1,)
    assert "tokenizer.json" in model.tokenizer_error


def test_quantized_tensors_stay_so_through_the_map_and_can_be_saved(tmp_path):
    kinds = ["Q8_0", "Q4_0", "Q6_K"]
    tensors, meant = model_tensors(kinds)
    (tmp_path / "m.gguf").write_bytes(gguf(SIZES, tensors))
    model = load(tmp_path / "m.gguf")
    for name, weight in model.weights.items():
        if name.startswith("blocks.") and len(weight.shape) == 2:
            kind = kinds[int(name.split(".")[1]) % 3]
            assert type(weight) is (DequantizedWeight if kind == "Q6_K" else QuantizedWeight)
    kind, sample = meant["blk.0.ffn_down.weight"]
    np.testing.assert_array_equal(model.weights["blocks.0.feed_forward.down.weight"].load().reshape(-1)[: sample.size], sample)
    kind, sample = meant["blk.1.attn_q.weight"]
    rows = model.weights["blocks.1.mixer.q.weight"].load()
    np.testing.assert_array_equal(rows[0, : sample.size], sample)  # the first row stays the first
    with pytest.raises(UserError, match="not positive"):  # Q4_0 has scales of either sign
        save(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_came_in_gguf_is_saved_to_the_bit(tmp_path):
    tensors, _ = model_tensors(["Q8_0", "Q5_K"])
    for name, (kind, shape, raw) in tensors.items():
        if kind == "Q8_0":
            bytes_ = np.frombuffer(raw, np.uint8).reshape(-1, 34).copy()
            bytes_[:, 1] &= 0x7F  # positive
            bytes_[3, :2] = 0  # a block of zeros
            tensors[name] = (kind, shape, bytes_.tobytes())
    (tmp_path / "m.gguf").write_bytes(gguf(SIZES, tensors))
    model = load(tmp_path / "m.gguf")
    save(model, tmp_path / "again")
    again = load(tmp_path / "again")
    assert any(isinstance(weight, QuantizedWeight) for weight in again.weights.values())
    for name, weight in model.weights.items():
        np.testing.assert_array_equal(again.weights[name].load(), weight.load())


# --- what is wrong with it

GOOD = gguf({"general.architecture": "llama", "a": ["x", "y"]}, {"w": ("Q8_0", (2, 64), blocks("Q8_0", 4).tobytes())})


def changed(old, new):
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


KEY = text("a") + struct.pack("<IIQ", 9, 8, 2)
BAD = {
    "another magic": (b"GGML" + GOOD[4:], "GGUF"),
    "version 1": (GOOD[:4] + struct.pack("<I", 1) + GOOD[8:], "version 1"),
    "big-endian": (GOOD[:4] + struct.pack(">I", 3) + GOOD[8:], "version"),
    "2^63 tensors": (GOOD[:8] + struct.pack("<Q", 1 << 63) + GOOD[16:], "tensors"),
    "2^63 entries": (GOOD[:16] + struct.pack("<Q", 1 << 63) + GOOD[24:], "metadata entries"),
    "many entries": (GOOD[:16] + struct.pack("<Q", COUNT_LIMIT) + GOOD[24:], "accepted"),
    "2^63 strings": (changed(KEY, text("a") + struct.pack("<IIQ", 9, 8, 1 << 63)), "strings"),
    "2^60 numbers": (changed(KEY, text("a") + struct.pack("<IIQ", 9, 10, 1 << 60)), "numbers"),
    "a list of lists": (changed(KEY, text("a") + struct.pack("<IIQ", 9, 9, 2)), "list of type 9"),
    "an unknown type": (changed(KEY, text("a") + struct.pack("<IIQ", 77, 8, 2)), "type 77"),
    "a string of 2^62": (GOOD[:24] + struct.pack("<Q", 1 << 62) + GOOD[32:], "bytes"),
    "no dimensions": (changed(text("w") + struct.pack("<I", 2), text("w") + struct.pack("<I", 0)), "dimensions"),
    "many dimensions": (changed(text("w") + struct.pack("<I", 2), text("w") + struct.pack("<I", 1 << 31)), "dimensions"),
    "2^63 columns": (changed(struct.pack("<QQ", 64, 2), struct.pack("<QQ", 1 << 63, 2)), "numbers"),
    "no columns": (changed(struct.pack("<QQ", 64, 2), struct.pack("<QQ", 0, 2)), "numbers"),
    "half a block": (changed(struct.pack("<QQ", 64, 2), struct.pack("<QQ", 48, 2)), "whole blocks"),
    "more rows than bytes": (changed(struct.pack("<QQ", 64, 2), struct.pack("<QQ", 64, 3)), "within"),
    "an offset past the end": (changed(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 8, 1 << 40)), "within"),
    "an offset of 2^64 - 32": (changed(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 8, (1 << 64) - 32)), "within"),
    "an offset between": (changed(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 8, 7)), "multiple of 32"),
    "a type nobody has": (changed(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 4, 0)), "type 4"),
    "nothing": (b"", "24 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused(name, tmp_path):
    raw, why = BAD[name]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(UserError, match=why) as caught:
        GgufFile.open(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    for size in range(0, len(GOOD) - 25, 7):
        (tmp_path / "m.gguf").write_bytes(GOOD[:size])
        with pytest.raises(UserError):
            GgufFile.open(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"general.architecture": "starcoder"}, "starcoder"), ({"llama.block_count": "many"}, "block_count"),
        ({"llama.embedding_length": 10**9}, "hidden_size|embedding|shape|too many|accepted"), ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.attention.head_count": 0}, "num_attention_heads|head"), ({"llama.block_count": 2}, "not part of this model"),
        ({"llama.block_count": 9}, "missing"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_refused(changes, why, tmp_path):
    tensors, _ = model_tensors(["BF16"])
    (tmp_path / "m.gguf").write_bytes(gguf({**SIZES, **changes}, tensors))
    with pytest.raises(UserError, match=why):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_scales_that_are_not_finite_are_refused(kind, tmp_path):
    tensors, _ = model_tensors([kind])
    form, shape, raw = tensors["blk.0.ffn_down.weight"]
    at = 0 if kind == "Q8_0" else 208
    tensors["blk.0.ffn_down.weight"] = (form, shape, raw[:at] + np.array([np.nan], HALF).tobytes() + raw[at + 2 :])
    (tmp_path / "m.gguf").write_bytes(gguf(SIZES, tensors))
    weight = load(tmp_path / "m.gguf").weights["blocks.0.feed_forward.down.weight"]
    with pytest.raises(UserError, match="not finite"):
        weight.load()
