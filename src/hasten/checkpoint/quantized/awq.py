"""Reading AWQ's gemm layout: ``qweight`` [in, out / 8] in words along the outputs, ``qzeros`` [groups, out / 8] likewise, ``scales``
[groups, out]. w = (q − zero) · scale, of 4 bits each.

Source: https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.checkpoint.quantized.tensors import SCALES, Parts, checked_size, gathered
from hasten.families.config import ConfigReader
from hasten.formats import bits as bit_packing
from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Array, Weight

ENDS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of eight outputs, which one a word's nibble number i belongs to."""
BITS = 4


def read(config: Mapping[str, Any], tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """The checkpoint's tensors, those of each quantized weight as one that is stored so. Raises a UserError naming what is wrong."""
    reader = ConfigReader(config, "config.json: quantization_config")
    for key in ("bits", "w_bit"):
        reader.must_be(key, BITS)
    reader.must_be("version", "gemm", "GEMM")
    size = reader.signed("group_size" if reader.has("group_size") else "q_group_size", 128)
    if size == 0 or size < -1:
        raise reader.wrong("group_size", size, "a number of inputs of at least 1 is needed, or -1 for one scale a channel")
    modules, others = gathered(tensors, ENDS, ("qweight",))
    return {**others, **{f"{name}.weight": _weight(max(size, 0), parts) for name, parts in modules.items()}}


def _weight(group_size: int, parts: Parts) -> QuantizedWeight:
    words = parts.shape("qweight", "int32")
    if len(words) != 2:
        parts.wrong("qweight", f"has shape {list(words)}", "[in, out / 8]")
    width, out = checked_size(parts.name, "inputs", words[0]), checked_size(parts.name, "outputs", words[1] * 8)
    group = group_size if group_size < width else 0
    groups = -(-width // group) if group else 1
    parts.must_be("qzeros", (groups, out // 8), "int32")
    scales = parts.shape("scales", *SCALES)
    if scales != (groups, out):
        parts.wrong("scales", f"has shape {list(scales)}", f"{[groups, out]}, as qweight and group_size say")

    def quantized() -> QuantizedLinear:
        zeros = _signed(parts.load("qzeros")).astype(np.int32)
        return QuantizedLinear(_signed(parts.load("qweight")), np.ascontiguousarray(parts.scales("scales").T), zeros, group or width)

    return QuantizedWeight.of((out, width), LinearFormat("int4", group, True), quantized, "bf16", 8 * parts.nbytes / (out * width))


def _signed(words: Array) -> Array:
    """Words [rows, out / 8] → numbers less 8, int8 [out, rows]."""
    stored = bit_packing.unpack(words, BITS, 8 * words.shape[1]).reshape(len(words), -1, 8)
    numbers = np.empty((words.shape[1], 8, len(words)), np.uint8)
    for nibble, output in enumerate(ORDER):
        numbers[:, output] = stored[..., nibble].T
    return (numbers.reshape(-1, len(words)) - np.uint8(8)).view(np.int8)
