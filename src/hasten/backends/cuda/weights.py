"""Weights on the device, in the layouts of its kernels: each is brought over once, whoever asks for it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hasten.backends.cuda.kernels.pack import PackedWeight, compressed, is_two_of_four, joined, outline, pack, pack_stored, stacked
from hasten.backends.cuda.kernels.rounding import round_to_nearest
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat
from hasten.formats.mapped import release
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Array, Weights

ROUNDED_AT_ONCE = 1 << 24
"""Numbers of a dense weight that lie on the device while they are rounded: 64 MiB in float32, and some times that beside them."""


class TapeWeights(Protocol):
    """What a tape asks of weights: `DeviceWeights`, or their outlines."""

    def plain(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in plain numbers of ``dtype``."""
        ...

    def linear(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> PackedWeight:
        """Weights that read the same rows, as one."""
        ...

    def is_two_of_four(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> bool:
        """Whether ``linear`` of these is zero in two of any four inputs."""
        ...

    def compressed(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> PackedWeight:
        """The same without its zeros."""
        ...


class Outlines:
    """Weights of the shapes that ``params`` tells, without memory: for tapes that are only counted."""

    def __init__(self, params: Mapping[str, Sequence[int]]) -> None:
        self._params = params

    def plain(self, name: str, dtype: torch.dtype) -> Tensor:
        """As wide and as high."""
        return torch.empty(tuple(self._params[name]), dtype=dtype, device="meta")

    def linear(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> PackedWeight:
        """In the layout that it would have, its scales left out."""
        *stacked, _, size = self._params[names[0]]
        shape = (*stacked, sum(self._params[name][-2] for name in names), size)
        if form == "dense":
            return PackedWeight.of_dense(torch.empty(shape, dtype=dense, device="meta"))
        return outline(LinearFormat.parse(form), shape)

    def is_two_of_four(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> bool:
        """Not as far as is known here; a tape takes as much of its own for either kind."""
        return False

    def compressed(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> PackedWeight:
        """Of none is it known that it could be. Raises UnsupportedError."""
        raise UnsupportedError(f"{', '.join(names)} are outlines, without numbers to leave out; DeviceWeights has them")


class DeviceWeights:
    """``weights`` on ``device``; what is asked for twice lies there once. ``nbytes`` are what lies there by now.

    Weights come one after the other, as they are stored: what is packed already is brought over so, and what is to be rounded is rounded
    and packed there, a run of output channels at a time."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self.device, self._weights = device, weights
        self._plain: dict[tuple[str, torch.dtype], Tensor] = {}
        self._linear: dict[tuple[tuple[str, ...], str, torch.dtype], PackedWeight] = {}
        self._two_of_four: dict[tuple[tuple[str, ...], str, torch.dtype], bool] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all that was asked for."""
        return sum(each.nbytes for each in self._plain.values()) + sum(each.nbytes for each in self._linear.values())

    @property
    def linear_bytes(self) -> int:
        """Bytes of those of linear layers."""
        return sum(each.nbytes for each in self._linear.values())

    def plain(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in plain numbers of ``dtype``."""
        key = name, dtype
        if key not in self._plain:
            self._plain[key] = self._brought(name, dtype)
        return self._plain[key]

    def linear(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> PackedWeight:
        """Weights of linear layers that read the same rows, as one whose output channels are theirs one after the other; in ``form``, or
        where that is 'dense' in ``dense``. What is stored in ``form`` already comes over to the bit."""
        key = names, form, dense
        if key not in self._linear:
            parts = [self._packed(name, form, dense, len(names) == 1) for name in names]
            self._linear[key] = parts[0] if len(parts) == 1 else joined(parts)
        return self._linear[key]

    def is_two_of_four(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> bool:
        """Whether ``linear`` of these is zero in two of any four inputs; looked at once."""
        key = names, form, dense
        if key not in self._two_of_four:
            self._two_of_four[key] = is_two_of_four(self.linear(*key))
        return self._two_of_four[key]

    def compressed(self, names: tuple[str, ...], form: str, dense: torch.dtype) -> PackedWeight:
        """The same without its zeros (pack.compressed), in whose place it lies from then on."""
        key = names, form, dense
        weight = self.linear(*key)
        if weight.layout != "two_of_four":
            self._linear[key] = weight = compressed(weight)
        return weight

    def _packed(self, name: str, form: str, dense: torch.dtype, alone: bool) -> PackedWeight:
        if form == "dense":  # what becomes part of a joined one is not kept beside it
            return PackedWeight.of_dense(self.plain(name, dense) if alone else self._brought(name, dense))
        weight, its = self._weights[name], LinearFormat.parse(form)
        if isinstance(weight, QuantizedWeight) and weight.form == its:
            return pack(its, weight.quantized(), self.device)
        array = weight.load()
        if its.has_codebook:
            packed = pack(its, its.quantize(array), self.device)
        elif array.ndim > 2:
            packed = stacked([self._rounded(matrix, its) for matrix in array])
        else:
            packed = self._rounded(array, its)
        release(array)
        return packed

    def _rounded(self, matrix: Array, form: LinearFormat) -> PackedWeight:
        """A dense weight [out, size]; its output channels are rounded apart, so a run of them at a time is the same."""
        most = max(1, ROUNDED_AT_ONCE // max(1, matrix.shape[1]))
        runs = [
            pack_stored(form, round_to_nearest(form, _tensor(matrix[first : first + most]).to(self.device, copy=True)))
            for first in range(0, len(matrix), most)
        ]
        return runs[0] if len(runs) == 1 else joined(runs)

    def _brought(self, name: str, dtype: torch.dtype) -> Tensor:
        array = self._weights.array(name)
        brought = _tensor(array).to(self.device, copy=True).to(dtype).contiguous()  # converted there, not on the way
        release(array)
        return brought


def _tensor(array: Array) -> Tensor:
    """The same memory, bfloat16 too, which torch does not take from numpy."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
