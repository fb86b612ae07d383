"""DeepSeek-V3: latent attention, a few dense layers, then experts chosen by groups with a correction bias, beside a shared one."""

from collections.abc import Iterator

from hasten.base.errors import UnsupportedError
from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.families.llama import ACTIVATIONS, ends, linears, norms
from hasten.families.rope import read_rotary, rope_section, yarn_magnitude
from hasten.formats.tensor_map import Each, Permute, Reshape, Split, TensorMap, TensorMapping, rename, split, stack
from hasten.spec import Block, Embedding, GatedMLP, Head, LatentAttention, MixtureOfExperts, PreNorm, RMSNorm, Router, Spec, Yarn

_LATENT_NORM_EPS = 1e-6  # the latent norms do not read rms_norm_eps


def read(reader: ConfigReader) -> Spec:
    """Spec of a DeepseekV3Config."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 4096)
    nope, rope, value = reader.size("qk_nope_head_dim", 128), reader.size("qk_rope_head_dim", 64), reader.size("v_head_dim", 128)
    reader.must_be("moe_layer_freq", 1)
    reader.must_be("scoring_func", "sigmoid")
    reader.must_be("topk_method", "noaux_tc")
    reader.must_be("num_key_value_heads", heads)  # every head has its own up-projection
    reader.neutral("head_dim", "qk_head_dim", "num_nextn_predict_layers", "ep_size", "seq_aux", "aux_loss_alpha", "num_local_experts")
    rotary = read_rotary(reader, head_dim=rope, context=context, interleaved=reader.flag("rope_interleave", True))
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-6))
    mixer = LatentAttention(
        heads=heads, q_rank=reader.optional_size("q_lora_rank"), kv_rank=reader.size("kv_lora_rank", 512), nope_dim=nope, rope_dim=rope,
        value_dim=value, scale=(nope + rope) ** -0.5 * _score_correction(reader, rotary.scaling), rotary=rotary,
        norm=RMSNorm(eps=_LATENT_NORM_EPS), bias=reader.flag("attention_bias", False),
    )  # fmt: skip
    activation = reader.choice("hidden_act", ACTIVATIONS, "silu")
    dense = GatedMLP(hidden=reader.size("intermediate_size"), activation=activation)
    hidden = reader.size("moe_intermediate_size", 2048)
    shared = reader.count("n_shared_experts", 1)
    experts = MixtureOfExperts(
        experts=reader.parts("n_routed_experts", 256), top_k=reader.size("num_experts_per_tok", 8),
        expert=GatedMLP(hidden=hidden, activation=activation),
        router=Router(
            score="sigmoid", normalize=reader.flag("norm_topk_prob", True), scale=reader.positive("routed_scaling_factor", 2.5),
            correction=True, groups=reader.size("n_group", 8), top_groups=reader.size("topk_group", 4),
        ),
        shared=GatedMLP(hidden=hidden * shared, activation=activation) if shared else None,
    )  # fmt: skip
    layers, first_moe = reader.parts("num_hidden_layers"), reader.count("first_k_dense_replace", 3)
    wiring = PreNorm(mixer=norm, feed_forward=norm)
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=tuple(Block(mixer=mixer, feed_forward=dense if index < first_moe else experts, wiring=wiring) for index in range(layers)),
        norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def _score_correction(reader: ConfigReader, scaling: object) -> float:
    """With YaRN, scores are multiplied by the square of its magnitude for `mscale_all_dim`."""
    if not isinstance(scaling, Yarn):
        return 1.0
    section = rope_section(reader)
    if section is None:
        raise UnsupportedError("config.json: YaRN needs rope_parameters or rope_scaling")
    all_dims = section.number("mscale_all_dim", 0.0)
    return yarn_magnitude(scaling.factor, all_dims) ** 2 if all_dims else 1.0


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of DeepseekV3ForCausalLM."""
    return (*ends(spec), *(mapping for index in range(len(spec.blocks)) for mapping in _layer(spec, index)))


def _layer(spec: Spec, index: int) -> Iterator[TensorMapping]:
    block = spec.blocks[index]
    theirs, ours = f"model.layers.{index}", f"blocks.{index}"
    yield from norms(index)
    if isinstance(block.mixer, LatentAttention):
        yield from _latent_attention(block.mixer, f"{theirs}.self_attn", f"{ours}.mixer")
    if isinstance(part := block.feed_forward, MixtureOfExperts):
        yield from experts(part, f"{theirs}.mlp", f"{ours}.feed_forward")
        yield rename(f"{theirs}.mlp.gate.e_score_correction_bias", f"{ours}.feed_forward.router.correction")
        if part.shared is not None:
            yield from linears(f"{theirs}.mlp.shared_experts", f"{ours}.feed_forward.shared")
    else:
        yield from linears(f"{theirs}.mlp", f"{ours}.feed_forward")


def experts(part: MixtureOfExperts, theirs: str, ours: str) -> Iterator[TensorMapping]:
    """The router, and per-expert `gate_proj`, `up_proj`, `down_proj` stacked into one weight each."""
    yield rename(f"{theirs}.gate.weight", f"{ours}.router.weight")
    for name in ("gate", "up", "down"):
        sources = (f"{theirs}.experts.{expert}.{name}_proj.weight" for expert in range(part.experts))
        yield stack(sources, f"{ours}.experts.{name}.weight")


def _latent_attention(mixer: LatentAttention, theirs: str, ours: str) -> Iterator[TensorMapping]:
    parts = ("weight", "bias") if mixer.bias else ("weight",)
    for part in parts:
        yield rename(f"{theirs}.kv_a_proj_with_mqa.{part}", f"{ours}.kv_a.{part}")
        yield rename(f"{theirs}.o_proj.{part}", f"{ours}.o.{part}")
        if mixer.q_rank is not None:
            yield rename(f"{theirs}.q_a_proj.{part}", f"{ours}.q_a.{part}")
    if mixer.q_rank is not None:
        yield rename(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_a_norm.weight")
        yield rename(f"{theirs}.q_b_proj.weight", f"{ours}.q.weight")
    else:
        yield rename(f"{theirs}.q_proj.weight", f"{ours}.q.weight")
    yield rename(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight")
    # One tensor holds, head by head, the rows that make keys and those that make values; keys are used transposed.
    heads, rank, rows = mixer.heads, mixer.kv_rank, mixer.nope_dim + mixer.value_dim
    yield split(
        f"{theirs}.kv_b_proj.weight", (f"{ours}.k_up.weight", f"{ours}.v_up.weight"),
        Reshape((heads * rows, rank), (heads, rows, rank)), Split((mixer.nope_dim, mixer.value_dim), axis=1),
        Each((Permute((0, 2, 1)), None)),
    )  # fmt: skip


_TINY = {
    "model_type": "deepseek_v3", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20,
    "kv_lora_rank": 12, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 14, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip

FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    ignored=(r"model\.layers\.61\..*",),  # the next-token-prediction layer of the published checkpoint
    examples=(
        _TINY,
        {**_TINY, "q_lora_rank": None, "attention_bias": True, "rope_interleave": False, "n_shared_experts": 2, "norm_topk_prob": False,
         "routed_scaling_factor": 1.5, "tie_word_embeddings": True, "num_hidden_layers": 2},
        {**_TINY, "num_hidden_layers": 2, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "mscale": 0.7,
         "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}},
    ),
)  # fmt: skip
