"""BLOOM: ALiBi, layer norms with biases (one after the embedding), plain feed-forward, q, k and v in one tensor head by head."""

from hasten.families.alibi import alibi_slopes
from hasten.families.config import ConfigReader
from hasten.families.falcon import tensors
from hasten.families.family import Family
from hasten.spec import MLP, Alibi, Attention, Block, Embedding, Head, LayerNorm, PreNorm, Spec


def read(reader: ConfigReader) -> Spec:
    """Spec of a BloomConfig."""
    width, heads = reader.size_under("hidden_size", "n_embed"), reader.parts_under("n_head", "num_attention_heads")
    if width % heads:
        raise reader.wrong("n_head", heads, f"a divisor of hidden_size = {width} is needed")
    head_dim = width // heads
    reader.must_be("apply_residual_connection_post_layernorm", False)  # the residual would start from the norm's output
    if reader.size("pretraining_tp", 1) > 1:
        reader.must_be("slow_but_exact", False)  # transformers' sliced sum leaves out the biases of two layers
    # Megatron's own settings, and `n_inner`, which transformers does not read: the feed-forward is always four times as wide.
    reader.neutral(
        "slow_but_exact", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_inner", "offset_alibi",
        "skip_bias_add", "skip_bias_add_qkv", "unk_token_id",
    )  # fmt: skip
    norm = LayerNorm(eps=reader.number("layer_norm_epsilon", 1e-5))
    block = Block(
        mixer=Attention(
            heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
            position=Alibi(slopes=alibi_slopes(heads)), bias=True, out_bias=True,
        ),
        feed_forward=MLP(hidden=4 * width, activation="gelu_tanh", bias=True),
        wiring=PreNorm(mixer=norm, feed_forward=norm),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=reader.size("seq_length", 2048), embedding=Embedding(norm=norm),
        blocks=(block,) * reader.parts_under("n_layer", "num_hidden_layers"), norm=norm,
        head=Head(tied=reader.flag("tie_word_embeddings", True)),
    )  # fmt: skip


_TINY = {"model_type": "bloom", "vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 6}

FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    read=read,
    tensors=tensors,
    base_prefix="transformer.",
    examples=(
        _TINY,
        {**_TINY, "n_head": 4, "hidden_size": 40, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False, "pretraining_tp": 2},
        {"model_type": "bloom", "vocab_size": 97, "n_embed": 44, "num_attention_heads": 11, "num_hidden_layers": 1, "slow_but_exact": True,
         "attention_softmax_in_fp32": True, "masked_softmax_fusion": True, "offset_alibi": 100, "seq_length": 128},
    ),
)  # fmt: skip
