"""Which weights of a Program may be rounded, what each of them reads, and what stands before it that a scale can be moved into."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence

from hasten.base.errors import ConfigError, one_line
from hasten.program import Op, Program, ops
from hasten.spec import ClampedSwiglu

ROWS = (ops.Linear, ops.ExpertLinear)


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """One linear weight: [out, in], or with ``experts``, the value that names each token's experts, [experts, out, in]. It reads ``x``."""

    weight: str
    x: str
    experts: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class NormBefore:
    """The norm whose output is read; it multiplies by ``offset`` + weight."""

    weight: str
    bias: str | None
    offset: float


@dataclasses.dataclass(frozen=True, slots=True)
class RowsBefore:
    """The linear layer whose rows are read; ``sources`` names the row that each input comes from."""

    weight: str
    bias: str | None
    sources: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ScaleGroup:
    """All that reads the value ``x``, every one a linear weight, and what makes it. ``sites`` are those of ``readers`` to be rounded."""

    x: str
    readers: tuple[str, ...]
    sites: tuple[Site, ...]
    before: NormBefore | RowsBefore


@dataclasses.dataclass(frozen=True, slots=True)
class Layers:
    """Globs over weight names, as ``blocks.*.mixer.*``: what is meant by ``only`` and not by ``skip``. Routers are never rounded."""

    only: tuple[str, ...] = ("blocks.*",)
    skip: tuple[str, ...] = ()

    def __contains__(self, weight: str) -> bool:
        name = weight.removesuffix(".weight")
        return self._any(name, self.only) and not self._any(name, self.skip)

    @staticmethod
    def _any(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob.removesuffix(".weight")) for glob in globs)

    def check(self, program: Program) -> None:
        """Raise ConfigError for a glob that means no weight of ``program``, which would silently do nothing."""
        names = [site.weight for site in sites_of(program, Layers())]
        for glob in (*self.only, *self.skip):
            if not any(self._any(name.removesuffix(".weight"), [glob]) for name in names):
                raise ConfigError(f"layers {one_line(glob)} mean no weight of this model; it has {', '.join(names[:8])} …")
        if not any(name in self for name in names):
            raise ConfigError("every layer is skipped, so nothing would be done; leave some")


def sites_of(program: Program, layers: Layers) -> tuple[Site, ...]:
    """The weights of ``program`` that ``layers`` means, in the order they are used; routers left out."""
    routers: set[str] = {op.logits for op in program.ops if isinstance(op, ops.Route)}
    found: dict[str, Site] = {}
    for op in program.ops:
        if isinstance(op, ROWS) and op.weight in layers and op.y not in routers:
            found.setdefault(op.weight, Site(op.weight, op.x, op.experts if isinstance(op, ops.ExpertLinear) else None))
    return tuple(found.values())


def scale_groups(program: Program, layers: Layers) -> tuple[ScaleGroup, ...]:
    """Where scales can move, in the order of the values read, and at least one reader is a site."""
    sites = {site.weight: site for site in sites_of(program, layers)}
    groups = []
    for x in dict.fromkeys(site.x for site in sites.values()):
        readers = [op for op in program.ops if x in op.inputs]
        before = _before(program, x)
        if before is not None and x not in program.outputs and all(isinstance(op, ROWS) and op.x == x for op in readers):
            names = tuple(op.weight for op in readers if isinstance(op, ROWS))
            groups.append(ScaleGroup(x, names, tuple(sites[name] for name in names if name in sites), before))
    return tuple(groups)


def _before(program: Program, x: str) -> NormBefore | RowsBefore | None:
    maker = _maker(program, x)
    match maker:
        case ops.RmsNorm() if program.params[maker.weight][0] == program.values[x].features[-1]:
            return NormBefore(maker.weight, None, maker.offset)
        case ops.LayerNorm() if program.params[maker.weight][0] == program.values[x].features[-1]:
            return NormBefore(maker.weight, maker.bias, 0.0)
    return _rows(program, x, tuple(range(program.values[x].features[-1])))


def _rows(program: Program, x: str, sources: tuple[int, ...]) -> RowsBefore | None:
    """Back through what is linear in one of its inputs, to the product that made it; every value on the way is read by one op only."""
    maker = _maker(program, x)
    match maker:
        case ops.Linear() | ops.ExpertLinear():
            return RowsBefore(maker.weight, maker.bias, sources)
        case ops.Gate() if not isinstance(maker.activation, ClampedSwiglu) and maker.up != maker.gate:
            if program.values[maker.up].features == program.values[x].features and _read_once(program, maker.up):
                return _rows(program, maker.up, sources)
        case ops.Attend():
            written = [op for op in program.ops if isinstance(op, ops.AppendKv) and op.state == maker.state]
            readers = [op for op in program.ops if maker.state in op.state_refs and not isinstance(op, ops.AppendKv)]
            if len(written) == 1 and len(readers) == 1 and (v := written[0].v) is not None and _read_once(program, v):
                shared, dim = maker.heads // maker.kv_heads, maker.value_dim
                return _rows(program, v, tuple(source // dim // shared * dim + source % dim for source in sources))
    return None


def _maker(program: Program, x: str) -> Op | None:
    return next((op for op in program.ops if x in op.outputs), None)


def _read_once(program: Program, x: str) -> bool:
    return sum(x in op.inputs for op in program.ops) == 1 and x not in program.outputs


def by_value(sites: Sequence[Site]) -> Iterator[tuple[str, tuple[Site, ...]]]:
    """Values in the order they are read, with the sites that read them."""
    for x in dict.fromkeys(site.x for site in sites):
        yield x, tuple(site for site in sites if site.x == x)
