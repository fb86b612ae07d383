"""Reading compressed-tensors: pack-quantized, int-, float- and naive-quantized weights; and hasten's own beside them, sparse or with a
codebook.

Source: https://github.com/vllm-project/compressed-tensors, quantization/quant_args.py, quant_scheme.py and compressors/."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.base.errors import CheckpointError, UnsupportedError, one_line
from hasten.checkpoint.quantized.codebook import ENDS as CODEBOOK_ENDS
from hasten.checkpoint.quantized.codebook import LAYOUT as CODEBOOK_LAYOUT
from hasten.checkpoint.quantized.codebook import check_codebook, read_codebook
from hasten.checkpoint.quantized.order import in_order, order_of
from hasten.checkpoint.quantized.patterns import MOST_PATTERNS, pattern
from hasten.checkpoint.quantized.sparse import ENDS as SPARSE_ENDS
from hasten.checkpoint.quantized.sparse import LAYOUT as SPARSE_LAYOUT
from hasten.checkpoint.quantized.sparse import check_sparse, sparse_numbers, sparse_shape
from hasten.checkpoint.quantized.tensors import F8, SCALES, Parts, checked_size, gathered
from hasten.families.config import ConfigReader
from hasten.formats import bits as bit_packing
from hasten.formats.linear import NUMBERS, SPARSE, ClusteredLinear, LinearFormat, QuantizedLinear
from hasten.formats.mapped import release
from hasten.formats.quantized import STATIC, DequantizedWeight, QuantizedWeight, static
from hasten.formats.weights import Array, Weight

ENDS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale", "input_zero_point",
    *SPARSE_ENDS, *CODEBOOK_ENDS,
)  # fmt: skip
CACHE_ENDS = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", SPARSE_LAYOUT, CODEBOOK_LAYOUT)
MIXED = "mixed-precision"
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
WHERE = "config.json: quantization_config"


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are stored: packed into words or not. ``block`` is [outputs, inputs] that share a scale, where the
    strategy is 'block'."""

    targets: tuple[str, ...]
    packed: bool
    form: LinearFormat
    one_scale: bool
    block: tuple[int, int] | None
    activations: str


def read(config: Mapping[str, Any], tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """The checkpoint's tensors, those of each quantized weight as one that is stored so. Raises a UserError naming what is wrong."""
    if config.get("kv_cache_scheme"):  # which is read with the cache
        tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in CACHE_ENDS}
        if not config.get("config_groups"):
            return dict(tensors)
    targets = _Targets(_schemes(ConfigReader(config, WHERE), config.get("config_groups")))
    modules, others = gathered(tensors, ENDS, ("weight_packed", "weight_scale", "weight_bitmask"))
    return {**others, **{f"{name}.weight": _weight(targets.scheme_of(name), parts) for name, parts in modules.items()}}


# --- the config


def _schemes(reader: ConfigReader, groups: object) -> list[Scheme]:
    reader.must_be("quant_method", "compressed-tensors")
    reader.must_be("quantization_status", "compressed", "frozen")
    reader.neutral("version", "global_compression_ratio", "kv_cache_scheme", "ignore", "run_compressed", "config_groups")
    if (sparsity := reader.section("sparsity_config")) is not None:
        sparsity.must_be("format", "dense")
    if (transforms := reader.section("transform_config")) is not None:
        transforms.must_be("config_groups", {})
    reader.must_be("format", *FORMATS, MIXED)
    overall = reader.choice("format", {name: name for name in (*FORMATS, MIXED)}, MIXED)
    reader.finish()
    if not isinstance(groups, dict) or not groups:
        raise reader.wrong("config_groups", groups, "an object is needed that says how the weights of each group are stored")
    found = []
    for name, value in groups.items():
        if not isinstance(value, dict):
            raise reader.wrong("config_groups", value, "its entries are objects")
        found.append(_scheme(ConfigReader(value, f"{WHERE}: {one_line(name)}"), overall))
    return found


