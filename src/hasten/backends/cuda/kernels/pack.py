"""Weights of linear layers as the kernels of linear.py and experts.py read them: plain functions on torch tensors, once at load.

Codes lie row by row [out, width], inputs side by side, ``width`` being the inputs filled up with zeros to whole spans of 16 bytes and
more, so that every row begins where a wide load may. Scales and zero points are turned to [groups, out]: a tile reads one group of many
output channels, which then lie side by side.

Four bits are packed four to a word of 16 in spans: of the ``span`` inputs in a span, word j holds inputs j, span/4 + j, span/2 + j and
3·span/4 + j, from its lowest bits up, each plus 8. So a tile of words is four tiles of inputs, and nothing moves between lanes when it is
taken apart. A quarter of a span never holds inputs of two groups."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.base.errors import UnsupportedError
from hasten.formats.linear import ClusteredLinear, LinearFormat, QuantizedLinear

Layout = Literal["plain", "nibbles"]

WIDE = 128  # plain rows are filled up to whole runs of so many inputs, the longest step of a product over groups

_NIBBLES = {"int2", "int3", "int4"}
_PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out, size], or [count, out, size] stacked, in a layout of the device.

    ``codes`` [(count,) out, width] in bfloat16, float16, float32, float8_e4m3fn or int8 (plain), or int16 [(count,) out, width / 4]
    (nibbles, each 0 … 15 for −8 … 7). ``scales`` float32 and ``zeros`` int8 [(count,) groups, out] or None; ``group`` inputs share
    one, all of them where it is 0. A weight stands for (code − zero) · scale."""

    size: int
    layout: Layout
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0
    span: int = 0

    @property
    def out(self) -> int:
        """Output channels."""
        return self.codes.shape[-2]

    @property
    def width(self) -> int:
        """Inputs of a row of codes, filled up."""
        return self.codes.shape[-1] * (4 if self.layout == "nibbles" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(each.nbytes for each in (self.codes, self.scales, self.zeros) if each is not None)

    @classmethod
    def of_dense(cls, weight: Tensor) -> Self:
        """A dense weight where it lies: [(count,) out, size], rows contiguous."""
        return cls(weight.shape[-1], "plain", weight)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        scales, zeros = (None if each is None else each.to(device) for each in (self.scales, self.zeros))
        return dataclasses.replace(self, codes=self.codes.to(device), scales=scales, zeros=zeros)


def pack(form: LinearFormat, stored: QuantizedLinear) -> PackedWeight:
    """``stored`` in ``form``, on the CPU. Numbers below four bits take four; places in a codebook become its numbers, eight bits each; what
    a sparse form leaves out is stored as the zero it is. Raises UnsupportedError for zero points that take more than a byte, with a nibble
    taken from them too."""
    size = stored.q.shape[-1]
    if stored.scales is None:
        return PackedWeight(size, "plain", _filled(_tensor(stored.q).to(_PLAIN[form.number]), WIDE))
    group = stored.group if 0 < stored.group < size else 0
    if form.number in _NIBBLES:
        span = _span(group, form)
        if stored.zeros is not None and (stored.zeros.min() < -120 or stored.zeros.max() > 119):
            raise UnsupportedError("a zero point beyond -120 to 119 takes nibbles out of a byte; round the model again, without it")
        codes = _nibbles(_filled(_tensor(stored.q), span), span)
        return PackedWeight(size, "nibbles", codes, *_turned(stored, size, group, span), group, span)
    q = stored.q
    if isinstance(stored, ClusteredLinear):
        q = np.take_along_axis(stored.codebook[..., None, :], q.astype(np.int64), axis=-1)
    return PackedWeight(size, "plain", _filled(_tensor(q), WIDE), *_turned(stored, size, group, WIDE), group)


def outline(form: LinearFormat, shape: tuple[int, ...]) -> PackedWeight:
    """A weight [(count,) out, size] as ``pack`` lays it out, of codes without memory and no scales."""
    size = shape[-1]
    group = form.group if 0 < form.group < size else 0
    if form.number in _NIBBLES:
        span = _span(group, form)
        codes = torch.empty((*shape[:-1], (size + -size % span) // 4), dtype=torch.int16, device="meta")
        return PackedWeight(size, "nibbles", codes, group=group, span=span)
    filled = (*shape[:-1], size + -size % WIDE)
    return PackedWeight(size, "plain", torch.empty(filled, dtype=_PLAIN.get(form.number, torch.int8), device="meta"), group=group)


def unpack(weight: PackedWeight) -> Tensor:
    """What a packed weight stands for, float32 [(count,) out, size]: its plain meaning, on whatever device it lies."""
    codes = weight.codes
    if weight.layout == "nibbles":
        quarters = [((codes >> bits) & 15) - 8 for bits in (0, 4, 8, 12)]
        codes = torch.stack([each.unflatten(-1, (-1, weight.span // 4)) for each in quarters], dim=-2).flatten(-3)
    dense = codes[..., : weight.size].to(torch.float32)
    if weight.scales is None:
        return dense
    group = torch.arange(weight.size, device=dense.device) // (weight.group or weight.size)
    if weight.zeros is not None:
        dense = dense - weight.zeros.mT[..., group].to(torch.float32)
    return dense * weight.scales.mT[..., group]


def joined(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of one form and one size as one, their output channels one after the other."""
    first = weights[0]
    scales = torch.cat([each.scales for each in weights if each.scales is not None], dim=-1) if first.scales is not None else None
    zeros = torch.cat([each.zeros for each in weights if each.zeros is not None], dim=-1) if first.zeros is not None else None
    return dataclasses.replace(first, codes=torch.cat([each.codes for each in weights], dim=-2), scales=scales, zeros=zeros)


def _span(group: int, form: LinearFormat) -> int:
    """The widest span whose quarters lie in one group each; 32 is the least that int8 products take."""
    for quarter in (64, 32):
        if group % quarter == 0:
            return 4 * quarter
    raise UnsupportedError(f"weights {form} in groups of {group} are not packed; accepted are multiples of 32 inputs")


def _tensor(array: NDArray[np.generic]) -> Tensor:
    """A copy as a tensor; torch takes float8 as bytes alone."""
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(array))


def _filled(codes: Tensor, multiple: int) -> Tensor:
    """Rows filled up with zeros to a multiple of so many."""
    missing = -codes.shape[-1] % multiple
    if not missing:
        return codes.contiguous()
    made = torch.zeros((*codes.shape[:-1], codes.shape[-1] + missing), dtype=codes.dtype)
    made[..., : codes.shape[-1]] = codes
    return made


def _nibbles(codes: Tensor, span: int) -> Tensor:
    """int8 [..., width] of −8 … 7 → int16 [..., width / 4]."""
    first, second, third, fourth = (codes.to(torch.int16) + 8).unflatten(-1, (-1, 4, span // 4)).unbind(-2)
    joined: Tensor = first | (second << 4) | (third << 8) | (fourth << 12)
    return joined.flatten(-2).contiguous()


def _turned(stored: QuantizedLinear, size: int, group: int, multiple: int) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as [..., groups, out], for every group that a filled row reaches into."""
    scales = _tensor(np.asarray(stored.scales, np.float32)).mT
    groups = -(-(size + -size % multiple) // group) if group else 1
    scales = _taller(scales, groups, 1.0)
    if stored.zeros is None:
        return scales, None
    if np.any(np.abs(stored.zeros) > 127):
        raise UnsupportedError("zero points beyond ±127 are not packed for this device; bits and zero points of at most a byte are")
    return scales, _taller(_tensor(stored.zeros.astype(np.int8)).mT, groups, 0)


def _taller(turned: Tensor, groups: int, fill: float) -> Tensor:
    made = torch.full((*turned.shape[:-2], groups, turned.shape[-1]), fill, dtype=turned.dtype)
    made[..., : turned.shape[-2], :] = turned
    return made
