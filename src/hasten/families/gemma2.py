"""Gemma 2: norms before and after each branch, 1 + weight, capped scores and logits, sliding and full layers in turn with one rotary."""

from hasten.families.config import ConfigReader, check_layer_types
from hasten.families.family import Family
from hasten.families.gemma3 import tensors
from hasten.families.llama import ACTIVATIONS
from hasten.families.mistral import read_window, window
from hasten.families.rope import read_rotary
from hasten.spec import Attention, Block, Embedding, GatedMLP, Head, RMSNorm, Sandwich, Spec

_KINDS = ("sliding_attention", "full_attention")


def read(reader: ConfigReader) -> Spec:
    """Spec of a Gemma2Config."""
    width, heads, layers = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.parts("num_hidden_layers")
    head_dim, context = reader.size("head_dim", 256), reader.size("max_position_embeddings", 8192)
    reader.must_be("use_bidirectional_attention", False)
    reader.neutral("hidden_act", "sliding_window_size")  # hidden_activation and sliding_window are the ones that count
    kinds = reader.names("layer_types")
    check_layer_types(reader, kinds, layers, _KINDS)
    kinds = kinds or tuple(_KINDS[index % 2] for index in range(layers))
    size = read_window(reader, 4096)
    if size is None and "sliding_attention" in kinds:
        raise reader.wrong("sliding_window", None, "sliding layers need a window")
    position = read_rotary(reader, head_dim=head_dim, context=context)
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6), offset=1.0)
    bias, kv_heads = reader.flag("attention_bias", False), reader.size("num_key_value_heads", 4)
    scale, softcap = reader.positive("query_pre_attn_scalar", 256.0) ** -0.5, _softcap(reader, "attn_logit_softcapping", 50.0)
    feed_forward = GatedMLP(
        hidden=reader.size("intermediate_size"), activation=reader.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    )
    return Spec(
        vocab=reader.size("vocab_size"),
        width=width,
        context=context,
        embedding=Embedding(scale=float(width) ** 0.5),
        blocks=tuple(
            Block(
                mixer=Attention(
                    heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, scale=scale, position=position,
                    visible=window(size if kind == "sliding_attention" else None), bias=bias, out_bias=bias, softcap=softcap,
                ),
                feed_forward=feed_forward,
                wiring=Sandwich(mixer=norm, mixer_post=norm, feed_forward=norm, feed_forward_post=norm),
            )
            for kind in kinds
        ),
        norm=norm,
        head=Head(tied=reader.flag("tie_word_embeddings", True), softcap=_softcap(reader, "final_logit_softcapping", 30.0)),
    )  # fmt: skip


def _softcap(reader: ConfigReader, key: str, default: float) -> float | None:
    """A cap, ``default`` where absent; null switches it off."""
    return default if reader.absent(key) else reader.optional_positive(key)


_TINY = {
    "model_type": "gemma2", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "sliding_window": 7,
    "query_pre_attn_scalar": 24,
}  # fmt: skip

FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    examples=(
        {**_TINY, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        {**_TINY, "head_dim": 12, "num_key_value_heads": 1, "layer_types": ["full_attention", "full_attention", "sliding_attention"],
         "attention_bias": True, "tie_word_embeddings": False, "sliding_window": 3, "final_logit_softcapping": None,
         "attn_logit_softcapping": None, "rms_norm_eps": 1e-3,
         "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {**_TINY, "num_hidden_layers": 2, "attn_logit_softcapping": 0.5, "final_logit_softcapping": None, "hidden_activation": "gelu"},
    ),
)  # fmt: skip
