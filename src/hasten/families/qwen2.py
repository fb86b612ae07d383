"""Qwen 2 and 2.5: Llama with biases on q, k and v alone, and layers that slide where the config switches that on."""

from hasten.families.config import ConfigReader, check_layer_types
from hasten.families.family import Family
from hasten.families.llama import tensors
from hasten.families.mistral import decoder, read_kv_heads, read_window, window
from hasten.families.rope import read_rotary
from hasten.spec import Attention, Spec, Visibility

_KINDS = ("full_attention", "sliding_attention")


def read(reader: ConfigReader) -> Spec:
    """Spec of a Qwen2Config."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 32768)
    head_dim, kv_heads = reader.size("head_dim", max(1, width // heads)), read_kv_heads(reader, heads, 32)
    position = read_rotary(reader, head_dim=head_dim, context=context)
    mixers = (
        Attention(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5, position=position, visible=visible,
            bias=True,
        )
        for visible in layer_windows(reader)
    )  # fmt: skip
    return decoder(reader, width, context, mixers)


def layer_windows(reader: ConfigReader) -> tuple[Visibility, ...]:
    """What each layer sees: as `layer_types` says, or else the layers from `max_window_layers` on slide."""
    layers, first = reader.parts("num_hidden_layers"), reader.signed("max_window_layers", 28)
    reader.neutral("sliding_window")  # it says nothing unless use_sliding_window is set
    size = read_window(reader, 4096) if reader.flag("use_sliding_window", False) else None
    kinds = reader.names("layer_types")
    check_layer_types(reader, kinds, layers, _KINDS)
    if kinds is None:
        return tuple(window(size if index >= first else None) for index in range(layers))
    if size is None and "sliding_attention" in kinds:
        raise reader.wrong("layer_types", list(kinds), "sliding layers need use_sliding_window and a sliding_window")
    return tuple(window(size if kind == "sliding_attention" else None) for kind in kinds)


_TINY = {
    "model_type": "qwen2", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    examples=(
        {**_TINY, "sliding_window": 5, "max_window_layers": 1},
        {**_TINY, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
         "tie_word_embeddings": True, "num_key_value_heads": None},
        {**_TINY, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3, "head_dim": 12,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_key_value_heads": 1},
        {**_TINY, "num_hidden_layers": 1, "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
)  # fmt: skip
