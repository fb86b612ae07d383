"""``random:SHAPE``: models of well-known shapes with random weights, for speed work without a download.

``random:SHAPE@2:4`` has two zeros among every four inputs of its matrices, ``random:SHAPE@50%`` zeros anywhere, half of all."""

import functools
import itertools
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UnsupportedError, one_line
from hasten.families import find_family
from hasten.formats.weights import Array, Origin, Weight, Weights
from hasten.model import Model, Provenance, Source
from hasten.program import lower
from hasten.spec import RMSNorm

PREFIX = "random:"

GENERATOR = 1
"""Counts up whenever `_make` comes to other numbers: packed weights are kept under it."""

_BLOCK = 1 << 19  # elements made at a time, so that only the last pass goes to memory

_LLAMA31 = {
    "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "num_key_value_heads": 8,
}  # fmt: skip
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960,
          "rope_theta": 1000000.0}  # fmt: skip

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    },
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "llama-3.2-1b": {
        **_LLAMA31, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "llama-3.1-8b": {
        **_LLAMA31, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "mistral-7b": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
        "rms_norm_eps": 1e-5,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    "gemma-3-1b": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "max_position_embeddings": 32768,
    },
    "mamba2-1.3b": {
        "model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2048, "num_heads": 64, "head_dim": 64, "state_size": 128,
        "n_groups": 1, "num_hidden_layers": 48, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Published shapes, as the configs their authors ship."""

_FOURS = np.array([sum(0xFFFF << (16 * i) for i in pair) for pair in itertools.combinations(range(4), 2)], np.uint64)
ZEROS: Mapping[str, Any] = {
    "2:4": lambda generator, words: np.bitwise_and(words, _FOURS[generator.integers(0, len(_FOURS), len(words))], out=words),
    "50%": lambda generator, words: np.bitwise_and(words, _kept(generator, 4 * len(words)).view(np.uint64), out=words),
}
"""What leaves zeros among words of four weights, by the name that says how many."""


def _kept(generator: np.random.Generator, count: int) -> NDArray[np.uint16]:
    """All bits of about half the elements."""
    bits = np.unpackbits(generator.integers(0, 256, -(-count // 8), np.uint8))[:count]
    return np.negative(bits.astype(np.int16)).view(np.uint16)


def random_model(shape: str, seed: int = 0) -> Model:
    """A model of that shape whose bfloat16 weights are made when first asked for, from ``seed`` and their name, on pages of their own.

    Capitals are as good as small letters: authors write TinyLlama-1.1B. Raises UnsupportedError listing the shapes."""
    given, shape = shape, shape.lower()
    plain, _, zeros = shape.partition("@")
    if plain not in SHAPES:
        raise UnsupportedError(f"no shape {one_line(given)} for {PREFIX}SHAPE; shapes are {', '.join(SHAPES)}")
    if "@" in shape and zeros not in ZEROS:
        raise UnsupportedError(f"no zeros {one_line(zeros)} in {PREFIX}{one_line(given)}; accepted after @ are {', '.join(ZEROS)}")
    config = SHAPES[plain]
    family = find_family(config["model_type"])
    spec = family.spec(config)
    offset = spec.norm.offset if isinstance(spec.norm, RMSNorm) else 0.0
    weights = {
        name: Weight(size, np.dtype(ml_dtypes.bfloat16), functools.partial(_make, name, size, seed, 1.0 - offset, zeros))
        for name, size in lower(spec).params.items()
    }
    return Model(
        name=PREFIX + shape,
        spec=spec,
        weights=Weights(weights, Origin(f"{PREFIX}{shape} seed {seed} generator {GENERATOR}")),
        tokenizer_error=f"{PREFIX}{shape} has random weights and no tokenizer; give token ids instead of text",
        provenance=(Provenance("random", {"shape": shape, "seed": seed}),),
        source=Source(family.name, config),
    )


def _make(name: str, shape: tuple[int, ...], seed: int, norm_weight: float, zeros: str) -> Array:
    """Random signs and mantissas at one exponent, which gives a spread of about fan_in^−½ at the speed of memory."""
    if len(shape) == 1 and "norm" in name:
        return np.full(shape, norm_weight if name.endswith("weight") else 0.0, ml_dtypes.bfloat16)
    exponent = round(np.log2(shape[-1] ** -0.5 / 1.53)) + 127  # 1.53: root mean square of a mantissa uniform in [1, 2)
    count = int(np.prod(shape))
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    bits = np.empty(count, np.uint16)
    for begin in range(0, count, _BLOCK):
        block = bits[begin : begin + _BLOCK]
        words = generator.integers(0, 1 << 64, size=-(-len(block) // 4), dtype=np.uint64)
        halves = words.view(np.uint16)
        np.bitwise_or(np.bitwise_and(halves, 0x807F, out=halves), exponent << 7, out=halves)
        if zeros and len(shape) > 1 and "embedding" not in name:
            ZEROS[zeros](generator, words)
        block[:] = halves[: len(block)]
    weight: Array = bits.view(ml_dtypes.bfloat16).reshape(shape)
    return weight
