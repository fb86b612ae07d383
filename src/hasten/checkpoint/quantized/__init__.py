"""Reading checkpoints that are quantized: their tensors, each quantized weight as one that is stored so."""

from collections.abc import Callable, Mapping
from typing import Any

from hasten.base.errors import ConfigError, UnsupportedError, one_line
from hasten.checkpoint.quantized import awq, compressed_tensors, gptq
from hasten.checkpoint.quantized.tensors import IN_LIMIT
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight
from hasten.formats.weights import Weight

READERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Weight]], dict[str, Weight]]] = {
    "compressed-tensors": compressed_tensors.read,
    "gptq": gptq.read,
    "awq": awq.read,
}
"""By ``quant_method``: config and tensors → tensors with quantized weights, under the names that plain ones would have."""


def read_quantized(config: object, tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """The tensors as ``quantization_config`` says they are meant. Raises a UserError for what is no such checkpoint."""
    if not isinstance(config, dict):
        raise ConfigError(f"config.json: 'quantization_config' is {one_line(config)}; an object is needed")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise UnsupportedError(
            f"config.json: 'quantization_config' has quant_method {one_line(method)}, which cannot be read; readable are "
            f"{', '.join(READERS)}; otherwise take the model it was made from"
        )
    return READERS[method](config, tensors)


def is_empty_bias(name: str, weight: Weight, tensors: Mapping[str, Weight]) -> bool:
    """Whether it is a bias of zeros beside a quantized weight, which tools for GPTQ stored for layers that have none."""
    stem, _, end = name.rpartition(".")
    beside = tensors.get(f"{stem}.weight")
    return end == "bias" and isinstance(beside, QuantizedWeight | DequantizedWeight) and weight.size <= IN_LIMIT and not weight.load().any()
