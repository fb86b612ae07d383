"""Models in GGUF files: their metadata as the config of a family, their tensors under the names of that family's checkpoints.

Source of the names: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py and convert_hf_to_gguf.py."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hasten.base.errors import CheckpointError, ConfigError, UnsupportedError, one_line
from hasten.families import Config
from hasten.formats import gguf_blocks
from hasten.formats.gguf import GgufFile, GgufTensor
from hasten.formats.linear import QuantizedLinear
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight
from hasten.formats.tensor_map import Permute, Reshape, TensorMapping, apply_map, rename
from hasten.formats.weights import Array, Weight

SUFFIX = ".gguf"
PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def gguf_tensors(file: GgufFile) -> tuple[Config, dict[str, Weight]]:
    """The config and the tensors of the same model as a checkpoint in Hugging Face's layout. Raises a UserError naming what is wrong."""
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UnsupportedError(f"{file.path}: general.architecture is {one_line(kind)}; readable are {', '.join(ARCHITECTURES)}")
    config = _config(kind, file)
    found = {name: _weight(file, tensor) for name, tensor in file.tensors.items()}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if kind == "llama" else {}
    return config, apply_map(tuple(_mapping(name, weight.shape, heads) for name, weight in found.items()), found)


def _config(kind: str, file: GgufFile) -> dict[str, Any]:
    number = functools.partial(_number, file, kind)
    if (scaling := file.metadata.get(f"{kind}.rope.scaling.type", "none")) != "none" or "rope_freqs.weight" in file.tensors:
        raise UnsupportedError(f"{file.path}: rotary positions are scaled ({one_line(scaling)}), which is not read from GGUF yet")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    table = file.tensors.get("token_embd.weight")
    width, heads = number("embedding_length", int), number("attention.head_count", int)
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' of two dimensions is missing; download the file again")
    config = {
        "model_type": kind,
        "vocab_size": table.shape[0],
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length", int),
        "num_hidden_layers": number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", int, heads),
        "head_dim": number("attention.key_length", int, width // max(heads, 1)),
        "max_position_embeddings": number("context_length", int),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", float),
        "rope_theta": number("rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if kind == "qwen2":  # whose heads have the usual size
        del config["head_dim"]
    if kind == "llama" and "blk.0.attn_q.bias" in file.tensors:
        config["attention_bias"] = True
    ends = file.metadata.get("tokenizer.ggml.eos_token_id")
    if isinstance(ends, int) and not isinstance(ends, bool) and isinstance(tokens, list):
        config["eos_token_id"] = ends
    return config


def _number(file: GgufFile, kind: str, key: str, as_type: Callable[[Any], Any], default: float | None = None) -> Any:
    value = file.metadata.get(f"{kind}.{key}", default)
    if not isinstance(value, int | float) or isinstance(value, bool) or (as_type is int and not isinstance(value, int)):
        raise ConfigError(f"{file.path}: {kind}.{key} is {one_line(value)}; a number is needed")
    return value if as_type is int else float(str(np.float32(value)))  # the number that was rounded to float32, as it was written


def _mapping(name: str, shape: tuple[int, ...], heads: Mapping[str, int]) -> TensorMapping:
    """To Hugging Face's name. Queries and keys of llama come with each head's halves interleaved, which is undone."""
    stem, _, end = name.rpartition(".")
    pieces = stem.split(".")
    if stem in ENDS:
        return rename(name, f"{ENDS[stem]}.{end}")
    if len(pieces) != 3 or pieces[0] != "blk" or not pieces[1].isdecimal() or pieces[2] not in PARTS:
        return rename(name, name)  # which no family knows
    target = f"model.layers.{pieces[1]}.{PARTS[pieces[2]]}.{end}"
    count, (rows, *rest) = heads.get(pieces[2]), shape
    if not count or count < 0 or rows % (2 * count):
        return rename(name, target)
    apart, together = (count, rows // count // 2, 2, *rest), (count, 2, rows // count // 2, *rest)
    axes = (0, 2, 1, *range(3, 3 + len(rest)))
    return rename(name, target, Reshape(shape, apart), Permute(axes), Reshape(together, shape))


def _weight(file: GgufFile, tensor: GgufTensor) -> Weight:
    name, kind, shape = tensor.name, tensor.type, tensor.shape
    if kind.name in PLAIN:
        return Weight(shape, PLAIN[kind.name], lambda: _aligned(file.read(name).view(PLAIN[kind.name])).reshape(shape))
    bits = 8 * kind.size / kind.count
    if kind.name in gguf_blocks.STORED and len(shape) >= 2:
        return QuantizedWeight.of(shape, gguf_blocks.STORED[kind.name], lambda: _codes(file, tensor), "bf16", bits)
    reason = "its scales have offsets, which no kernel reads"
    return DequantizedWeight.of(shape, lambda: _dense(file, tensor), kind.name, reason, bits)


def _aligned(array: Array) -> Array:
    return array if array.flags.aligned else array.copy()


def _codes(file: GgufFile, tensor: GgufTensor) -> QuantizedLinear:
    its = gguf_blocks.codes(tensor.type.name, file.read(tensor.name), tensor.shape)
    if its.scales is not None:
        _check(file, tensor, its.scales)
    return its


def _dense(file: GgufFile, tensor: GgufTensor) -> Array:
    raw, kind = file.read(tensor.name), tensor.type.name
    if kind in gguf_blocks.STORED:
        return gguf_blocks.codes(kind, raw, (1, tensor.shape[-1])).dense().reshape(tensor.shape)
    dense = gguf_blocks.dense(kind, raw).reshape(tensor.shape)
    _check(file, tensor, dense)
    return dense


def _check(file: GgufFile, tensor: GgufTensor, numbers: Array) -> None:
    if not np.isfinite(numbers).all():
        raise CheckpointError(f"{file.path}: tensor {one_line(tensor.name)} has a scale that is not finite; download the file again")
