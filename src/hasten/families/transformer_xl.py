"""Transformer-XL (Dai et al. 2019): segments with memory, relative positions, plain feed-forward; normally norms after the sums.

The paper's memory holds each layer's past inputs. Keys and values are linear in them, so caching keys and values is the same thing;
what a query sees is the Spec's SegmentMemory. A sequence begins with no memory, as in the paper."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.formats.tensor_map import Repeat, Split, TensorMap, TensorMapping, rename, split
from hasten.spec import (
    MLP,
    Attention,
    Block,
    Embedding,
    Head,
    LayerNorm,
    PostNorm,
    PreNorm,
    RelativeSinusoid,
    SegmentMemory,
    SlidingWindow,
    Spec,
    Visibility,
)

_CONTEXT = 1 << 20  # memory is bounded whatever the length; this bounds what a request may ask for


def read(reader: ConfigReader) -> Spec:
    """Spec of a TransfoXLConfig."""
    width, heads, head_dim = reader.size("d_model"), reader.size("n_head"), reader.size("d_head")
    if width % 2:
        raise reader.wrong("d_model", width, "an even number is needed, for sines and cosines")
    # Adaptive embeddings and softmax cut the vocabulary into bands of falling width; only one band is supported.
    reader.must_be("cutoffs", [])
    reader.must_be("div_val", 1)
    reader.must_be("d_embed", width)
    reader.must_be("attn_type", 0)
    reader.must_be("sample_softmax", -1, 0)
    reader.neutral(
        "adaptive", "untie_r", "proj_share_all_but_first", "tie_projs", "dropout", "dropatt", "init", "init_range", "proj_init_std",
        "tie_word_embeddings", "tie_weight", "ext_len",
    )  # fmt: skip
    memory = reader.count("mem_len", 1600)
    visible: Visibility = SegmentMemory(segment=reader.size("tgt_len", 128), memory=memory)
    if reader.flag("same_length", True):
        if memory == 0:
            raise reader.wrong("mem_len", memory, "with same_length a query sees mem_len keys, so at least 1 is needed")
        visible = SlidingWindow(size=memory)
    clamp = reader.signed("clamp_len", 1000)
    norm = LayerNorm(eps=reader.number("layer_norm_epsilon", 1e-5))
    before = reader.flag("pre_lnorm", False)
    block = Block(
        mixer=Attention(
            heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
            position=RelativeSinusoid(clamp=clamp if clamp > 0 else None), visible=visible,
        ),
        feed_forward=MLP(hidden=reader.size("d_inner"), activation="relu", bias=True),
        wiring=PreNorm(mixer=norm, feed_forward=norm) if before else PostNorm(mixer=norm, feed_forward=norm),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=_CONTEXT, embedding=Embedding(scale=float(width) ** 0.5),
        blocks=(block,) * reader.parts("n_layer"), norm=None, head=Head(tied=_tied(reader), bias=True),
    )  # fmt: skip


def _tied(reader: ConfigReader) -> bool:
    return reader.flag("tie_word_embeddings", reader.flag("tie_weight", True))


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of TransfoXLLMHeadModel."""
    return tuple(_tensors(spec, untied=config.get("untie_r", True)))


def _tensors(spec: Spec, untied: bool) -> Iterator[TensorMapping]:
    yield rename("transformer.word_emb.emb_layers.0.weight", "embedding.weight")
    yield rename("crit.out_layers.0.bias", "head.bias")
    if not spec.head.tied:
        yield rename("crit.out_layers.0.weight", "head.weight")
    layers = range(len(spec.blocks))
    biases = (("r_w_bias", "content_bias"), ("r_r_bias", "position_bias"))
    if not untied:
        for theirs, ours in biases:
            yield split(f"transformer.{theirs}", [f"blocks.{index}.mixer.{ours}" for index in layers], Repeat(len(layers)))
    for index in layers:
        mixer = spec.blocks[index].mixer
        if not isinstance(mixer, Attention):
            continue
        source, target = f"transformer.layers.{index}", f"blocks.{index}"
        rows = mixer.heads * mixer.head_dim
        yield split(f"{source}.dec_attn.qkv_net.weight", [f"{target}.mixer.{name}.weight" for name in "qkv"], Split((rows, rows, rows)))
        yield rename(f"{source}.dec_attn.o_net.weight", f"{target}.mixer.o.weight")
        yield rename(f"{source}.dec_attn.r_net.weight", f"{target}.mixer.position.weight")
        if untied:
            for theirs, ours in biases:
                yield rename(f"{source}.dec_attn.{theirs}", f"{target}.mixer.{ours}")
        for part in ("weight", "bias"):
            yield rename(f"{source}.dec_attn.layer_norm.{part}", f"{target}.mixer_norm.{part}")
            yield rename(f"{source}.pos_ff.layer_norm.{part}", f"{target}.feed_forward_norm.{part}")
            yield rename(f"{source}.pos_ff.CoreNet.0.{part}", f"{target}.feed_forward.up.{part}")
            yield rename(f"{source}.pos_ff.CoreNet.3.{part}", f"{target}.feed_forward.down.{part}")


_TINY = {
    "model_type": "transfo-xl", "vocab_size": 97, "d_model": 32, "d_embed": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "n_layer": 2,
    "cutoffs": [], "div_val": 1, "mem_len": 9, "tgt_len": 6, "same_length": False, "clamp_len": -1,
}  # fmt: skip

FAMILY = Family(
    name="transformer_xl",
    model_types=("transfo-xl",),
    read=read,
    tensors=tensors,
    base_prefix="transformer.",
    ignored=(r"transformer\.pos_emb\.inv_freq",),
    tied_head="crit.out_layers.0.weight",
    examples=(
        _TINY,
        {**_TINY, "clamp_len": 4, "untie_r": False, "tie_word_embeddings": False, "d_head": 6, "mem_len": 3},
        {**_TINY, "same_length": True, "clamp_len": 5, "pre_lnorm": True, "mem_len": 5},
    ),
)