def _scheme(group: ConfigReader, overall: str) -> Scheme:
    targets = group.names("targets")
    if not targets:
        raise group.wrong("targets", None, "a list of module names, classes or re: patterns is needed")
    group.must_be("output_activations")
    group.must_be("format", *FORMATS)
    layout = group.choice("format", {name: name for name in (*FORMATS, MIXED)}, overall)
    weights = group.section("weights")
    if weights is None:
        raise group.wrong("weights", None, "an object is needed that says how they are stored")
    form, one_scale, block = _weights(weights)
    if layout not in (accepted := _layouts(form)):
        raise group.wrong("format", layout, f"weights in {form} are stored in {' or '.join(accepted)}")
    if layout == SPARSE_LAYOUT:
        if one_scale or block is not None or (form.group and not NUMBERS[form.number][1]):
            raise group.wrong("weights", None, f"sparse {form.number} needs strategy 'channel'{' or group' * form.is_integer}")
        form = dataclasses.replace(form, sparse=True)
    if layout == CODEBOOK_LAYOUT:
        if one_scale or block is not None:
            raise group.wrong("weights", None, "weights with a codebook need strategy 'channel' or 'group'")
        form = dataclasses.replace(form, number="lut4")
    activations = _activations(group.section("input_activations"), form)
    group.finish()
    return Scheme(targets, layout in {"pack-quantized", CODEBOOK_LAYOUT}, form, one_scale, block, activations)


def _layouts(form: LinearFormat) -> tuple[str, ...]:
    """How weights in ``form`` may be stored."""
    sparse = (SPARSE_LAYOUT,) if form.number in SPARSE and not form.zero_points else ()
    if form.is_integer:
        clustered = (CODEBOOK_LAYOUT,) if form.number == "int4" and not form.zero_points else ()
        return ("pack-quantized", "int-quantized", "naive-quantized", *sparse, *clustered)
    return ("float-quantized", "naive-quantized") if form.number == "fp8" else sparse


def _weights(reader: ConfigReader) -> tuple[LinearFormat, bool, tuple[int, int] | None]:
    """The format, whether one scale is for the whole weight, and the block that shares one."""
    integers = reader.choice("type", {"int": True, "float": False}, "int")
    reader.must_be("num_bits", *((2, 3, 4, 8) if integers else (8, 16)))
    width, symmetric = reader.size("num_bits"), reader.flag("symmetric", True)
    if not integers and not symmetric:
        raise reader.wrong("symmetric", False, "weights of type float have no zero points")
    reader.must_be("dynamic", False)
    reader.must_be("strategy", "tensor", "channel", "group", "block")
    group_size = reader.signed("group_size", -1)
    default = "group" if group_size > 0 else "tensor" if group_size < 0 and reader.absent("group_size") else "channel"
    strategy = reader.choice("strategy", {name: name for name in ("tensor", "channel", "group", "block")}, default)
    if strategy == "group" and group_size < 1:
        raise reader.wrong("group_size", group_size, "strategy 'group' needs the number of inputs that share a scale, at least 1")
    block = reader.whole_numbers("block_structure")
    if strategy == "block" and (len(block) != 2 or min(block) < 1):
        raise reader.wrong("block_structure", list(block), "strategy 'block' needs two sizes of at least 1, as in [128, 128]")
    reader.neutral("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")
    reader.finish()
    group = group_size if strategy == "group" else block[1] if strategy == "block" else 0
    form = LinearFormat(f"int{width}" if integers else "fp8" if width == 8 else "bf16", group, not symmetric)
    return form, strategy == "tensor", (block[0], block[1]) if strategy == "block" else None


def _activations(reader: ConfigReader | None, form: LinearFormat) -> str:
    """What the weights are fed: int8 of each token's own scale or of one scale for all, where that is symmetric and of the whole tensor
    (others round more than each token's own, which is taken instead); fp8 of each token's own scale where that is dynamic, for tokens or
    whole tensors, and the weights are fp8 too; else bf16, which holds more."""
    if reader is None:
        return "bf16"
    integers = reader.choice("type", {"int": True, "float": False}, "int")
    reader.must_be("num_bits", 8)
    strategy = reader.choice("strategy", {name: name for name in STRATEGIES}, "tensor")
    if not integers and form.number == "fp8" and strategy in {"token", "tensor"} and reader.flag("dynamic", False):
        return "fp8"
    if not integers or not form.is_integer:
        return "bf16"
    return STATIC if strategy == "tensor" and not reader.flag("dynamic", False) and reader.flag("symmetric", True) else "int8"


