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
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from hasten.base.errors import UnsupportedError
from hasten.formats.linear import ClusteredLinear, LinearFormat, QuantizedLinear

Layout = Literal["plain", "nibbles", "two_of_four"]

WIDE = 128  # plain rows are filled up to whole runs of so many inputs, the longest step of a product over groups

NIBBLES = ("int2", "int3", "int4")
"""Numbers that take four bits each."""

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Numbers without scales."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """What QuantizedLinear says, as tensors of one device: ``q`` [(count,) out, size] int8, float8_e4m3fn or a dense dtype; ``scales``
    float32 and ``zeros`` int32 [(count,) out, groups] or None; ``group`` inputs share one."""

    q: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    group: int


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out, size], or [count, out, size] stacked, in a layout of the device.

    Where that is two_of_four, ``codes`` are torch's semi-structured tensor [out, size], which its own product alone reads. Else:

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
        codes: Sequence[Tensor | None] = [self.codes]
        if isinstance(self.codes, SparseSemiStructuredTensor):
            codes = self.codes.packed, self.codes.meta
        return sum(each.nbytes for each in (*codes, self.scales, self.zeros) if each is not None)

    @classmethod
    def of_dense(cls, weight: Tensor) -> Self:
        """A dense weight where it lies: [(count,) out, size], rows contiguous."""
        return cls(weight.shape[-1], "plain", weight)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        scales, zeros = (None if each is None else each.to(device) for each in (self.scales, self.zeros))
        return dataclasses.replace(self, codes=self.codes.to(device), scales=scales, zeros=zeros)


def pack(form: LinearFormat, stored: QuantizedLinear, device: torch.device | str = "cpu") -> PackedWeight:
    """``stored`` in ``form``, brought to ``device`` as it is and packed there. Numbers below four bits take four; places in a codebook
    become its numbers, eight bits each; what a sparse form leaves out is stored as the zero it is. Raises UnsupportedError for zero points
    that take more than a byte, with a nibble taken from them too."""
    if stored.zeros is not None:
        if form.number in NIBBLES and (stored.zeros.min() < -120 or stored.zeros.max() > 119):
            raise UnsupportedError("a zero point beyond -120 to 119 takes nibbles out of a byte; round the model again, without it")
        if np.any(np.abs(stored.zeros) > 127):
            raise UnsupportedError("zero points beyond ±127 are not packed for this device; bits and zero points of at most a byte are")
    q = stored.q
    if isinstance(stored, ClusteredLinear):
        q = np.take_along_axis(stored.codebook[..., None, :], q.astype(np.int64), axis=-1)
    scales, zeros = (None if each is None else _tensor(each).to(device) for each in (stored.scales, stored.zeros))
    return pack_stored(form, Stored(_tensor(q).to(device), scales, zeros, stored.group))


def pack_stored(form: LinearFormat, stored: Stored) -> PackedWeight:
    """The same where it lies; zero points fit in a byte."""
    size = stored.q.shape[-1]
    if stored.scales is None:
        return PackedWeight(size, "plain", _filled(stored.q.to(PLAIN[form.number]), WIDE))
    group = stored.group if 0 < stored.group < size else 0
    if form.number not in NIBBLES:
        return PackedWeight(size, "plain", _filled(stored.q, WIDE), *_turned(stored.scales, stored.zeros, size, group, WIDE), group)
    span = _span(group, form)
    codes = _nibbles(_filled(stored.q, span), span)
    return PackedWeight(size, "nibbles", codes, *_turned(stored.scales, stored.zeros, size, group, span), group, span)


def outline(form: LinearFormat, shape: tuple[int, ...]) -> PackedWeight:
    """A weight [(count,) out, size] as ``pack`` lays it out, of codes without memory and no scales."""
    size = shape[-1]
    group = form.group if 0 < form.group < size else 0
    if form.number in NIBBLES:
        span = _span(group, form)
        codes = torch.empty((*shape[:-1], (size + -size % span) // 4), dtype=torch.int16, device="meta")
        return PackedWeight(size, "nibbles", codes, group=group, span=span)
    filled = (*shape[:-1], size + -size % WIDE)
    return PackedWeight(size, "plain", torch.empty(filled, dtype=PLAIN.get(form.number, torch.int8), device="meta"), group=group)


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


def is_two_of_four(weight: PackedWeight) -> bool:
    """Whether of any four inputs side by side, from a multiple of four on, at most two have a code that is not 0."""
    if weight.layout != "plain":
        return weight.layout == "two_of_four"
    fours = torch.nn.functional.pad(weight.codes, (0, -weight.codes.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return bool(((fours != 0).sum(-1) <= 2).all())


def compressed(weight: PackedWeight) -> PackedWeight:
    """A plain bfloat16 weight that is two of four, without two of every four: nine bits for each input of it. Only a device does it. Raises
    UnsupportedError for another weight, or sizes that are not multiples of 64."""
    if weight.scales is not None or weight.codes.dtype != torch.bfloat16 or not is_two_of_four(weight):
        raise UnsupportedError("a bfloat16 weight of which two of any four inputs are 0 is compressed, and no other")
    if weight.codes.dim() != 2 or weight.out % 64 or weight.size % 64:
        raise UnsupportedError(f"weights of {weight.out} × {weight.size} are not compressed; accepted are multiples of 64")
    dense = weight.codes[:, : weight.size].contiguous()
    return PackedWeight(weight.size, "two_of_four", to_sparse_semi_structured(dense))


def joined(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of one form and one size as one, their output channels one after the other."""
    first = weights[0]
    scales = torch.cat([each.scales for each in weights if each.scales is not None], dim=-1) if first.scales is not None else None
    zeros = torch.cat([each.zeros for each in weights if each.zeros is not None], dim=-1) if first.zeros is not None else None
    return dataclasses.replace(first, codes=torch.cat([each.codes for each in weights], dim=-2), scales=scales, zeros=zeros)


def stacked(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of one form and shape as one, with an axis before theirs."""
    scales = torch.stack([each.scales for each in weights if each.scales is not None]) if weights[0].scales is not None else None
    zeros = torch.stack([each.zeros for each in weights if each.zeros is not None]) if weights[0].zeros is not None else None
    return dataclasses.replace(weights[0], codes=torch.stack([each.codes for each in weights]), scales=scales, zeros=zeros)


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
    made = torch.zeros((*codes.shape[:-1], codes.shape[-1] + missing), dtype=codes.dtype, device=codes.device)
    made[..., : codes.shape[-1]] = codes
    return made


def _nibbles(codes: Tensor, span: int) -> Tensor:
    """int8 [..., width] of −8 … 7 → int16 [..., width / 4]."""
    first, second, third, fourth = (codes.to(torch.int16) + 8).unflatten(-1, (-1, 4, span // 4)).unbind(-2)
    joined: Tensor = first | (second << 4) | (third << 8) | (fourth << 12)
    return joined.flatten(-2).contiguous()


def _turned(scales: Tensor, zeros: Tensor | None, size: int, group: int, multiple: int) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as [..., groups, out], for every group that a filled row reaches into."""
    groups = -(-(size + -size % multiple) // group) if group else 1
    return _taller(scales.mT, groups, 1.0), None if zeros is None else _taller(zeros.to(torch.int8).mT, groups, 0)


def _taller(turned: Tensor, groups: int, fill: float) -> Tensor:
    made = torch.full((*turned.shape[:-2], groups, turned.shape[-1]), fill, dtype=turned.dtype, device=turned.device)
    made[..., : turned.shape[-2], :] = turned
    return made
