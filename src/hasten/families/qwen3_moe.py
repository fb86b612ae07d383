"""Qwen 3 mixture of experts: per-head q/k norms, and experts in every layer but those the config keeps dense."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader
from hasten.families.deepseek_v3 import experts
from hasten.families.family import Config, Family
from hasten.families.llama import ACTIVATIONS, attention, ends, gated_mlp, norms
from hasten.families.mistral import read_kv_heads, read_window, window
from hasten.families.mixtral import expert_count
from hasten.families.rope import read_rotary
from hasten.formats.tensor_map import TensorMap, TensorMapping
from hasten.spec import Attention, Block, Causal, Embedding, GatedMLP, Head, MixtureOfExperts, PreNorm, RMSNorm, Router, Spec


def read(reader: ConfigReader) -> Spec:
    """Spec of a Qwen3MoeConfig."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 32768)
    head_dim, layers = reader.size("head_dim", max(1, width // heads)), reader.parts("num_hidden_layers")
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6))
    bias = reader.flag("attention_bias", False)
    visible = window(read_window(reader, 4096))
    if not reader.flag("use_sliding_window", False):
        visible = Causal()
    reader.neutral("max_window_layers")  # other Qwen families keep these layers full; transformers lets every layer of this one slide
    mixer = Attention(
        heads=heads, kv_heads=read_kv_heads(reader, heads, 4), head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
        position=read_rotary(reader, head_dim=head_dim, context=context), visible=visible, bias=bias,
        out_bias=bias, q_norm=norm, k_norm=norm,
    )  # fmt: skip
    activation = reader.choice("hidden_act", ACTIVATIONS, "silu")
    dense = GatedMLP(hidden=reader.size("intermediate_size", 6144), activation=activation)
    expert = GatedMLP(hidden=reader.size("moe_intermediate_size", 768), activation=activation)
    router = Router(score="softmax", normalize=reader.flag("norm_topk_prob", False))
    count, chosen, sparse = expert_count(reader, 128), reader.size("num_experts_per_tok", 8), sparse_layers(reader, layers)
    part = MixtureOfExperts(experts=count, top_k=chosen, expert=expert, router=router) if count else dense
    wiring = PreNorm(mixer=norm, feed_forward=norm)
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=tuple(Block(mixer=mixer, feed_forward=part if has_experts else dense, wiring=wiring) for has_experts in sparse),
        norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def sparse_layers(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: the last of every `decoder_sparse_step`, save those in `mlp_only_layers`."""
    every, dense = reader.size("decoder_sparse_step", 1), reader.whole_numbers("mlp_only_layers")
    return tuple((index + 1) % every == 0 and index not in dense for index in range(layers))


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of Qwen3MoeForCausalLM."""
    return (*ends(spec), *(mapping for index in range(len(spec.blocks)) for mapping in _layer(spec, index)))


def _layer(spec: Spec, index: int) -> Iterator[TensorMapping]:
    yield from norms(index)
    yield from attention(spec, index)
    yield from gated_mlp(spec, index)
    if isinstance(part := spec.blocks[index].feed_forward, MixtureOfExperts):
        yield from experts(part, f"model.layers.{index}.mlp", f"blocks.{index}.feed_forward")


_TINY = {
    "model_type": "qwen3_moe", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_experts": 6, "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}  # fmt: skip

FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    examples=(
        _TINY,
        {**_TINY, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": True,
         "num_experts_per_tok": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "attention_bias": True,
         "num_key_value_heads": 1, "tie_word_embeddings": True},
        {**_TINY, "num_hidden_layers": 1, "num_experts": 4, "norm_topk_prob": True, "num_experts_per_tok": 4, "sliding_window": 5,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
)  # fmt: skip
