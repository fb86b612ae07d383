"""Hugging Face's rotary settings, old (`rope_theta` + `rope_scaling`) and new (`rope_parameters`), as a Spec's Rotary."""

import math

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.families.config import ConfigReader
from hasten.spec import ROTARY_LIMIT, LinearScaling, Llama3Scaling, LongRope, Rotary, Scaling, Yarn

"""Most rotated features of a head, since their frequencies are spelled out."""


def read_rotary(
    reader: ConfigReader, *, head_dim: int, context: int, theta: float = 10000.0, partial: float | None = None,
    interleaved: bool = False, layer_type: str | None = None,
) -> Rotary:  # fmt: skip
    """The Rotary of a model whose heads have ``head_dim`` features. ``theta`` and ``partial`` are the family's defaults.

    ``partial`` None means that the family rotates whole heads, and a `partial_rotary_factor` is refused. With ``layer_type``, its own
    object inside `rope_parameters` is read where there is one."""
    base, share = reader.positive("rope_theta", theta), reader.positive("partial_rotary_factor", partial or 1.0)
    section = rope_section(reader)
    nested = None if section is None or layer_type is None else section.section(layer_type)
    section = nested or section
    original = reader.optional_size("original_max_position_embeddings")
    scaling: Scaling | None = None
    if section is not None:
        base, share = section.positive("rope_theta", base), section.positive("partial_rotary_factor", share)
        if original is not None:
            section.must_be("original_max_position_embeddings", original)
        scaling = _read_scaling(section, context, original or context)
        section.finish()
    if partial is None and share != 1.0:  # transformers ignores the factor or fails on it, others obey it: nobody knows which was meant
        raise UnsupportedError(f"config.json: 'partial_rotary_factor' is {share}, but this family rotates whole heads; remove the key")
    dims = int(head_dim * min(share, 2.0))  # above 1 is wrong whatever it is, and 1e308 is no int
    most = min(head_dim, ROTARY_LIMIT)
    if dims % 2 or not 0 < dims <= most:
        raise ConfigError(f"config.json: {dims} of {head_dim} features of a head would be rotated; an even number up to {most} is needed")
    if isinstance(scaling, LongRope) and len(scaling.short_factor) != dims // 2:
        raise ConfigError(f"config.json: longrope has {len(scaling.short_factor)} factors; {dims // 2} are needed, one a rotated pair")
    return Rotary(base=base, dims=dims, interleaved=interleaved, scaling=scaling)


def rope_section(reader: ConfigReader) -> ConfigReader | None:
    """The object with the rotary settings, under its new name or its old one; both at once are refused."""
    old, new = reader.section("rope_scaling"), reader.section("rope_parameters")
    if old is not None and new is not None:
        raise UnsupportedError("config.json has both 'rope_scaling' and 'rope_parameters'; remove the one that is not meant")
    return old or new


def _read_scaling(section: ConfigReader, context: int, original: int) -> Scaling | None:
    kinds = {kind: kind for kind in ("default", "linear", "llama3", "yarn", "longrope")} | {"su": "longrope"}
    kind = section.choice("rope_type" if section.has("rope_type") else "type", kinds, "default")
    section.neutral("rope_type", "type")
    original = section.size("original_max_position_embeddings", original)
    match kind:
        case "linear":
            return LinearScaling(factor=section.positive("factor"))
        case "llama3":
            return Llama3Scaling(
                factor=section.positive("factor"),
                low_frequency_factor=section.positive("low_freq_factor"),
                high_frequency_factor=section.positive("high_freq_factor"),
                original_context=original,
            )
        case "yarn":
            return _read_yarn(section, context, original)
        case "longrope":
            factor = section.positive("factor", context / original)
            # A context of 1 has no logarithm to divide by.
            magnitude = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return LongRope(
                short_factor=section.numbers("short_factor"),
                long_factor=section.numbers("long_factor"),
                original_context=original,
                attention_factor=section.positive("attention_factor", magnitude),
            )
    return None


def _read_yarn(section: ConfigReader, context: int, original: int) -> Yarn:
    factor = section.positive("factor", context / original)
    mscale, all_dims = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dims) if mscale and all_dims else yarn_magnitude(factor)
    return Yarn(
        factor=factor,
        original_context=original,
        beta_fast=section.positive("beta_fast", 32.0),
        beta_slow=section.positive("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
        attention_factor=section.positive("attention_factor", magnitude),
    )


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature correction for a context ``factor`` times longer (Peng et al. 2023, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
