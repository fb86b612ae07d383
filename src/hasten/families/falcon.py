"""Falcon: attention and feed-forward side by side, one key/value head or a few, q, k and v in one tensor; rotary or ALiBi."""

from collections.abc import Iterator

from hasten.base.errors import UnsupportedError
from hasten.families.alibi import alibi_slopes
from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.families.llama import ACTIVATIONS
from hasten.families.rope import read_rotary
from hasten.formats.tensor_map import Each, Reshape, Split, TensorMap, TensorMapping, rename, split
from hasten.spec import MLP, Alibi, Attention, Block, Embedding, Head, LayerNorm, Parallel, PreNorm, Rotary, Spec, Wiring


def read(reader: ConfigReader) -> Spec:
    """Spec of a FalconConfig."""
    width, heads = reader.size_under("hidden_size", "n_embed"), reader.parts_under("num_attention_heads", "n_head")
    if width % heads:
        raise reader.wrong("num_attention_heads", heads, f"a divisor of hidden_size = {width} is needed")
    head_dim, context = width // heads, reader.size("max_position_embeddings", 2048)
    bias, norm = reader.flag("bias", False), LayerNorm(eps=reader.number("layer_norm_epsilon", 1e-5))
    reader.neutral("ff_factor", "apply_residual_connection_post_layernorm")  # transformers and the original code read neither
    block = Block(
        mixer=Attention(
            heads=heads, kv_heads=_kv_heads(reader, heads), head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
            position=_position(reader, heads, head_dim, context), bias=bias, out_bias=bias,
        ),
        feed_forward=MLP(
            hidden=reader.size("ffn_hidden_size", 4 * width), activation=reader.choice("activation", ACTIVATIONS, "gelu"), bias=bias
        ),
        wiring=_wiring(reader, norm),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=(block,) * reader.parts_under("num_hidden_layers", "n_layer"), norm=norm,
        head=Head(tied=reader.flag("tie_word_embeddings", True)),
    )  # fmt: skip


def _kv_heads(reader: ConfigReader, heads: int) -> int:
    if reader.flag("new_decoder_architecture", False):
        reader.neutral("multi_query")  # the new decoder counts its key/value heads
        keys = [key for key in ("num_kv_heads", "n_head_kv") if reader.has(key)]
        return reader.size_under(*keys) if keys else heads
    if reader.flag("multi_query", True):
        reader.neutral("num_kv_heads", "n_head_kv")  # one, whatever they say; saved configs say the number of heads
        return 1
    reader.must_be("num_kv_heads", heads)
    reader.must_be("n_head_kv", heads)
    return heads


def _position(reader: ConfigReader, heads: int, head_dim: int, context: int) -> Rotary | Alibi:
    if reader.flag("alibi", False):
        reader.neutral("rope_parameters", "rope_scaling", "rope_theta")
        # The bias is added before the scores are divided by the root of the head dimension. Transformers rounds it to bfloat16 whatever
        # the model's dtype, which shows past position 256 or with more than 8 heads, and which no slope can say.
        return Alibi(slopes=tuple(slope * head_dim**-0.5 for slope in alibi_slopes(heads)))
    rotary = read_rotary(reader, head_dim=head_dim, context=context)
    if rotary.dims != head_dim:
        raise UnsupportedError(f"config.json: 'partial_rotary_factor' is {rotary.dims / head_dim}, which is not supported; supported: 1")
    return rotary


def _wiring(reader: ConfigReader, norm: LayerNorm) -> Wiring:
    """Transformers builds a layer it cannot run for the combinations refused here."""
    grouped, parallel = reader.flag("new_decoder_architecture", False), reader.flag("parallel_attn", True)
    if not grouped and not parallel:
        reader.neutral("num_ln_in_parallel_attn")  # nothing is parallel
        return PreNorm(mixer=norm, feed_forward=norm)
    if not grouped:
        reader.must_be("num_ln_in_parallel_attn", 1)
        return Parallel(mixer=norm, feed_forward=None)
    reader.must_be("parallel_attn", True)
    reader.must_be("num_ln_in_parallel_attn", 1, 2)
    return Parallel(mixer=norm, feed_forward=norm if reader.size("num_ln_in_parallel_attn", 2) == 2 else None)


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of FalconForCausalLM (and of BloomForCausalLM)."""
    return tuple(_tensors(spec))


def _tensors(spec: Spec) -> Iterator[TensorMapping]:
    yield rename("transformer.word_embeddings.weight", "embedding.weight")
    if spec.embedding.norm is not None:
        yield from _with_bias("transformer.word_embeddings_layernorm", "embedding.norm")
    yield from _with_bias("transformer.ln_f", "norm")
    if not spec.head.tied:
        yield rename("lm_head.weight", "head.weight")
    for index, block in enumerate(spec.blocks):
        theirs, ours = f"transformer.h.{index}", f"blocks.{index}"
        match block.wiring:
            case PreNorm():
                yield from _with_bias(f"{theirs}.input_layernorm", f"{ours}.mixer_norm")
                yield from _with_bias(f"{theirs}.post_attention_layernorm", f"{ours}.feed_forward_norm")
            case Parallel(feed_forward=None):
                yield from _with_bias(f"{theirs}.input_layernorm", f"{ours}.mixer_norm")
            case Parallel():
                yield from _with_bias(f"{theirs}.ln_attn", f"{ours}.mixer_norm")
                yield from _with_bias(f"{theirs}.ln_mlp", f"{ours}.feed_forward_norm")
        if isinstance(mixer := block.mixer, Attention):
            yield from fused_qkv(mixer, spec.width, f"{theirs}.self_attention.query_key_value", f"{ours}.mixer")
            yield from _with_bias(f"{theirs}.self_attention.dense", f"{ours}.mixer.o", mixer.out_bias)
        if isinstance(part := block.feed_forward, MLP):
            yield from _with_bias(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.feed_forward.up", part.bias)
            yield from _with_bias(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.feed_forward.down", part.bias)


def _with_bias(theirs: str, ours: str, bias: bool = True) -> Iterator[TensorMapping]:
    for part in ("weight", "bias") if bias else ("weight",):
        yield rename(f"{theirs}.{part}", f"{ours}.{part}")


def fused_qkv(mixer: Attention, width: int, theirs: str, ours: str) -> Iterator[TensorMapping]:
    """q, k and v of one tensor that holds, for each key/value head, the rows of the queries that share it, then its own."""
    groups, dim = mixer.kv_heads, mixer.head_dim
    rows = (mixer.heads // groups * dim, dim, dim)
    for part, rest in (("weight", (width,)), ("bias", ())) if mixer.bias else (("weight", (width,)),):
        yield split(
            f"{theirs}.{part}",
            [f"{ours}.{name}.{part}" for name in "qkv"],
            Reshape((groups * sum(rows), *rest), (groups, sum(rows), *rest)),
            Split(rows, axis=1),
            Each(tuple(Reshape((groups, size, *rest), (groups * size, *rest)) for size in rows)),
        )


_TINY = {
    "model_type": "falcon", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 64,
}  # fmt: skip

FAMILY = Family(
    name="falcon",
    model_types=("falcon",),
    read=read,
    tensors=tensors,
    base_prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.self_attention\.(maybe_rotary|rotary_emb)\.inv_freq",),
    examples=(
        _TINY,
        {**_TINY, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 56, "tie_word_embeddings": False,
         "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
        {**_TINY, "new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "activation": "relu", "alibi": True,
         "layer_norm_epsilon": 1e-3},
        {**_TINY, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    ),
)  # fmt: skip
