"""gpt-oss: attention sinks, sliding and full layers in turn, YaRN, biases everywhere, and experts with a clamped gate."""

from collections.abc import Iterator

import msgspec

from hasten.base.errors import UnsupportedError
from hasten.families.config import ConfigReader, check_layer_types
from hasten.families.family import Config, Family
from hasten.families.llama import attention, ends, norms
from hasten.families.mistral import read_kv_heads
from hasten.families.mixtral import expert_count
from hasten.families.rope import read_rotary, yarn_magnitude
from hasten.formats.tensor_map import Permute, Reshape, TensorMap, TensorMapping, Unstack, rename, split
from hasten.spec import (
    Attention,
    Block,
    Causal,
    ClampedSwiglu,
    Embedding,
    GatedMLP,
    Head,
    MixtureOfExperts,
    PreNorm,
    RMSNorm,
    Rotary,
    Router,
    SlidingWindow,
    Spec,
    Yarn,
)

_KINDS = ("sliding_attention", "full_attention")


def read(reader: ConfigReader) -> Spec:
    """Spec of a GptOssConfig."""
    _refuse_quantized(reader)
    width, heads, layers = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.parts("num_hidden_layers")
    head_dim, context = reader.size("head_dim", 64), reader.size("max_position_embeddings", 131072)
    kinds = reader.names("layer_types")
    check_layer_types(reader, kinds, layers, _KINDS)
    kinds = kinds or tuple(_KINDS[index % 2] for index in range(layers))
    window = SlidingWindow(size=reader.size("sliding_window", 128))
    norm, kv_heads = RMSNorm(eps=reader.number("rms_norm_eps", 1e-5)), read_kv_heads(reader, heads, 8)
    rotary, bias = _rotary(reader, head_dim, context), reader.flag("attention_bias", True)
    reader.neutral("hidden_act")  # the experts' gate is always the clamped one
    reader.neutral("experts_per_token", "initial_context_length")  # repeated in keys that transformers reads
    gate = ClampedSwiglu(alpha=reader.positive("swiglu_alpha", 1.702), limit=reader.positive("swiglu_limit", 7.0))
    experts = MixtureOfExperts(
        experts=expert_count(reader, 128), top_k=reader.size("num_experts_per_tok", 4),
        expert=GatedMLP(hidden=reader.size("intermediate_size"), activation=gate, bias=True),
        router=Router(score="softmax", normalize=True, bias=True),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"),
        width=width,
        context=context,
        embedding=Embedding(),
        blocks=tuple(
            Block(
                mixer=Attention(
                    heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5, position=rotary,
                    visible=window if kind == "sliding_attention" else Causal(), bias=bias, out_bias=bias, sinks=True,
                ),
                feed_forward=experts,
                wiring=PreNorm(mixer=norm, feed_forward=norm),
            )
            for kind in kinds
        ),
        norm=norm,
        head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def _refuse_quantized(reader: ConfigReader) -> None:
    """The published checkpoints hold their experts in mxfp4, in tensors of other names."""
    if reader.has("quantization_config"):
        raise UnsupportedError(
            "config.json: 'quantization_config' is set, and the mxfp4 experts of a published gpt_oss are not supported; use a copy of the "
            "checkpoint with its experts dequantized to bfloat16"
        )


def _rotary(reader: ConfigReader, head_dim: int, context: int) -> Rotary:
    """The family's own YaRN where the config says nothing."""
    rotary = read_rotary(reader, head_dim=head_dim, context=context, theta=150000.0)
    if reader.has("rope_parameters") or reader.has("rope_scaling"):
        return rotary
    yarn = Yarn(factor=32.0, original_context=4096, truncate=False, attention_factor=yarn_magnitude(32.0))
    return msgspec.structs.replace(rotary, scaling=yarn)


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of GptOssForCausalLM."""
    return (*ends(spec), *(mapping for index in range(len(spec.blocks)) for mapping in _layer(spec, index)))


def _layer(spec: Spec, index: int) -> Iterator[TensorMapping]:
    yield from norms(index)
    yield from attention(spec, index)
    if isinstance(part := spec.blocks[index].feed_forward, MixtureOfExperts):
        yield from _experts(part, spec.width, f"model.layers.{index}.mlp", f"blocks.{index}.feed_forward")


def _experts(part: MixtureOfExperts, width: int, theirs: str, ours: str) -> Iterator[TensorMapping]:
    """Products are stored input first; gate and up take turns, gate at the even columns."""
    count, hidden = part.experts, part.expert.hidden
    for name in ("weight", "bias"):
        yield rename(f"{theirs}.router.{name}", f"{ours}.router.{name}")
    yield split(
        f"{theirs}.experts.gate_up_proj", (f"{ours}.experts.gate.weight", f"{ours}.experts.up.weight"),
        Reshape((count, width, 2 * hidden), (count, width, hidden, 2)), Permute((3, 0, 2, 1)), Unstack(2),
    )  # fmt: skip
    yield split(
        f"{theirs}.experts.gate_up_proj_bias", (f"{ours}.experts.gate.bias", f"{ours}.experts.up.bias"),
        Reshape((count, 2 * hidden), (count, hidden, 2)), Permute((2, 0, 1)), Unstack(2),
    )  # fmt: skip
    yield rename(f"{theirs}.experts.down_proj", f"{ours}.experts.down.weight", Permute((0, 2, 1)))
    yield rename(f"{theirs}.experts.down_proj_bias", f"{ours}.experts.down.bias")


_TINY = {
    "model_type": "gpt_oss", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 7,
}  # fmt: skip

FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    examples=(
        _TINY,
        {**_TINY, "num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 3,
         "num_key_value_heads": 4, "swiglu_alpha": 1.3, "swiglu_limit": 0.4, "num_experts_per_tok": 3, "tie_word_embeddings": True,
         "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
                             "beta_fast": 2.0, "beta_slow": 0.2, "truncate": False}},
        {**_TINY, "attention_bias": False, "num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
)  # fmt: skip
