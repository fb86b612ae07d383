"""MPT: ALiBi, layer norms and linear layers without biases, plain feed-forward, q, k and v one after another in one tensor."""

from collections.abc import Iterator

from hasten.families.alibi import alibi_slopes
from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.formats.tensor_map import Split, TensorMap, TensorMapping, rename, split
from hasten.spec import MLP, Alibi, Attention, Block, Embedding, Head, LayerNorm, PreNorm, Spec


def read(reader: ConfigReader) -> Spec:
    """Spec of an MptConfig.

    Transformers reads only part of it. What it leaves out is refused here where the published code takes it to mean another model."""
    width, heads = reader.size_under("d_model", "hidden_size"), reader.parts_under("n_heads", "num_attention_heads")
    if width % heads:
        raise reader.wrong("n_heads", heads, f"a divisor of d_model = {width} is needed")
    reader.must_be("expansion_ratio", 4)  # transformers builds 4 whatever it says
    reader.must_be("norm_type", "low_precision_layernorm", "layernorm")
    reader.must_be("logit_scale")  # read by the original code only
    # ALiBi rules out `learned_pos_emb`. `no_bias` builds no bias either way: checkpoints with biases have tensors that are refused.
    reader.neutral(
        "learned_pos_emb", "no_bias", "emb_pdrop", "embedding_fraction", "init_config", "init_device", "tokenizer_name", "verbose",
    )  # fmt: skip
    norm = LayerNorm(eps=reader.number("layer_norm_epsilon", 1e-5), bias=False)
    block = Block(
        mixer=_attention(reader.section("attn_config") or ConfigReader({}), width // heads, heads),
        feed_forward=MLP(hidden=4 * width, activation="gelu"),
        wiring=PreNorm(mixer=norm, feed_forward=norm),
    )
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=reader.size("max_seq_len", 2048), embedding=Embedding(),
        blocks=(block,) * reader.parts_under("n_layers", "num_hidden_layers"), norm=norm,
        head=Head(tied=reader.flag("tie_word_embeddings", True)),
    )  # fmt: skip


def _attention(section: ConfigReader, head_dim: int, heads: int) -> Attention:
    section.must_be("alibi", True)  # without it the original learns positions, and transformers biases all the same
    section.must_be("attn_type", "multihead_attention")
    section.must_be("qk_ln", False)
    section.must_be("prefix_lm", False)
    section.must_be("is_encoder_decoder", False)
    # `attn_uses_sequence_id` separates texts packed into one training row.
    section.neutral("attn_impl", "attn_uses_sequence_id", "add_cross_attention", "tie_word_embeddings")
    slopes = alibi_slopes(heads, section.positive("alibi_bias_max", 8.0))
    mixer = Attention(
        heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim, scale=section.positive("softmax_scale", head_dim**-0.5),
        position=Alibi(slopes=slopes), clip=section.optional_positive("clip_qkv") if section.number("clip_qkv", 0.0) else None,
    )  # fmt: skip
    section.finish()
    return mixer


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of MptForCausalLM."""
    return tuple(_tensors(spec))


def _tensors(spec: Spec) -> Iterator[TensorMapping]:
    yield rename("transformer.wte.weight", "embedding.weight")
    yield rename("transformer.norm_f.weight", "norm.weight")
    if not spec.head.tied:
        yield rename("lm_head.weight", "head.weight")
    for index in range(len(spec.blocks)):
        theirs, ours = f"transformer.blocks.{index}", f"blocks.{index}"
        yield rename(f"{theirs}.norm_1.weight", f"{ours}.mixer_norm.weight")
        yield rename(f"{theirs}.norm_2.weight", f"{ours}.feed_forward_norm.weight")
        yield split(f"{theirs}.attn.Wqkv.weight", [f"{ours}.mixer.{name}.weight" for name in "qkv"], Split((spec.width,) * 3))
        yield rename(f"{theirs}.attn.out_proj.weight", f"{ours}.mixer.o.weight")
        yield rename(f"{theirs}.ffn.up_proj.weight", f"{ours}.feed_forward.up.weight")
        yield rename(f"{theirs}.ffn.down_proj.weight", f"{ours}.feed_forward.down.weight")


_TINY = {"model_type": "mpt", "vocab_size": 97, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}

FAMILY = Family(
    name="mpt",
    model_types=("mpt",),
    read=read,
    tensors=tensors,
    base_prefix="transformer.",
    examples=(
        _TINY,
        {**_TINY, "n_heads": 3, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False, "no_bias": False, "learned_pos_emb": False,
         "attn_config": {"alibi_bias_max": 16, "clip_qkv": 0.8, "softmax_scale": 0.3}},
        {**_TINY, "n_heads": 8, "n_layers": 1, "attn_config": {"alibi": True, "alibi_bias_max": 4, "attn_impl": "torch", "clip_qkv": 0.0}},
    ),
)  # fmt: skip
