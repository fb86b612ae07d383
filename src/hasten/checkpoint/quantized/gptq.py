"""Reading GPTQ, versions 1 and 2.

``qweight`` [in · bits / 32, out] is in words along the inputs, ``qzeros`` [groups, out · bits / 32] in words along the outputs, ``scales``
are [groups, out], and ``g_idx`` [in], where there is one, says the group of each input. w = (q − zero) · scale; version 1 stores zero − 1.
Source: https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear/ and utils/model.py."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.base.errors import UnsupportedError, one_line
from hasten.checkpoint.quantized.order import in_order, order_of
from hasten.checkpoint.quantized.patterns import MOST_PATTERNS, pattern
from hasten.checkpoint.quantized.tensors import SCALES, Parts, checked_size, gathered
from hasten.families.config import ConfigReader
from hasten.formats import bits as bit_packing
from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight
from hasten.formats.weights import Array, Weight

ENDS = ("qweight", "qzeros", "scales", "g_idx")
WHERE = "config.json: quantization_config"


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How weights are stored. ``group`` is 0 for one scale a channel; ``less_one`` where the zero points stored are one too small."""

    bits: int
    group: int
    symmetric: bool
    less_one: bool


def read(config: Mapping[str, Any], tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """The checkpoint's tensors, those of each quantized weight as one that is stored so. Raises a UserError naming what is wrong."""
    settings = _settings(config)
    modules, others = gathered(tensors, ENDS, ("qweight",))
    overrides = _overrides(config.get("dynamic"))
    return {**others, **{f"{name}.weight": _weight(_settings_of(name, settings, overrides), parts) for name, parts in modules.items()}}


# --- the config: most of it says how the weights were found, and nothing of how they are stored


def _settings(config: Mapping[str, Any], base: Settings | None = None) -> Settings:
    reader = ConfigReader(config, WHERE)
    reader.must_be("bits", *bit_packing.BITS)
    reader.must_be("pack_dtype", "int32")
    reader.must_be("is_marlin_format", False)
    reader.must_be("rotation")
    for key in ("checkpoint_format", "format"):
        reader.must_be(key, "gptq", "gptq_v2")
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    bits, size = reader.size("bits", base.bits if base else None), reader.signed("group_size", (base.group or -1) if base else None)
    if size == 0 or size < -1:
        raise reader.wrong("group_size", size, "a number of inputs of at least 1 is needed, or -1 for one scale a channel")
    symmetric = reader.flag("sym", base.symmetric if base else True)
    return Settings(bits, max(size, 0), symmetric, base.less_one if base else version == "gptq")


def _overrides(dynamic: object) -> list[tuple[Any, Mapping[str, Any]]]:
    """Patterns of modules with settings of their own. What is skipped ('-:') is stored plainly, and needs no word."""
    if not dynamic:
        return []
    if not isinstance(dynamic, dict) or not all(isinstance(each, dict) for each in dynamic.values()):
        raise UnsupportedError(f"{WHERE}: 'dynamic' is {one_line(dynamic)}; an object of patterns with settings is needed")
    if len(dynamic) > MOST_PATTERNS:
        raise UnsupportedError(f"{WHERE}: {len(dynamic)} patterns in 'dynamic' are too many; at most {MOST_PATTERNS} are matched")
    return [(pattern(text.removeprefix("+:"), WHERE), its) for text, its in dynamic.items() if not text.startswith("-:")]


def _settings_of(name: str, settings: Settings, overrides: list[tuple[Any, Mapping[str, Any]]]) -> Settings:
    for compiled, its in overrides:
        if compiled.match(name):
            return _settings({**its, "quant_method": "gptq"}, settings)
    return settings


# --- the tensors


def _weight(settings: Settings, parts: Parts) -> Weight:
    bits, words = settings.bits, parts.shape("qweight", "int32")
    if len(words) != 2 or words[0] * 32 % bits:
        parts.wrong("qweight", f"has shape {list(words)}", f"[in · {bits} / 32, out]")
    width, out = checked_size(parts.name, "inputs", words[0] * 32 // bits), checked_size(parts.name, "outputs", words[1])
    group = settings.group if settings.group < width else 0
    groups = -(-width // group) if group else 1
    scales = parts.shape("scales", *SCALES)
    if scales != (groups, out):
        parts.wrong("scales", f"has shape {list(scales)}", f"{[groups, out]}, as qweight and group_size say")
    parts.must_be("qzeros", (groups, bit_packing.packed_width(out, bits)), "int32")
    symmetric = settings.symmetric and _is_centred(parts, bits, out)
    form = LinearFormat(f"int{bits}", group, not symmetric)
    held = 8 * parts.nbytes / (out * width)  # bits, all tensors counted

    def quantized() -> QuantizedLinear:
        q = (bit_packing.unpack(parts.load("qweight").T, bits, width) - np.uint8(1 << (bits - 1))).view(np.int8)
        return QuantizedLinear(q, np.ascontiguousarray(parts.scales("scales").T), None if symmetric else zeros(), group or width)

    def zeros() -> Array:
        stored = bit_packing.unpack(parts.load("qzeros"), bits, out).T + np.uint8(settings.less_one)
        return np.ascontiguousarray(stored & np.uint8((1 << bits) - 1)).astype(np.int32) - (1 << (bits - 1))

    if "g_idx" in parts and (order := order_of(parts, "g_idx", width, group)) is not None:
        return DequantizedWeight.of(
            (out, width), lambda: in_order(quantized(), order), str(form), "its groups are in activation order", held
        )
    return QuantizedWeight.of((out, width), form, quantized, "bf16", held)


def _is_centred(parts: Parts, bits: int, out: int) -> bool:
    """Whether every zero point is the middle of the numbers, as either version stores it: which of them a file is in, some say wrongly."""
    stored = bit_packing.unpack(parts.load("qzeros"), bits, out)
    middle = 1 << (bits - 1)
    return bool(stored.size) and stored.flat[0] in {middle - 1, middle} and bool((stored == stored.flat[0]).all())