class _Targets:
    """Which scheme a module has: of several targets its own name is first, then patterns, then classes."""

    def __init__(self, schemes: list[Scheme]) -> None:
        all_targets = [(target, scheme) for scheme in reversed(schemes) for target in scheme.targets]  # of equal ones the first counts
        self._named = dict(all_targets)
        self._patterns = [(pattern(text[3:], WHERE), its) for text, its in reversed(all_targets) if text.startswith("re:")]
        if len(self._patterns) > MOST_PATTERNS:
            raise UnsupportedError(f"{WHERE}: {len(self._patterns)} patterns are too many; at most {MOST_PATTERNS} are matched")

    def scheme_of(self, name: str) -> Scheme:
        """Raises CheckpointError for a module that is no target."""
        if name in self._named:
            return self._named[name]
        for compiled, scheme in self._patterns:
            if compiled.match(name):
                return scheme
        if "Linear" in self._named:
            return self._named["Linear"]
        raise CheckpointError(f"{one_line(name)} has quantized tensors, but no group of 'config_groups' targets it")


# --- the tensors


def _weight(scheme: Scheme, parts: Parts) -> Weight:
    form = scheme.form
    if form.sparse != ("weight_bitmask" in parts):
        parts.wrong("weight_bitmask", "is missing" if form.sparse else "is there", f"what {form} is stored with, as config.json says")
    if form.has_codebook != ("weight_codebook" in parts):
        parts.wrong("weight_codebook", "is missing" if form.has_codebook else "is there", "what config.json says of the weight")
    if form.sparse:
        shape = sparse_shape(parts)
    else:
        shape = _packed_shape(scheme, parts) if scheme.packed else parts.shape("weight", F8 if form.number == "fp8" else "int8")
    if len(shape) not in {2, 3}:
        parts.wrong("weight", f"has shape {list(shape)}", "[out, in]")
    *stack, out, width = shape
    for size in shape:
        checked_size(parts.name, "inputs, outputs or experts", size)
    if form.group >= width:
        form = dataclasses.replace(form, group=0)
    groups = -(-width // form.group) if form.group else 1
    scaled = NUMBERS[form.number][1] > 0
    if scaled:
        _check_scales(scheme, parts, tuple(stack), out, groups)
    if form.sparse:
        check_sparse(parts, form)
    if form.has_codebook:
        check_codebook(parts, tuple(stack))
        if "weight_g_idx" in parts:
            parts.wrong("weight_g_idx", "is there", "no order of groups beside a codebook, which is written without")
    if form.zero_points:
        zeros = (*stack, bit_packing.packed_width(out, form.bits), groups) if scheme.packed else (*stack, out, groups)
        if scheme.one_scale and not scheme.packed:
            zeros = parts.shape("weight_zero_point", "int8")
            if int(np.prod(zeros)) != 1:
                parts.wrong("weight_zero_point", f"has shape {list(zeros)}", "one number")
        parts.must_be("weight_zero_point", zeros, "int32" if scheme.packed else "int8")

    bits = 8 * parts.nbytes / int(np.prod(shape))

    def quantized() -> QuantizedLinear:
        scales = _scales(scheme, parts, (*stack, out, groups)) if scaled else None
        zeros = _zeros(scheme, parts, (*stack, out, groups)) if form.zero_points else None
        q = sparse_numbers(parts, form, shape) if form.sparse else _codes(scheme, parts, width)
        if form.has_codebook and scales is not None:
            return ClusteredLinear(q, scales, None, form.group or width, read_codebook(parts))
        return QuantizedLinear(q, scales, zeros, (form.group or width) if scaled else 0)

    if "weight_g_idx" in parts and (order := order_of(parts, "weight_g_idx", width, form.group)) is not None:
        return DequantizedWeight.of(shape, lambda: in_order(quantized(), order), str(form), "its groups are in activation order", bits)
    fed = scheme.activations if scheme.activations != STATIC else "int8"
    made = QuantizedWeight.of(shape, form, quantized, fed, bits)
    if scheme.activations != STATIC or "input_scale" not in parts:
        return made
    if parts.shape("input_scale", *SCALES) not in {(), (1,)}:
        parts.wrong("input_scale", f"has shape {list(parts.shape('input_scale', *SCALES))}", "one number")
    return static(made, float(parts.scales("input_scale").reshape(())))


def _packed_shape(scheme: Scheme, parts: Parts) -> tuple[int, ...]:
    packed = parts.shape("weight_packed", "int32")
    (rank,) = parts.shape("weight_shape", "int32", "int64") if len(parts.shape("weight_shape", "int32", "int64")) == 1 else (0,)
    if rank != len(packed) or rank not in {2, 3}:
        parts.wrong("weight_shape", f"has {rank} numbers for a tensor of shape {list(packed)}", "one number for each axis, 2 or 3")
    shape = tuple(int(size) for size in parts.load("weight_shape"))
    bits = scheme.form.bits
    if (
        shape[:-1] != packed[:-1]
        or shape[-1] < 1
        or packed[-1] not in {bit_packing.packed_width(shape[-1], bits), -(-shape[-1] // (32 // bits))}
    ):
        parts.wrong(
            "weight_packed", f"has shape {list(packed)}", f"what holds {list(shape)} numbers of {bits} bits, as 'weight_shape' says"
        )
    return shape


def _codes(scheme: Scheme, parts: Parts, width: int) -> Array:
    """int8 or float8_e4m3fn […, width]."""
    if not scheme.packed:
        codes = parts.load("weight")
        least, most = -(2 ** (scheme.form.bits - 1)), 2 ** (scheme.form.bits - 1) - 1
        if codes.dtype == np.int8 and scheme.form.bits < 8 and codes.size and (codes.min() < least or codes.max() > most):
            parts.wrong("weight", f"has numbers from {codes.min()} to {codes.max()}", f"{scheme.form.bits} bits, {least} to {most}")
        if codes.dtype != np.int8 and bool((codes.view(np.uint8) & 0x7F == 0x7F).any()):
            parts.wrong("weight", "has a number that is not one (NaN)", "finite numbers; the file is damaged, download it again")
        return codes
    words, bits = parts.load("weight_packed"), scheme.form.bits
    within = words.shape[-1] != bit_packing.packed_width(width, bits)
    numbers = bit_packing.unpack_within(words, bits, width) if within else bit_packing.unpack(words, bits, width)
    release(words)
    return (numbers if scheme.form.has_codebook else numbers - np.uint8(1 << (bits - 1))).view(np.int8)


def _check_scales(scheme: Scheme, parts: Parts, stack: tuple[int, ...], out: int, groups: int) -> None:
    found = parts.shape("weight_scale", *SCALES)
    if scheme.one_scale:
        needed = {stack, (*stack, 1), (*stack, 1, 1)}
    elif scheme.block is not None:
        needed = {(*stack, -(-out // scheme.block[0]), groups)}
    else:
        needed = {(*stack, out, groups), *([(*stack, out)] if groups == 1 else [])}
    if found not in needed:
        parts.wrong("weight_scale", f"has shape {list(found)}", " or ".join(str(list(shape)) for shape in sorted(needed)))


def _scales(scheme: Scheme, parts: Parts, shape: tuple[int, ...]) -> Array:
    scales = parts.scales("weight_scale")
    if scheme.block is not None:
        return np.ascontiguousarray(np.repeat(scales, scheme.block[0], axis=-2)[..., : shape[-2], :])
    if scheme.one_scale:
        return np.ascontiguousarray(np.broadcast_to(scales.reshape(*shape[:-2], 1, 1), shape))
    return scales.reshape(shape)


def _zeros(scheme: Scheme, parts: Parts, shape: tuple[int, ...]) -> Array:
    """int32 […, out, groups]; packed ones lie along the outputs."""
    stored, bits = parts.load("weight_zero_point"), scheme.form.bits
    if not scheme.packed:
        return np.ascontiguousarray(np.broadcast_to(stored.reshape(1, 1) if scheme.one_scale else stored, shape), np.int32)
    numbers = bit_packing.unpack(np.swapaxes(stored, -1, -2), bits, shape[-2])
    return np.ascontiguousarray(np.swapaxes(numbers, -1, -2)).astype(np.int32) - (1 << (bits - 1))
