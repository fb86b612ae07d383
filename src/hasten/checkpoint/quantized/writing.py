"""Writing weights that are stored quantized: as compressed-tensors where that format can say it, as hasten's own reading of it where not.

hasten's own has the same tensors under canonical names, and besides: 3 bits, groups that end before they are full, stacked weights, sparse
ones (see sparse), and codebooks (see codebook)."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hasten.base.errors import UnsupportedError
from hasten.checkpoint.quantized.codebook import LAYOUT as CODEBOOK_LAYOUT
from hasten.checkpoint.quantized.codebook import codebook_parts
from hasten.checkpoint.quantized.sparse import LAYOUT, sparse_parts
from hasten.formats import bits as bit_packing
from hasten.formats.linear import NUMBERS, LinearFormat, QuantizedLinear
from hasten.formats.quantized import STATIC, QuantizedWeight, StaticWeight
from hasten.formats.weights import Array, Weight

SAID = ("int2", "int4", "int8", "fp8")
SUFFIX = ".weight"


def can_say(name: str, weight: Weight) -> bool:
    """Whether compressed-tensors has a way to store ``weight`` under ``name``."""
    if not isinstance(weight, QuantizedWeight):
        return True
    form, plain = weight.form, name.endswith(SUFFIX) and len(weight.shape) == 2
    return plain and form.number in SAID and not form.sparse and (not form.group or weight.shape[-1] % form.group == 0)


def packed_zero_points(weight: QuantizedWeight) -> bool:
    """Whether its zero points are written in words, beside numbers that are."""
    return weight.form.zero_points and _layout(weight.form, weight.activations) == "pack-quantized"


def stored_tensors(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """What is written for ``tensors``: plain ones as they are, the parts of each quantized one under the names of compressed-tensors."""
    found: dict[str, Weight] = {}
    for name, weight in tensors.items():
        found.update(_parts(name, weight) if isinstance(weight, QuantizedWeight) else {name: weight})
    return found


def stored_bytes(shape: tuple[int, ...], form: LinearFormat, activations: str = "bf16") -> int:
    """Bytes of a file that a weight of that shape takes in ``form``: its numbers, scales and zero points."""
    weight = QuantizedWeight.of(shape, form, _nothing, activations)
    return sum(part.nbytes for name, part in _parts("", weight).items() if not name.endswith("_shape"))


def _nothing() -> QuantizedLinear:
    raise ValueError("only the bytes of this weight are known")


def quantization_config(tensors: Mapping[str, Weight], tied_head: str | None, by_name: bool = False) -> dict[str, Any]:
    """What config.json says of them; {} where none is quantized. ``tied_head`` is the head's tensor, where a model has it without storing
    it; ``by_name`` lists every module, where classes mean nothing."""
    kinds: dict[tuple[LinearFormat, str], list[str]] = {}
    for name, weight in tensors.items():
        if isinstance(weight, QuantizedWeight):
            kinds.setdefault((weight.form, weight.activations), []).append(name.removesuffix(SUFFIX))
    if not kinds:
        return {}
    plain = [
        name.removesuffix(SUFFIX) for name, weight in tensors.items() if not isinstance(weight, QuantizedWeight) and len(weight.shape) == 2
    ]
    by_class = len(kinds) == 1 and not by_name
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if by_class else names,
            "format": _layout(form, activations),
            "weights": _weights(form),
            "input_activations": _ACTIVATIONS.get(activations),
            "output_activations": None,
        }
        for index, ((form, activations), names) in enumerate(kinds.items())
    }
    layouts = {group["format"] for group in groups.values()}
    tied = [tied_head.removesuffix(SUFFIX)] if tied_head is not None else []
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*plain, *tied] if by_class else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
_ACTIVATIONS = {
    "int8": {**_INT8, "strategy": "token", "dynamic": True}, STATIC: {**_INT8, "strategy": "tensor", "dynamic": False},
    "fp8": {**_INT8, "type": "float", "strategy": "token", "dynamic": True},
}  # fmt: skip


def _weights(form: LinearFormat) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "type": "int" if form.is_integer else "float",
        "symmetric": not form.zero_points,
        "strategy": "group" if form.group else "channel",
        "group_size": form.group or None,
        "dynamic": False,
    }


def _layout(form: LinearFormat, activations: str) -> str:
    if form.sparse:
        return LAYOUT
    if form.has_codebook:
        return CODEBOOK_LAYOUT
    if form.number == "fp8":
        return "float-quantized"
    return "int-quantized" if form.number == "int8" and activations in _ACTIVATIONS else "pack-quantized"


def _parts(name: str, weight: QuantizedWeight) -> dict[str, Weight]:
    stem, form, shape = name.removesuffix(SUFFIX), weight.form, weight.shape
    *rows, width = shape
    groups = -(-width // form.group) if form.group else 1
    packed = _layout(form, weight.activations) == "pack-quantized"
    found: dict[str, Weight] = {}
    if NUMBERS[form.number][1]:
        found[f"{stem}.weight_scale"] = Weight((*rows, groups), np.dtype(np.float32), lambda: _scales(weight.quantized()))
    if isinstance(weight, StaticWeight):
        found[f"{stem}.input_scale"] = Weight((1,), np.dtype(np.float32), lambda: np.array([weight.input_scale], np.float32))
    if form.sparse:
        return found | sparse_parts(stem, weight)
    if form.has_codebook:
        return found | codebook_parts(stem, weight)
    if packed:
        words = (*rows, bit_packing.packed_width(width, form.bits))
        found[f"{stem}.weight_packed"] = Weight(words, np.dtype("<i4"), lambda: bit_packing.pack_signed(weight.quantized().q, form.bits))
        found[f"{stem}.weight_shape"] = Weight((len(shape),), np.dtype("<i8"), lambda: np.array(shape, "<i8"))
    else:
        codes = np.dtype(ml_dtypes.float8_e4m3fn if form.number == "fp8" else np.int8)
        found[f"{stem}.weight"] = Weight(shape, codes, lambda: weight.quantized().q)
    if form.zero_points:
        if packed:
            words = (*rows[:-1], bit_packing.packed_width(rows[-1], form.bits), groups)
            found[f"{stem}.weight_zero_point"] = Weight(words, np.dtype("<i4"), lambda: _zero_words(weight.quantized(), form.bits))
        else:
            found[f"{stem}.weight_zero_point"] = Weight((*rows, groups), np.dtype(np.int8), lambda: _zeros(weight.quantized()))
    return found


def _zero_words(its: QuantizedLinear, bits: int) -> Array:
    """Zero points in words along the outputs."""
    return np.swapaxes(bit_packing.pack_signed(np.ascontiguousarray(np.swapaxes(_zeros(its), -1, -2)), bits), -1, -2)


def _zeros(its: QuantizedLinear) -> Array:
    if its.zeros is None:
        raise ValueError("a format with zero points, and a weight without")
    return its.zeros.astype(np.int8)


def _scales(its: QuantizedLinear) -> Array:
    """Raises UnsupportedError for scales that no reader of compressed-tensors expects, as GGUF's Q4_0 has them."""
    if its.scales is None:
        raise ValueError("a format with scales, and a weight without")
    if its.scales.size and not (float(its.scales.min()) > 0 and float(its.scales.max()) < np.inf):
        raise UnsupportedError("a weight has scales that are not positive numbers, which compressed-tensors cannot say; quantize it anew")
    return its.scales
