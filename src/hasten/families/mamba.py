"""Mamba: blocks of one selective state-space mixer, no feed-forward."""

from collections.abc import Iterator

from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.formats.tensor_map import Reshape, Split, TensorMap, TensorMapping, rename, split
from hasten.spec import Block, Embedding, Head, Mamba, PreNorm, RMSNorm, Spec

_CONTEXT = 1 << 20  # a recurrence has no longest sequence; this bounds what a request may ask for


def read(reader: ConfigReader) -> Spec:
    """Spec of a MambaConfig."""
    width = reader.size("hidden_size")
    reader.must_be("hidden_act", "silu", "swish")
    reader.must_be("rms_norm", True)
    # How weights start, in what precision or by which kernel; and the original code's names for sizes read below.
    reader.neutral(
        "fused_add_norm", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_init_scheme", "time_step_max",
        "time_step_min", "time_step_scale", "use_associative_scan", "use_mambapy",
        "d_inner", "d_model", "n_layer", "pad_vocab_size_multiple",
    )  # fmt: skip
    norm = RMSNorm(eps=reader.number("layer_norm_epsilon", 1e-5))
    block = Block(
        mixer=Mamba(
            inner=reader.size("intermediate_size", int(reader.positive("expand", 2.0) * width)), state=reader.size("state_size", 16),
            conv=reader.size("conv_kernel", 4), dt_rank=reader.size_or_auto("time_step_rank", -(-width // 16)),
            bias=reader.flag("use_bias", False), conv_bias=reader.flag("use_conv_bias", True),
        ),
        feed_forward=None,
        wiring=PreNorm(mixer=norm, feed_forward=None),
    )  # fmt: skip
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=_CONTEXT, embedding=Embedding(),
        blocks=(block,) * reader.parts("num_hidden_layers"), norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", True)),
    )  # fmt: skip


def tensors(spec: Spec, config: Config) -> TensorMap:
    """Tensor names of MambaForCausalLM."""
    return tuple(_tensors(spec))


def _tensors(spec: Spec) -> Iterator[TensorMapping]:
    yield rename("backbone.embeddings.weight", "embedding.weight")
    yield rename("backbone.norm_f.weight", "norm.weight")
    if not spec.head.tied:
        yield rename("lm_head.weight", "head.weight")
    for index, block in enumerate(spec.blocks):
        mixer = block.mixer
        if not isinstance(mixer, Mamba):
            continue
        theirs, ours = f"backbone.layers.{index}.mixer", f"blocks.{index}.mixer"
        yield rename(f"backbone.layers.{index}.norm.weight", f"blocks.{index}.mixer_norm.weight")
        for part in ("weight", "bias") if mixer.bias else ("weight",):
            yield split(f"{theirs}.in_proj.{part}", [f"{ours}.{name}.{part}" for name in "xz"], Split((mixer.inner,) * 2))
            yield rename(f"{theirs}.out_proj.{part}", f"{ours}.o.{part}")
        yield rename(f"{theirs}.conv1d.weight", f"{ours}.conv.weight", Reshape((mixer.inner, 1, mixer.conv), (mixer.inner, mixer.conv)))
        if mixer.conv_bias:
            yield rename(f"{theirs}.conv1d.bias", f"{ours}.conv.bias")
        for name, target in (
            ("x_proj.weight", "dt_bc.weight"), ("dt_proj.weight", "dt.weight"), ("dt_proj.bias", "dt_bias"), ("A_log", "a_log"), ("D", "d"),
        ):  # fmt: skip
            yield rename(f"{theirs}.{name}", f"{ours}.{target}")


_TINY = {"model_type": "mamba", "vocab_size": 97, "hidden_size": 36, "state_size": 12, "num_hidden_layers": 2}

FAMILY = Family(
    name="mamba",
    model_types=("mamba",),
    read=read,
    tensors=tensors,
    base_prefix="backbone.",
    examples=(
        _TINY,
        {**_TINY, "expand": 3, "conv_kernel": 3, "time_step_rank": 5, "use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-3,
         "residual_in_fp32": False, "tie_word_embeddings": False},
        {**_TINY, "intermediate_size": 40, "state_size": 1, "num_hidden_layers": 1},
    ),
)  # fmt: skip
