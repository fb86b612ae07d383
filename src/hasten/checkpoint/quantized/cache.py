"""How a checkpoint says that keys and values are to be kept, as compressed-tensors does: `kv_cache_scheme`, and one scale for the keys and
one for the values of a layer, beside its projections: `model.layers.0.self_attn.k_scale`.

Source: https://github.com/vllm-project/compressed-tensors, quantization/quant_config.py and quantization/lifecycle/initialize.py."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hasten.formats.cache import MeantCache
from hasten.formats.tensor_map import TensorMap
from hasten.formats.weights import Weight

ENDS = ("k_scale", "v_scale")
KINDS = {("float", 8): "fp8", ("int", 8): "int8"}
"""The scheme's type and number of bits → what a user would ask for; what others say is left to the session, as before."""
STANDS_BESIDE = (".k.weight", ".kv_a.weight")  # a mixer's keys, or what a latent one caches


def read_cache(config: object, tensors: Mapping[str, Weight], tensor_map: TensorMap) -> MeantCache | None:
    """What ``quantization_config`` and the checkpoint's tensors say of the cache; None where they say nothing that can be kept to."""
    scheme = config.get("kv_cache_scheme") if isinstance(config, Mapping) else None
    if not isinstance(scheme, Mapping) or not scheme:
        return None
    kind, bits = scheme.get("type", "int"), scheme.get("num_bits", 8)
    form = KINDS.get((kind, bits)) if isinstance(kind, str) and isinstance(bits, int) else None
    if form is None:
        return None
    found = {
        f"{path}.{end}": tensors[f"{module}.{end}"] for path, module in _modules(tensor_map) for end in ENDS if f"{module}.{end}" in tensors
    }
    return MeantCache(form, found)


def cache_tensors(cache: MeantCache | None, tensor_map: TensorMap) -> dict[str, Weight]:
    """Its scales under the names that a checkpoint has for them."""
    if cache is None:
        return {}
    modules = dict(_modules(tensor_map))
    named = ((*name.rpartition(".")[::2], scale) for name, scale in cache.scales.items())
    return {f"{modules[path]}.{end}": scale for path, end, scale in named if path in modules}


def with_cache_scheme(config: dict[str, Any], cache: MeantCache | None) -> dict[str, Any]:
    """``quantization_config``, {} where no weight is quantized, that also says how the cache is kept."""
    if cache is None:
        return config
    kind, bits = next(key for key, form in KINDS.items() if form == cache.format)
    scheme = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "tensor", "group_size": None, "dynamic": False}
    bare: dict[str, Any] = {
        "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "compressed", "config_groups": {}, "ignore": [],
        "global_compression_ratio": None,
    }  # fmt: skip
    return {**(config or bare), "kv_cache_scheme": scheme}


def one_scale(number: float) -> Weight:
    """A scale as a tensor of the checkpoint, float32 [1]."""
    return Weight((1,), np.dtype(np.float32), lambda: np.array([number], np.float32))


def _modules(tensor_map: TensorMap) -> Iterator[tuple[str, str]]:
    """Every mixer that caches something, with the checkpoint's name of the module that holds its projections."""
    for mapping in tensor_map:
        for target in mapping.targets:
            for end in STANDS_BESIDE:
                if target.endswith(end) and mapping.sources[0].count(".") > 1:
                    yield target.removesuffix(end), mapping.sources[0].rsplit(".", 2)[0]
