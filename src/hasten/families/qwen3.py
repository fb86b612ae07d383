"""Qwen 3 (dense): Qwen 2 with q/k norms over each head, heads of a size of their own, and biases only where asked for."""

from hasten.families.config import ConfigReader
from hasten.families.family import Family
from hasten.families.llama import tensors
from hasten.families.mistral import decoder, read_kv_heads
from hasten.families.qwen2 import layer_windows
from hasten.families.rope import read_rotary
from hasten.spec import Attention, RMSNorm, Spec


def read(reader: ConfigReader) -> Spec:
    """Spec of a Qwen3Config."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 32768)
    head_dim, kv_heads = reader.size("head_dim", 128), read_kv_heads(reader, heads, 32)
    position = read_rotary(reader, head_dim=head_dim, context=context)
    bias, norm = reader.flag("attention_bias", False), RMSNorm(eps=reader.number("rms_norm_eps", 1e-6))
    mixers = (
        Attention(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5, position=position, visible=visible,
            bias=bias, out_bias=bias, q_norm=norm, k_norm=norm,
        )
        for visible in layer_windows(reader)
    )  # fmt: skip
    return decoder(reader, width, context, mixers)


_TINY = {
    "model_type": "qwen3", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128,
}  # fmt: skip

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    examples=(
        {**_TINY, "sliding_window": 5, "max_window_layers": 1},
        {**_TINY, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "attention_bias": True,
         "tie_word_embeddings": True, "num_key_value_heads": None, "rms_norm_eps": 1e-3},
        {**_TINY, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3, "num_key_value_heads": 1,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"],
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
)  # fmt: skip
