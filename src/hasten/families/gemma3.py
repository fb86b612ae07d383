"""Gemma 3 (text): norms before and after each branch, 1 + weight, per-head q/k norms, sliding and full layers with their own rotary."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader, check_layer_types
from hasten.families.family import Config, Family
from hasten.families.llama import ACTIVATIONS, attention, ends, gated_mlp
from hasten.families.rope import read_rotary
from hasten.formats.tensor_map import TensorMap, TensorMapping, rename
from hasten.spec import Attention, Block, Causal, Embedding, GatedMLP, Head, RMSNorm, Sandwich, SlidingWindow, Spec

_KINDS = ("sliding_attention", "full_attention")


def read(reader: ConfigReader) -> Spec:
    """Spec of a Gemma3TextConfig."""
    width, heads, layers = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.parts("num_hidden_layers")
    head_dim, context = reader.size("head_dim", 256), reader.size("max_position_embeddings", 131072)
    reader.must_be("use_bidirectional_attention", False)
    every = reader.size("_sliding_window_pattern", reader.size("sliding_window_pattern", 6))
    kinds = reader.names("layer_types")
    check_layer_types(reader, kinds, layers, _KINDS)
    kinds = kinds or tuple(_KINDS[(index + 1) % every == 0] for index in range(layers))
    window = SlidingWindow(size=reader.size("sliding_window", 4096))
    # The local layers' base has a key of its own in older configs, and none of the scaling.
    local_base = reader.positive("rope_local_base_freq", 10000.0)
    if reader.section("rope_parameters") is None:
        local = read_rotary(ConfigReader({"rope_theta": local_base}), head_dim=head_dim, context=context)
    else:
        local = read_rotary(reader, head_dim=head_dim, context=context, theta=local_base, layer_type="sliding_attention")
    rotary = {
        "sliding_attention": local,
        "full_attention": read_rotary(reader, head_dim=head_dim, context=context, theta=1e6, layer_type="full_attention"),
    }
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6), offset=1.0)
    bias = reader.flag("attention_bias", False)
    scale = reader.positive("query_pre_attn_scalar", 256.0) ** -0.5
    kv_heads = reader.size("num_key_value_heads", 4)
    reader.must_be("attn_logit_softcapping")  # Gemma 2's; Gemma 3 replaced it by the q/k norms
    feed_forward = GatedMLP(
        hidden=reader.size("intermediate_size"), activation=reader.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    )
    reader.neutral("hidden_act")  # hidden_activation is the one that counts
    return Spec(
        vocab=reader.size("vocab_size"),
        width=width,
        context=context,
        embedding=Embedding(scale=float(width) ** 0.5),
        blocks=tuple(
            Block(
                mixer=Attention(
                    heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, scale=scale, position=rotary[kind],
                    visible=window if kind == "sliding_attention" else Causal(), bias=bias, out_bias=bias, q_norm=norm, k_norm=norm,
                ),
                feed_forward=feed_forward,
                wiring=Sandwich(mixer=norm, mixer_post=norm, feed_forward=norm, feed_forward_post=norm),
            )
            for kind in kinds
        ),
        norm=norm,
        head=Head(tied=reader.flag("tie_word_embeddings", True), softcap=reader.optional_positive("final_logit_softcapping")),
    )  # fmt: skip


def sandwich_norms(index: int) -> Iterator[TensorMapping]:
    """The four norms of a Gemma block."""
    theirs, ours = f"model.layers.{index}", f"blocks.{index}"
    yield rename(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")
    yield rename(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mixer_post_norm.weight")
    yield rename(f"{theirs}.pre_feedforward_layernorm.weight", f"{ours}.feed_forward_norm.weight")
    yield rename(f"{theirs}.post_feedforward_layernorm.weight", f"{ours}.feed_forward_post_norm.weight")


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of Gemma3ForCausalLM (and of Gemma2ForCausalLM)."""
    return (
        *ends(spec),
        *(
            mapping
            for index in range(len(spec.blocks))
            for mapping in (*sandwich_norms(index), *attention(spec, index), *gated_mlp(spec, index))
        ),
    )


_TINY = {
    "model_type": "gemma3_text", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "sliding_window": 7,
    "query_pre_attn_scalar": 24,
}  # fmt: skip

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    examples=(
        {**_TINY, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {**_TINY, "head_dim": 12, "num_key_value_heads": 1, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
         "attention_bias": True, "tie_word_embeddings": False, "sliding_window": 3, "final_logit_softcapping": 5.0,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
)  # fmt: skip
