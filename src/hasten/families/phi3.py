"""Phi 3, 3.5 and 4: Llama with q, k and v in one tensor, gate and up in another, partly rotated heads, LongRoPE and sliding windows."""

import math
from collections.abc import Iterator

from hasten.base.errors import ConfigError
from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.families.llama import ends, norms
from hasten.families.mistral import decoder, window
from hasten.families.rope import rope_section
from hasten.formats.tensor_map import Split, TensorMap, TensorMapping, rename, split
from hasten.spec import Attention, GatedMLP, LongRope, Rotary, Spec


def read(reader: ConfigReader) -> Spec:
    """Spec of a Phi3Config."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 4096)
    head_dim = reader.size("head_dim", max(1, width // heads))
    reader.neutral("full_attn_mod", "interpolate_factor")  # Phi 4 mini carries them; transformers reads neither
    mixer = Attention(
        heads=heads, kv_heads=reader.size("num_key_value_heads", heads), head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
        position=_rotary(reader, head_dim, context), visible=window(reader.optional_size("sliding_window")),
    )  # fmt: skip
    return decoder(reader, width, context, (mixer,) * reader.parts("num_hidden_layers"), eps=1e-5)


def _rotary(reader: ConfigReader, head_dim: int, context: int) -> Rotary:
    """Plain or LongRoPE, the latter under three names. The original context is a key of its own here, whatever the rope object says."""
    base, partial = reader.positive("rope_theta", 10000.0), reader.positive("partial_rotary_factor", 1.0)
    original = reader.size("original_max_position_embeddings", 4096)
    section = rope_section(reader)
    if section is None:
        return Rotary(base=base, dims=_rotated(reader, head_dim, partial))
    base, partial = section.positive("rope_theta", base), section.positive("partial_rotary_factor", partial)
    section.must_be("original_max_position_embeddings", original)
    long = section.choice(
        "rope_type" if section.has("rope_type") else "type", {"default": False, "longrope": True, "su": True, "yarn": True}, "default"
    )
    section.neutral("rope_type", "type")
    dims = _rotated(reader, head_dim, partial)
    scaling = _long_rope(section, dims // 2, context, original) if long else None
    section.finish()
    return Rotary(base=base, dims=dims, scaling=scaling)


def _rotated(reader: ConfigReader, head_dim: int, partial: float) -> int:
    """How many features of a head turn."""
    dims = int(head_dim * partial)
    if dims % 2 or not 0 < dims <= head_dim:
        raise reader.wrong("partial_rotary_factor", partial, f"{dims} of {head_dim} would turn; an even number up to all is needed")
    return dims


def _long_rope(section: ConfigReader, pairs: int, context: int, original: int) -> LongRope:
    factor = section.positive("factor", context / original)
    # A context of 1 has no logarithm to divide by.
    magnitude = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = section.numbers("short_factor"), section.numbers("long_factor")
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != pairs:
            raise ConfigError(f"config.json: {name!r} has {len(factors)} entries; {pairs} are needed, one a rotated pair")
    return LongRope(
        short_factor=short, long_factor=long, original_context=original, attention_factor=section.positive("attention_factor", magnitude)
    )


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of Phi3ForCausalLM."""
    return (*ends(spec), *(mapping for index in range(len(spec.blocks)) for mapping in _layer(spec, index)))


def _layer(spec: Spec, index: int) -> Iterator[TensorMapping]:
    yield from norms(index)
    theirs, ours = f"model.layers.{index}", f"blocks.{index}"
    mixer, part = spec.blocks[index].mixer, spec.blocks[index].feed_forward
    if isinstance(mixer, Attention):
        rows = tuple(heads * mixer.head_dim for heads in (mixer.heads, mixer.kv_heads, mixer.kv_heads))
        yield split(f"{theirs}.self_attn.qkv_proj.weight", [f"{ours}.mixer.{name}.weight" for name in "qkv"], Split(rows))
        yield rename(f"{theirs}.self_attn.o_proj.weight", f"{ours}.mixer.o.weight")
    if isinstance(part, GatedMLP):
        halves = Split((part.hidden, part.hidden))
        yield split(f"{theirs}.mlp.gate_up_proj.weight", [f"{ours}.feed_forward.{name}.weight" for name in ("gate", "up")], halves)
        yield rename(f"{theirs}.mlp.down_proj.weight", f"{ours}.feed_forward.down.weight")


_TINY = {
    "model_type": "phi3", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip

_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.2, 2.0, 4.5, 9.0],
}  # fmt: skip

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    examples=(
        {**_TINY, "sliding_window": 7},
        {**_TINY, "original_max_position_embeddings": 16, "rope_parameters": {**_LONG, "partial_rotary_factor": 1.0}},
        {**_TINY, "original_max_position_embeddings": 64, "num_key_value_heads": None, "sliding_window": 20,
         "rope_parameters": {**_LONG, "rope_type": "su", "original_max_position_embeddings": 64}},
        {**_TINY, "original_max_position_embeddings": 16, "hidden_size": 48, "partial_rotary_factor": 0.7, "num_key_value_heads": 1,
         "tie_word_embeddings": True, "hidden_act": "relu", "rms_norm_eps": 1e-3,
         "rope_parameters": {**_LONG, "attention_factor": 1.25, "rope_theta": 500.0}},
        {**_TINY, "hidden_size": 64, "num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5,
         "rope_theta": 300.0}},
    ),
)  # fmt: skip
