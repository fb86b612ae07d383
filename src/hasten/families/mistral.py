"""Mistral: Llama whose every layer may see only a sliding window. Its reader's pieces serve the families that differ in attention alone."""

from collections.abc import Iterable

from hasten.base.errors import UnsupportedError
from hasten.families.config import ConfigReader
from hasten.families.family import Family
from hasten.families.llama import ACTIVATIONS, tensors
from hasten.families.rope import read_rotary
from hasten.spec import Attention, Block, Causal, Embedding, GatedMLP, Head, PreNorm, RMSNorm, SlidingWindow, Spec, Visibility

_KINDS = {Causal: "full_attention", SlidingWindow: "sliding_attention"}


def read(reader: ConfigReader) -> Spec:
    """Spec of a MistralConfig."""
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 131072)
    head_dim = reader.size("head_dim", max(1, width // heads))
    visible = window(read_window(reader, 4096))
    # Some configs list their layers' kinds; transformers then runs every layer alike, and caches as the list says.
    if any(kind != _KINDS[type(visible)] for kind in reader.names("layer_types") or ()):
        raise UnsupportedError(
            f"config.json: 'layer_types' must be {_KINDS[type(visible)]} throughout, which is what 'sliding_window' says; "
            f"a Mistral of mixed layers has model_type 'ministral'"
        )
    mixer = Attention(
        heads=heads, kv_heads=read_kv_heads(reader, heads, 8), head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
        position=read_rotary(reader, head_dim=head_dim, context=context), visible=visible,
    )  # fmt: skip
    return decoder(reader, width, context, (mixer,) * reader.parts("num_hidden_layers"))


def decoder(reader: ConfigReader, width: int, context: int, mixers: Iterable[Attention], eps: float = 1e-6) -> Spec:
    """The Spec around ``mixers``, one a layer: pre-norm, gated feed-forward without biases. ``eps`` is the family's default."""
    norm = RMSNorm(eps=reader.number("rms_norm_eps", eps))
    feed_forward = GatedMLP(hidden=reader.size("intermediate_size"), activation=reader.choice("hidden_act", ACTIVATIONS, "silu"))
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=tuple(Block(mixer=mixer, feed_forward=feed_forward, wiring=PreNorm(mixer=norm, feed_forward=norm)) for mixer in mixers),
        norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def read_window(reader: ConfigReader, default: int) -> int | None:
    """`sliding_window`, ``default`` where absent; null lets a query see everything before it."""
    return default if reader.absent("sliding_window") else reader.optional_size("sliding_window")


def window(size: int | None) -> Visibility:
    """What a query sees through a window of ``size``, or without one."""
    return Causal() if size is None else SlidingWindow(size=size)


def read_kv_heads(reader: ConfigReader, heads: int, default: int) -> int:
    """`num_key_value_heads`, ``default`` where absent; null gives every head its own."""
    return default if reader.absent("num_key_value_heads") else reader.size("num_key_value_heads", heads)


_TINY = {
    "model_type": "mistral", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    read=read,
    tensors=tensors,
    base_prefix="model.",
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    examples=(
        {**_TINY, "sliding_window": 7},
        {**_TINY, "sliding_window": None, "head_dim": 12, "num_key_value_heads": 4, "rms_norm_eps": 1e-3, "tie_word_embeddings": True,
         "hidden_act": "gelu"},
        {**_TINY, "sliding_window": 2, "num_hidden_layers": 1, "num_key_value_heads": 1},
        {**_TINY, "sliding_window": 36, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "mscale": 1.0,
         "mscale_all_dim": 0.5, "original_max_position_embeddings": 16}},
    ),
)  # fmt: skip
