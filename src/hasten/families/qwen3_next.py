"""Qwen3-Next: three layers of gated delta rule to one of gated attention, experts beside a shared one that has a gate of its own.

Its norms multiply by 1 + weight, all but the one inside the gated delta rule."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader, check_layer_types
from hasten.families.deepseek_v3 import experts
from hasten.families.family import Config, Family
from hasten.families.llama import attention, ends, gated_mlp, linears, norms
from hasten.families.mistral import read_kv_heads
from hasten.families.qwen3_moe import sparse_layers
from hasten.families.rope import read_rotary
from hasten.formats.tensor_map import Each, First, Join, Permute, Reshape, Shape, Split, TensorMap, TensorMapping, Unstack, rename, split
from hasten.spec import Attention, Block, Embedding, GatedDeltaNet, GatedMLP, Head, Mixer, MixtureOfExperts, PreNorm, RMSNorm, Router, Spec

_KINDS = ("linear_attention", "full_attention")


def read(reader: ConfigReader) -> Spec:
    """Spec of a Qwen3NextConfig."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 32768)
    head_dim, layers = reader.size("head_dim", 256), reader.parts("num_hidden_layers")
    every = reader.size("full_attention_interval", 4)
    kinds = reader.names("layer_types")
    check_layer_types(reader, kinds, layers, _KINDS)
    kinds = kinds or tuple(_KINDS[(index + 1) % every == 0] for index in range(layers))
    eps, bias = reader.number("rms_norm_eps", 1e-6), reader.flag("attention_bias", False)
    norm = RMSNorm(eps=eps, offset=1.0)
    reader.neutral("use_sliding_window", "sliding_window", "max_window_layers")  # left over from Qwen 3; no layer of this family slides
    mixers: dict[str, Mixer] = {
        "linear_attention": GatedDeltaNet(
            key_heads=reader.size("linear_num_key_heads", 16), value_heads=reader.size("linear_num_value_heads", 32),
            key_dim=reader.size("linear_key_head_dim", 128), value_dim=reader.size("linear_value_head_dim", 128),
            conv=reader.size("linear_conv_kernel_dim", 4), norm=RMSNorm(eps=eps),
        ),
        "full_attention": Attention(
            heads=heads, kv_heads=read_kv_heads(reader, heads, 2), head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
            position=read_rotary(reader, head_dim=head_dim, context=context, partial=0.25), bias=bias, out_bias=bias, q_norm=norm,
            k_norm=norm, gate=True,
        ),
    }  # fmt: skip
    reader.must_be("hidden_act", "silu", "swish")  # it also follows the convolutions, where a GatedDeltaNet always has silu
    dense = GatedMLP(hidden=reader.size("intermediate_size", 5632), activation="silu")
    count, chosen, sparse = reader.parts("num_experts", 512, least=0), reader.size("num_experts_per_tok", 10), sparse_layers(reader, layers)
    expert = GatedMLP(hidden=reader.size("moe_intermediate_size", 512), activation="silu")
    shared = GatedMLP(hidden=reader.size("shared_expert_intermediate_size", 512), activation="silu")
    router = Router(score="softmax", normalize=reader.flag("norm_topk_prob", True))
    part = MixtureOfExperts(experts=count, top_k=chosen, expert=expert, router=router, shared=shared, shared_gate=True) if count else dense
    wiring = PreNorm(mixer=norm, feed_forward=norm)
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=tuple(
            Block(mixer=mixers[kind], feed_forward=part if has_experts else dense, wiring=wiring)
            for kind, has_experts in zip(kinds, sparse, strict=True)
        ),
        norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of Qwen3NextForCausalLM."""
    return (*ends(spec), *(mapping for index in range(len(spec.blocks)) for mapping in _layer(spec, index)))


def _layer(spec: Spec, index: int) -> Iterator[TensorMapping]:
    block, theirs, ours = spec.blocks[index], f"model.layers.{index}", f"blocks.{index}"
    yield from norms(index)
    if isinstance(block.mixer, GatedDeltaNet):
        yield from _gated_delta_net(block.mixer, spec.width, f"{theirs}.linear_attn", f"{ours}.mixer")
    if isinstance(block.mixer, Attention):
        for mapping in attention(spec, index):
            yield _with_gate(mapping, block.mixer, spec.width)
    yield from gated_mlp(spec, index)
    if isinstance(part := block.feed_forward, MixtureOfExperts):
        yield from experts(part, f"{theirs}.mlp", f"{ours}.feed_forward")
        yield from linears(f"{theirs}.mlp.shared_expert", f"{ours}.feed_forward.shared")
        yield rename(f"{theirs}.mlp.shared_expert_gate.weight", f"{ours}.feed_forward.shared_gate.weight")


def _with_gate(mapping: TensorMapping, mixer: Attention, width: int) -> TensorMapping:
    """`q_proj` holds, head by head, the rows of the query and then those of the gate; every other tensor is as usual."""
    (source,), (target,) = mapping.sources, mapping.targets
    if ".q_proj." not in source:
        return mapping
    heads, dim = mixer.heads, mixer.head_dim
    tail: Shape = (width,) if source.endswith(".weight") else ()
    return split(
        source, (target, target.replace(".q.", ".gate.")), Reshape((heads * 2 * dim, *tail), (heads, 2, dim, *tail)),
        Permute((1, 0, *range(2, 3 + len(tail)))), Reshape((2, heads, dim, *tail), (2, heads * dim, *tail)), Unstack(2),
    )  # fmt: skip


def _gated_delta_net(mixer: GatedDeltaNet, width: int, theirs: str, ours: str) -> Iterator[TensorMapping]:
    """Projections hold the rows of one key head together: its query, its key, then the values (and gates) of its value heads."""
    groups, ratio = mixer.key_heads, mixer.value_heads // mixer.key_heads
    keys, values = mixer.key_dim, ratio * mixer.value_dim
    sizes = (keys, keys, values, values)
    whole = (groups * keys, groups * keys, groups * values)
    channels = sum(whole)
    yield split(
        f"{theirs}.in_proj_qkvz.weight", (f"{ours}.qkv.weight", f"{ours}.z.weight"),
        Reshape((groups * sum(sizes), width), (groups, sum(sizes), width)), Split(sizes, axis=1),
        Each(tuple(Reshape((groups, size, width), (groups * size, width)) for size in sizes)), First(3, 1, Join(whole)),
    )  # fmt: skip
    yield split(
        f"{theirs}.in_proj_ba.weight", (f"{ours}.b.weight", f"{ours}.a.weight"),
        Reshape((groups * 2 * ratio, width), (groups, 2 * ratio, width)), Split((ratio, ratio), axis=1),
        Each((Reshape((groups, ratio, width), (groups * ratio, width)),) * 2),
    )  # fmt: skip
    yield rename(f"{theirs}.conv1d.weight", f"{ours}.conv.weight", Reshape((channels, 1, mixer.conv), (channels, mixer.conv)))
    for name, its in (("A_log", "a_log"), ("dt_bias", "dt_bias"), ("norm.weight", "norm.weight"), ("out_proj.weight", "o.weight")):
        yield rename(f"{theirs}.{name}", f"{ours}.{its}")


_TINY = {
    "model_type": "qwen3_next", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10, "num_experts": 6,
    "num_experts_per_tok": 2, "max_position_embeddings": 128,
}  # fmt: skip

FAMILY = Family(
    name="qwen3_next",
    model_types=("qwen3_next",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    ignored=(r"mtp\..*",),  # the next-token-prediction layer of the published checkpoint
    examples=(
        {**_TINY, "full_attention_interval": 2},
        {**_TINY, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False,
         "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"], "linear_num_key_heads": 3,
         "linear_num_value_heads": 3, "linear_conv_kernel_dim": 3, "attention_bias": True, "num_key_value_heads": 1,
         "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        {**_TINY, "num_hidden_layers": 1, "linear_num_key_heads": 1, "num_experts_per_tok": 3, "rms_norm_eps": 1e-5},
    ),
)  # fmt: skip
