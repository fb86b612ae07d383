"""Where the values of a step lie on the device: places in one arena, and pieces of values that lie in them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hasten.backends.cuda.inputs import Bucket
from hasten.backends.cuda.kernels.attention import Parts, blocks_for
from hasten.backends.cuda.units import units_of
from hasten.program import Fused, Program, Value, ops
from hasten.program.arena import Arena

SPLIT_ROWS = 64  # decoding: the positions of one sequence are shared out over the device
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn, "int32": torch.int32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """``rows`` rows of ``features`` from byte ``start`` on; a row of the memory is ``width`` numbers, these begin at ``first``."""

    start: int
    dtype: torch.dtype
    rows: int
    features: tuple[int, ...]
    width: int
    first: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Places by value, in an arena of ``size`` bytes. Outputs of the Program have none: they outlive the step."""

    size: int
    places: Mapping[str, Place]


def lay_out(program: Program, units: Sequence[Fused], bucket: Bucket) -> Layout:
    """Every value that ``units`` write has a place from then on until its last use."""
    values, arena, places = program.values, Arena(), dict[str, Place]()
    whole: dict[str, str] = {}  # by value: in whose memory it lies
    for unit in units:
        for name in unit.outputs:
            owner = _owner(unit, name)
            if len(unit.outputs) > 1 and name in program.outputs and isinstance(unit.parts[0], ops.Linear | ops.Split):
                raise TypeError(f"{name} lies in another value's memory, so it cannot outlive the step")
            whole[name] = whole.get(owner, owner)
    last = {whole[name]: index for index, unit in enumerate(units) for name in (*unit.inputs, *unit.outputs) if name in whole}
    for index, unit in enumerate(units):
        first = dict[str, int]()
        for name in unit.outputs:
            if whole[name] in program.outputs:
                continue
            value, size = values[name], math.prod(values[name].features)
            rows, dtype, at = rows_of(value, bucket), DTYPES[value.dtype], first.get(whole[name], 0)
            if whole[name] in places and isinstance(unit.parts[0], ops.Split):  # a piece of a piece begins where that does
                above = places[_owner(unit, name)]
                start, width, at = above.start, above.width, above.first + at
                first[whole[name]] = at - above.first + size
            else:
                width = sum(math.prod(values[each].features) for each in unit.outputs if whole[each] == whole[name])
                start = places[whole[name]].start if at else arena.take(rows * width * dtype.itemsize)
                first[whole[name]] = at + size
            places[name] = Place(start, dtype, rows, value.features, width, at)
        for name in {whole[each] for each in (*unit.inputs, *unit.outputs) if each in whole}:
            if last[name] == index and name in places:
                arena.give_back(places[name].start)
    return Layout(max(arena.size, 1), places)


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """Memory of a step that tapes share, for they play one at a time: ``values`` uint8 [bytes], and float32 [numbers] ``results`` and what
    attention's ``parts`` take."""

    values: Tensor
    results: Tensor
    parts: Tensor

    @classmethod
    def of(cls, program: Program, largest: Bucket, device: torch.device) -> "Room":
        """As much as ``program`` takes in ``largest``."""
        results = max(rows_of(program.values[name], largest) * math.prod(program.values[name].features) for name in program.outputs)
        attends = [op for op in program.ops if isinstance(op, ops.Attend)]
        split = [op for op in attends if program.context > blocks_for(op.head_dim).part]
        rows = min(SPLIT_ROWS, largest.rows)
        parts = (Parts.numbers(rows, op.heads, op.value_dim, program.context, blocks_for(op.head_dim)) for op in split)
        numbers = (torch.empty(count, dtype=torch.float32, device=device) for count in (results, max(parts, default=0)))
        return cls(torch.empty(lay_out(program, units_of(program), largest).size, dtype=torch.uint8, device=device), *numbers)

    @property
    def nbytes(self) -> int:
        """All together."""
        return self.values.nbytes + self.results.nbytes + self.parts.nbytes


def view(arena: Tensor, place: Place) -> Tensor:
    """The value at ``place`` of ``arena`` uint8 [size], as a tensor [rows, …features]."""
    count = place.rows * place.width
    whole = arena[place.start : place.start + count * place.dtype.itemsize].view(place.dtype).view(place.rows, place.width)
    if place.width == math.prod(place.features):
        return whole.view(place.rows, *place.features)
    return whole[:, place.first : place.first + place.features[-1]]


def rows_of(value: Value, bucket: Bucket) -> int:
    """How many rows a value has in ``bucket``."""
    return {"T": bucket.rows, "R": bucket.wanted, "S": bucket.sequences}[value.rows]


def _owner(unit: Fused, name: str) -> str:
    """In whose memory a value lies that ``unit`` makes: pieces in what was cut, products of the same rows in one."""
    first = unit.parts[0]
    if isinstance(first, ops.Split):
        return first.x
    return first.y if isinstance(first, ops.Linear) else name
