"""Llama: pre-norm, rotary, grouped-query attention, gated feed-forward. Most later families differ from it by a line or two."""

from collections.abc import Iterator, Mapping

from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.families.rope import read_rotary
from hasten.formats.tensor_map import TensorMap, TensorMapping, rename
from hasten.spec import Activation, Attention, Block, Embedding, GatedMLP, Head, PreNorm, RMSNorm, Spec

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu_squared", "sigmoid": "sigmoid",
    "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip
"""The names that Hugging Face configs have for a Spec's activations."""


def read(reader: ConfigReader) -> Spec:
    """Spec of a LlamaConfig."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 2048)
    head_dim = reader.size("head_dim", max(1, width // heads))
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6))
    attention_bias = reader.flag("attention_bias", False)
    block = Block(
        mixer=Attention(
            heads=heads, kv_heads=reader.size("num_key_value_heads", heads), head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
            position=read_rotary(reader, head_dim=head_dim, context=context), bias=attention_bias, out_bias=attention_bias,
        ),
        feed_forward=GatedMLP(
            hidden=reader.size("intermediate_size"), activation=reader.choice("hidden_act", ACTIVATIONS, "silu"),
            bias=reader.flag("mlp_bias", False),
        ),
        wiring=PreNorm(mixer=norm, feed_forward=norm),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=(block,) * reader.parts("num_hidden_layers"), norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of LlamaForCausalLM."""
    return (*ends(spec), *(mapping for index in range(len(spec.blocks)) for mapping in layer(spec, index)))


def ends(spec: Spec) -> Iterator[TensorMapping]:
    """Embedding, last norm and head."""
    yield rename("model.embed_tokens.weight", "embedding.weight")
    yield rename("model.norm.weight", "norm.weight")
    if not spec.head.tied:
        yield rename("lm_head.weight", "head.weight")


def layer(spec: Spec, index: int) -> Iterator[TensorMapping]:
    """One block."""
    yield from norms(index)
    yield from attention(spec, index)
    yield from gated_mlp(spec, index)


def norms(index: int) -> Iterator[TensorMapping]:
    """The two norms before the branches."""
    theirs, ours = f"model.layers.{index}", f"blocks.{index}"
    yield rename(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")
    yield rename(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight")


def attention(spec: Spec, index: int) -> Iterator[TensorMapping]:
    """q, k, v and o, with the biases, per-head norms and sinks that the Spec has."""
    mixer = spec.blocks[index].mixer
    theirs, ours = f"model.layers.{index}.self_attn", f"blocks.{index}.mixer"
    if not isinstance(mixer, Attention):
        return
    for name, bias in (("q", mixer.bias), ("k", mixer.bias), ("v", mixer.bias), ("o", mixer.out_bias)):
        yield rename(f"{theirs}.{name}_proj.weight", f"{ours}.{name}.weight")
        if bias:
            yield rename(f"{theirs}.{name}_proj.bias", f"{ours}.{name}.bias")
    for name, norm in (("q_norm", mixer.q_norm), ("k_norm", mixer.k_norm)):
        if norm is not None:
            yield rename(f"{theirs}.{name}.weight", f"{ours}.{name}.weight")
    if mixer.sinks:
        yield rename(f"{theirs}.sinks", f"{ours}.sinks")


def gated_mlp(spec: Spec, index: int) -> Iterator[TensorMapping]:
    """gate, up and down."""
    part = spec.blocks[index].feed_forward
    if not isinstance(part, GatedMLP):
        return
    yield from linears(f"model.layers.{index}.mlp", f"blocks.{index}.feed_forward", part.bias)


def linears(theirs: str, ours: str, bias: bool = False) -> Iterator[TensorMapping]:
    """`gate_proj`, `up_proj` and `down_proj` under one prefix."""
    for name in ("gate", "up", "down"):
        yield rename(f"{theirs}.{name}_proj.weight", f"{ours}.{name}.weight")
        if bias:
            yield rename(f"{theirs}.{name}_proj.bias", f"{ours}.{name}.bias")


_TINY = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    examples=(
        _TINY,
        {**_TINY, "head_dim": 12, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
         "hidden_act": "gelu_pytorch_tanh"},
        {**_TINY, "max_position_embeddings": 128, "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
        {**_TINY, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}},
        {**_TINY, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ),
)  # fmt: skip
