"""The products of a Program by their sizes, and weights and rows of such sizes, for whoever times them without a model."""

import dataclasses
import math

import torch
from torch import Tensor

from hasten.backends.cuda.kernels.pack import PackedWeight, Stored, pack_stored
from hasten.backends.cuda.places import DTYPES
from hasten.backends.cuda.tuned import shape_name
from hasten.backends.cuda.units import units_of
from hasten.formats.linear import NUMBERS, LinearFormat
from hasten.program import Program, ops

FEEDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
"""What rows of a dtype are called."""
_FED = {name: dtype for dtype, name in FEEDS.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """y[T, H·out] of ``dtype`` = x[T, H·size] · weightᵀ, head by head where there are several ``heads`` (HeadLinear); a weight in
    ``form``, rows ``fed`` as "bf16", "f32", "int8" or "fp8"."""

    form: LinearFormat
    fed: str
    out: int
    size: int
    dtype: torch.dtype
    heads: int = 1

    @property
    def name(self) -> str:
        """As files of what was measured call it."""
        return shape_name(str(self.form), self.fed, self.out, self.size)

    def weight(self, device: torch.device, seed: int = 0) -> PackedWeight:
        """A random one; in a sparse form, of any four inputs side by side two are 0."""
        random = torch.Generator(device).manual_seed(seed)
        shape = (*((self.heads,) if self.heads > 1 else ()), self.out, self.size)
        limit = NUMBERS[self.form.number][1]
        if not limit:
            dense = torch.randn(shape, device=device, generator=random) / math.sqrt(self.size)
            if self.form.sparse:
                dense *= _two_of_four(shape, random, device)
            return PackedWeight.of_dense(dense.to(_FED[self.form.number]))
        groups = (*shape[:-1], -(-self.size // self.form.group) if self.form.group else 1)
        q = torch.randint(-int(limit), int(limit) + 1, shape, device=device, generator=random)
        if self.form.sparse:
            q *= _two_of_four(shape, random, device)
        scales = torch.rand(groups, device=device, generator=random) / (limit * math.sqrt(self.size))
        zeros = torch.randint(-2, 2, groups, device=device, generator=random, dtype=torch.int32) if self.form.zero_points else None
        dtype = torch.float8_e4m3fn if self.form.number == "fp8" else torch.int8
        return pack_stored(self.form, Stored(q.to(dtype), scales, zeros, self.form.group))

    def rows(self, count: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """Random rows x [count, H·size], and their scales float32 [count, 1] where they are int8 or fp8."""
        random = torch.Generator(device).manual_seed(seed)
        shape = count, self.heads * self.size
        if self.fed not in {"int8", "fp8"}:
            return torch.randn(shape, device=device, generator=random).to(_FED[self.fed]), None
        if self.fed == "fp8":
            x = (100 * torch.randn(shape, device=device, generator=random)).clamp_(-448, 448).to(torch.float8_e4m3fn)
            return x, torch.rand((count, 1), device=device, generator=random) / 100
        x = torch.randint(-127, 128, shape, device=device, generator=random, dtype=torch.int8)
        return x, torch.rand((count, 1), device=device, generator=random) / 127


def products_of(program: Program) -> tuple[Product, ...]:
    """The products that a tape of ``program`` launches, each shape once: linear layers that read the same rows are one."""
    found: dict[str, Product] = {}
    for unit in units_of(program):
        match unit.parts:
            case (ops.Linear() as first, *_):
                shapes = [program.params[op.weight] for op in unit.parts if isinstance(op, ops.Linear)]
                heads, out, size = 1, sum(shape[-2] for shape in shapes), shapes[0][-1]
            case (ops.HeadLinear() as first,):
                heads, out, size = program.params[first.weight]
            case _:
                continue
        fed = FEEDS[DTYPES[program.values[first.x].dtype]]
        form = LinearFormat.parse(fed if first.weight_format == "dense" else first.weight_format)
        one = Product(form, fed, out, size, DTYPES[program.values[first.y].dtype], heads)
        found.setdefault(one.name, one)
    return tuple(found.values())


def _two_of_four(shape: tuple[int, ...], random: torch.Generator, device: torch.device) -> Tensor:
    """Whether a number is kept: of any four along the last axis the two that are drawn."""
    drawn = torch.rand((*shape[:-1], -(-shape[-1] // 4), 4), device=device, generator=random)
    kept = torch.zeros_like(drawn, dtype=torch.bool).scatter_(-1, drawn.topk(2, dim=-1).indices, True)
    return kept.flatten(-2)[..., : shape[-1]]
