"""Mixtral: Llama's attention, and in every layer experts of which each token's best are weighted by a softmax over the chosen."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.families.llama import ACTIVATIONS, attention, ends, norms
from hasten.families.mistral import read_kv_heads, window
from hasten.families.rope import read_rotary
from hasten.formats.tensor_map import TensorMap, TensorMapping, rename, stack
from hasten.spec import Attention, Block, Embedding, GatedMLP, Head, MixtureOfExperts, PreNorm, RMSNorm, Router, Spec


def read(reader: ConfigReader) -> Spec:
    """Spec of a MixtralConfig."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 131072)
    head_dim = reader.size("head_dim", max(1, width // heads))
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-5))
    block = Block(
        mixer=Attention(
            heads=heads, kv_heads=read_kv_heads(reader, heads, 8), head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
            position=read_rotary(reader, head_dim=head_dim, context=context, theta=1e6),
            visible=window(reader.optional_size("sliding_window")),
        ),
        feed_forward=MixtureOfExperts(
            experts=expert_count(reader, 8), top_k=reader.size("num_experts_per_tok", 2),
            expert=GatedMLP(hidden=reader.size("intermediate_size"), activation=reader.choice("hidden_act", ACTIVATIONS, "silu")),
            router=Router(score="softmax", normalize=True),
        ),
        wiring=PreNorm(mixer=norm, feed_forward=norm),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=(block,) * reader.parts("num_hidden_layers"), norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def expert_count(reader: ConfigReader, default: int) -> int:
    """`num_local_experts`, also written `num_experts`: two names of one number, which must agree where both are there."""
    count = reader.parts("num_local_experts", reader.parts("num_experts", default, least=0), least=0)
    reader.must_be("num_experts", count)
    return count


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of MixtralForCausalLM."""
    return (*ends(spec), *(mapping for index in range(len(spec.blocks)) for mapping in _layer(spec, index)))


def _layer(spec: Spec, index: int) -> Iterator[TensorMapping]:
    theirs, ours = f"model.layers.{index}.block_sparse_moe", f"blocks.{index}.feed_forward"
    yield from norms(index)
    yield from attention(spec, index)
    yield rename(f"{theirs}.gate.weight", f"{ours}.router.weight")
    if isinstance(part := spec.blocks[index].feed_forward, MixtureOfExperts):
        for name, number in (("gate", 1), ("up", 3), ("down", 2)):
            sources = (f"{theirs}.experts.{expert}.w{number}.weight" for expert in range(part.experts))
            yield stack(sources, f"{ours}.experts.{name}.weight")


_TINY = {
    "model_type": "mixtral", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 128,
}  # fmt: skip

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    examples=(
        _TINY,
        {**_TINY, "sliding_window": 7, "head_dim": 12, "num_key_value_heads": 1, "num_local_experts": 5, "num_experts_per_tok": 3,
         "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "router_jitter_noise": 0.1},
        {**_TINY, "num_experts_per_tok": 1, "num_hidden_layers": 1,
         "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ),
)  # fmt: skip
