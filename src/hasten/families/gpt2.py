"""GPT-2: learned positions, layer norms with biases, plain feed-forward, transposed weights, q, k and v in one tensor."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.families.llama import ACTIVATIONS
from hasten.formats.tensor_map import TRANSPOSE, Split, TensorMap, TensorMapping, rename, split
from hasten.spec import MLP, Attention, Block, Embedding, Head, LayerNorm, LearnedPositions, PreNorm, Spec


def read(reader: ConfigReader) -> Spec:
    """Spec of a GPT2Config."""
    width, heads, context = reader.size("n_embd"), reader.size("n_head"), reader.size("n_positions", 1024)
    reader.must_be("add_cross_attention", False)
    reader.neutral("reorder_and_upcast_attn", "n_ctx")  # upcasting is what hasten always does
    if width % heads:
        raise reader.wrong("n_head", heads, f"a divisor of n_embd = {width} is needed")
    head_dim = width // heads
    scale = head_dim**-0.5 if reader.flag("scale_attn_weights", True) else 1.0
    by_layer = reader.flag("scale_attn_by_inverse_layer_idx", False)
    norm = LayerNorm(eps=reader.number("layer_norm_epsilon", 1e-5))
    feed_forward = MLP(
        hidden=reader.size("n_inner", 4 * width),
        activation=reader.choice("activation_function", ACTIVATIONS, "gelu_new"),
        bias=True,
    )
    return Spec(
        vocab=reader.size("vocab_size"),
        width=width,
        context=context,
        embedding=Embedding(positions=LearnedPositions(count=context)),
        blocks=tuple(
            Block(
                mixer=Attention(
                    heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim, scale=scale / (index + 1 if by_layer else 1),
                    position=None, bias=True, out_bias=True,
                ),
                feed_forward=feed_forward,
                wiring=PreNorm(mixer=norm, feed_forward=norm),
            )
            for index in range(reader.parts("n_layer"))
        ),
        norm=norm,
        head=Head(tied=reader.flag("tie_word_embeddings", True)),
    )  # fmt: skip


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of GPT2LMHeadModel."""
    return tuple(_tensors(spec))


def _tensors(spec: Spec) -> Iterator[TensorMapping]:
    yield rename("transformer.wte.weight", "embedding.weight")
    yield rename("transformer.wpe.weight", "embedding.positions.weight")
    for part in ("weight", "bias"):
        yield rename(f"transformer.ln_f.{part}", f"norm.{part}")
    if not spec.head.tied:
        yield rename("lm_head.weight", "head.weight")
    thirds = (spec.width,) * 3
    for index in range(len(spec.blocks)):
        theirs, ours = f"transformer.h.{index}", f"blocks.{index}"
        for part in ("weight", "bias"):
            yield rename(f"{theirs}.ln_1.{part}", f"{ours}.mixer_norm.{part}")
            yield rename(f"{theirs}.ln_2.{part}", f"{ours}.feed_forward_norm.{part}")
            steps = (TRANSPOSE,) if part == "weight" else ()
            yield split(f"{theirs}.attn.c_attn.{part}", [f"{ours}.mixer.{name}.{part}" for name in "qkv"], *steps, Split(thirds))
            yield rename(f"{theirs}.attn.c_proj.{part}", f"{ours}.mixer.o.{part}", *steps)
            yield rename(f"{theirs}.mlp.c_fc.{part}", f"{ours}.feed_forward.up.{part}", *steps)
            yield rename(f"{theirs}.mlp.c_proj.{part}", f"{ours}.feed_forward.down.{part}", *steps)


_TINY = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    read=read,
    tensors=tensors,
    base_prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    examples=(
        _TINY,
        {**_TINY, "n_inner": 40, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
        {**_TINY, "n_layer": 1, "n_head": 2, "scale_attn_weights": False, "layer_norm_epsilon": 1e-3},
    ),
)
