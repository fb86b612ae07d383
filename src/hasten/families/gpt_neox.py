"""GPT-NeoX and Pythia: layer norms with biases, branches side by side or in turn, partly rotated heads, q, k and v interleaved by head."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.families.llama import ACTIVATIONS
from hasten.families.rope import read_rotary
from hasten.formats.tensor_map import Permute, Reshape, TensorMap, TensorMapping, Unstack, rename, split
from hasten.spec import MLP, Attention, Block, Embedding, Head, LayerNorm, Parallel, PreNorm, Spec


def read(reader: ConfigReader) -> Spec:
    """Spec of a GPTNeoXConfig."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 2048)
    if width % heads:
        raise reader.wrong("num_attention_heads", heads, f"a divisor of hidden_size = {width} is needed")
    head_dim = width // heads
    # The family's own names. The usual ones beside them are not read by transformers, so they may only repeat them.
    base, partial = reader.positive("rotary_emb_base", 10000.0), reader.positive("rotary_pct", 0.25)
    reader.must_be("rope_theta", base)
    reader.must_be("partial_rotary_factor", partial)
    position = read_rotary(reader, head_dim=head_dim, context=context, theta=base, partial=partial)
    norm = LayerNorm(eps=reader.number("layer_norm_eps", 1e-5))
    bias = reader.flag("attention_bias", True)
    block = Block(
        mixer=Attention(
            heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5, position=position, bias=bias,
            out_bias=bias,
        ),
        feed_forward=MLP(hidden=reader.size("intermediate_size"), activation=reader.choice("hidden_act", ACTIVATIONS, "gelu"), bias=True),
        wiring=(Parallel if reader.flag("use_parallel_residual", True) else PreNorm)(mixer=norm, feed_forward=norm),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=(block,) * reader.parts("num_hidden_layers"), norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of GPTNeoXForCausalLM."""
    return tuple(_tensors(spec))


def _tensors(spec: Spec) -> Iterator[TensorMapping]:
    yield rename("gpt_neox.embed_in.weight", "embedding.weight")
    for part in ("weight", "bias"):
        yield rename(f"gpt_neox.final_layer_norm.{part}", f"norm.{part}")
    if not spec.head.tied:
        yield rename("embed_out.weight", "head.weight")
    for index, block in enumerate(spec.blocks):
        mixer = block.mixer
        if not isinstance(mixer, Attention):
            continue
        theirs, ours = f"gpt_neox.layers.{index}", f"blocks.{index}"
        for part in ("weight", "bias"):
            yield rename(f"{theirs}.input_layernorm.{part}", f"{ours}.mixer_norm.{part}")
            yield rename(f"{theirs}.post_attention_layernorm.{part}", f"{ours}.feed_forward_norm.{part}")
            yield rename(f"{theirs}.mlp.dense_h_to_4h.{part}", f"{ours}.feed_forward.up.{part}")
            yield rename(f"{theirs}.mlp.dense_4h_to_h.{part}", f"{ours}.feed_forward.down.{part}")
        for part, columns in (("weight", (spec.width,)), ("bias", ())) if mixer.bias else (("weight", (spec.width,)),):
            yield _by_head(f"{theirs}.attention.query_key_value.{part}", f"{ours}.mixer", part, mixer, columns)
            yield rename(f"{theirs}.attention.dense.{part}", f"{ours}.mixer.o.{part}")


def _by_head(source: str, ours: str, part: str, mixer: Attention, columns: tuple[int, ...]) -> TensorMapping:
    """Rows come head by head: a head's queries, then its keys, then its values."""
    heads, dim = mixer.heads, mixer.head_dim
    rows = heads * dim
    return split(
        source, [f"{ours}.{name}.{part}" for name in "qkv"],
        Reshape((3 * rows, *columns), (heads, 3, dim, *columns)), Permute((1, 0, 2, 3)[: 3 + len(columns)]),
        Reshape((3, heads, dim, *columns), (3, rows, *columns)), Unstack(3),
    )  # fmt: skip


_TINY = {
    "model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip

FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    read=read,
    tensors=tensors,
    base_prefix="gpt_neox.",
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    tied_head="embed_out.weight",
    examples=(
        _TINY,
        {**_TINY, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        {**_TINY, "rotary_pct": 0.5, "rotary_emb_base": 300, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
        {**_TINY, "num_hidden_layers": 1, "hidden_size": 48, "use_parallel_residual": False, "hidden_act": "relu",
         "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": 0.5}},
    ),
)  # fmt: skip
