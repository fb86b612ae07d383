"""Mamba-2: blocks of one state-space mixer, no feed-forward."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.formats.tensor_map import Reshape, Split, TensorMap, TensorMapping, rename, split
from hasten.spec import Block, Embedding, Head, Mamba2, PreNorm, RMSNorm, Spec

_CONTEXT = 1 << 20  # a recurrence has no longest sequence; this bounds what a request may ask for


def read(reader: ConfigReader) -> Spec:
    """Spec of a Mamba2Config."""
    width, heads, head_dim = reader.size("hidden_size"), reader.size("num_heads", 128), reader.size("head_dim", 64)
    if round(reader.positive("expand", 2.0) * width) != heads * head_dim:
        raise reader.wrong(
            "expand", reader.number("expand", 2.0), f"num_heads · head_dim = {heads * head_dim} must be expand · hidden_size"
        )
    reader.must_be("hidden_act", "silu", "swish")
    reader.neutral(
        "chunk_size", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_max", "time_step_min", "time_step_rank",
        "rms_norm", "norm_before_gate", "use_mambapy",
    )  # fmt: skip
    reader.must_be("norm_before_gate", False)
    reader.must_be("rms_norm", True)
    eps = reader.number("layer_norm_epsilon", 1e-5)
    low, high = _step_limits(reader)
    block = Block(
        mixer=Mamba2(
            heads=heads, head_dim=head_dim, state=reader.size("state_size", 128), groups=reader.size("n_groups", 8),
            conv=reader.size("conv_kernel", 4), norm=RMSNorm(eps=eps), bias=reader.flag("use_bias", False),
            conv_bias=reader.flag("use_conv_bias", True), dt_min=low, dt_max=high,
        ),
        feed_forward=None,
        wiring=PreNorm(mixer=RMSNorm(eps=eps), feed_forward=None),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=_CONTEXT, embedding=Embedding(),
        blocks=(block,) * reader.parts("num_hidden_layers"), norm=RMSNorm(eps=eps),
        head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )  # fmt: skip


def _step_limits(reader: ConfigReader) -> tuple[float, float | None]:
    """`time_step_limit` is [low, high]; infinity comes as a bare Infinity or as {"__float__": "Infinity"}."""
    limits = reader.pair("time_step_limit")
    return limits if limits is not None else (0.0, None)


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of Mamba2ForCausalLM."""
    return tuple(_tensors(spec))


def _tensors(spec: Spec) -> Iterator[TensorMapping]:
    yield rename("backbone.embeddings.weight", "embedding.weight")
    yield rename("backbone.norm_f.weight", "norm.weight")
    if not spec.head.tied:
        yield rename("lm_head.weight", "head.weight")
    for index, block in enumerate(spec.blocks):
        mixer = block.mixer
        if not isinstance(mixer, Mamba2):
            continue
        theirs, ours = f"backbone.layers.{index}", f"blocks.{index}"
        inner = mixer.heads * mixer.head_dim
        channels = inner + 2 * mixer.groups * mixer.state
        yield rename(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight")
        for part in ("weight", "bias") if mixer.bias else ("weight",):
            targets = [f"{ours}.mixer.{name}.{part}" for name in ("z", "xbc", "dt")]
            yield split(f"{theirs}.mixer.in_proj.{part}", targets, Split((inner, channels, mixer.heads)))
            yield rename(f"{theirs}.mixer.out_proj.{part}", f"{ours}.mixer.o.{part}")
        yield rename(
            f"{theirs}.mixer.conv1d.weight", f"{ours}.mixer.conv.weight", Reshape((channels, 1, mixer.conv), (channels, mixer.conv))
        )
        if mixer.conv_bias:
            yield rename(f"{theirs}.mixer.conv1d.bias", f"{ours}.mixer.conv.bias")
        for name, target in (("A_log", "a_log"), ("D", "d"), ("dt_bias", "dt_bias"), ("norm.weight", "norm.weight")):
            yield rename(f"{theirs}.mixer.{name}", f"{ours}.mixer.{target}")


_TINY = {
    "model_type": "mamba2", "vocab_size": 97, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 12, "n_groups": 2,
    "num_hidden_layers": 2, "chunk_size": 8, "conv_kernel": 4, "expand": 2,
}  # fmt: skip

FAMILY = Family(
    name="mamba2",
    model_types=("mamba2",),
    read=read,
    tensors=tensors,
    base_prefix="backbone.",
    examples=(
        _TINY,
        {**_TINY, "n_groups": 1, "num_heads": 4, "head_dim": 16, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False,
         "tie_word_embeddings": True},
    ),
)  # fmt: skip
