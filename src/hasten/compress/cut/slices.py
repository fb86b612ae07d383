"""Rows and columns of weights, taken when they are asked for, and how many of how many stay."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.data import Text
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight
from hasten.formats.weights import Array, Weight, Weights
from hasten.model import Model, Provenance
from hasten.program import lower
from hasten.spec import CrossLayerAttention, Spec

Index = NDArray[np.int64]

ROUND_SIZES = (64, 32, 16, 8, 4, 2)
"""What sizes are rounded to multiples of, the best for the native kernels first: they read 64 inputs and make 16 outputs at a time."""

NEAR = 0.01
"""By how much of the whole a size may be rounded."""


def kept_of(size: int, share: float, what: str) -> int:
    """How many of ``size`` stay when ``share`` of them go, rounded to what kernels like where that is near.

    Raises ConfigError where all or none would go."""
    exact = size * (1 - share)
    rounded = (round(exact / multiple) * multiple for multiple in ROUND_SIZES)
    kept = next((each for each in rounded if abs(each - exact) <= NEAR * size and 0 < each < size), round(exact))
    if not 0 < kept < size:
        raise ConfigError(f"a share of {share} of {size} {what} is {'none' if kept else 'all'} of them; name another")
    return kept


def check_share(share: float) -> None:
    """Raise ConfigError for what is no share that leaves something and takes something."""
    if not 0 < share < 1:
        raise ConfigError(f"share is {share}; accepted is a number between 0 and 1, as 0.25, of what is to go")


def check_damp(damp: float) -> None:
    """Raise ConfigError for what damps nothing or everything."""
    if not 0 < damp < 1:
        raise ConfigError(f"damp is {damp}; accepted is a share between 0 and 1, as 0.01")


def check_plain(model: Model, names: list[str]) -> None:
    """Raise ConfigError where one of the weights is stored quantized."""
    for name in names:
        if isinstance(model.weights[name], QuantizedWeight | DequantizedWeight):
            raise ConfigError(f"{name} is quantized already, so it cannot be cut; put this transform before those that round")


def check_matrices(spec: Spec, *, low_rank: bool) -> None:
    """Raise UnsupportedError where blocks share matrices or keys and values, or, unless ``low_rank`` is well, have some as products of
    two."""
    for index, block in enumerate(spec.blocks):
        if isinstance(block.mixer, CrossLayerAttention):
            raise UnsupportedError(f"blocks.{index} reads keys and values of block {block.mixer.source}; cut before they are shared")
        if block.shares is not None:
            raise UnsupportedError(f"blocks.{index} shares its matrices with another, who would be cut with it; cut before they are shared")
        if block.low_rank and not low_rank:
            raise UnsupportedError(f"blocks.{index}.{block.low_rank[0].layer} is a product of two matrices; cut before their rank is")


def check_cache(model: Model) -> None:
    """Raise ConfigError where scales of keys and values are kept, layer by layer and head by head."""
    if model.cache is not None and model.cache.scales:
        raise ConfigError(f"{model.name} has scales for its cached keys and values, which are for what it is now; cut before they are made")


def taken(weight: Weight, index: Index, axis: int) -> Weight:
    """``weight`` with what ``index`` [k] names along ``axis``, in that order; with an ``index`` [count, k], of each of ``count`` stacked
    weights what its row names."""
    shape = list(weight.shape)
    shape[axis] = index.shape[-1]
    return Weight(tuple(shape), weight.dtype, functools.partial(_take, weight, index, axis))


def _take(weight: Weight, index: Index, axis: int) -> Array:
    array = weight.load()
    if index.ndim == 1:
        return np.ascontiguousarray(np.take(array, index, axis))
    sizes = [1] * array.ndim
    sizes[0], sizes[axis] = index.shape
    return np.ascontiguousarray(np.take_along_axis(array, index.reshape(sizes), axis))


def remade(model: Model, spec: Spec, weights: Mapping[str, Weight], *entries: Provenance) -> Model:
    """``model`` become another, its weights in the order that the Program uses them."""
    ordered = {name: weights[name] for name in lower(spec).params}
    return dataclasses.replace(model, spec=spec, weights=Weights(ordered), provenance=(*model.provenance, *entries))


def text_facts(text: Text) -> dict[str, Any]:
    """What is written into provenance of the text that was looked at."""
    return {"text": text.name, "windows": len(text.windows), "tokens": text.tokens, "sha256": text.sha256}
