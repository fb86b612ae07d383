"""Which kernel each op gets on this machine, and why not a better one."""

import dataclasses
from collections.abc import Mapping

from hasten import _native

_PLAIN = ("generic",)
_VECTOR = ("generic", "avx2", "avx512")
_TILES = (*_VECTOR, "amx")

LEVELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Embed": {"bf16": _PLAIN},
    "RmsNorm": {"float32": _VECTOR},
    "QuantizeRows": {"int8": _VECTOR},
    "Linear": {"bf16": _TILES, "int8": _TILES, "int4": _TILES},
    "Rotate": {"float32": _VECTOR},
    "AppendKv": {"bf16": _PLAIN},
    "Attend": {"bf16": _TILES},
    "Add": {"float32": _VECTOR},
    "Gate": {"float32": _VECTOR},
    "SelectRows": {"float32": _PLAIN},
}
"""Per op and format (of weights, cache or rows), the levels that have a kernel of their own, worst first; others take the next lower."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """What ``op`` gets for ``format``: a kernel of ``level``; for each better one that hasten has, best first, why it was refused."""

    op: str
    format: str
    level: str
    refused: Mapping[str, str]


def kernels(isa: str = "best") -> tuple[Kernel, ...]:
    """Every kernel at level ``isa``. Raises ValueError for one this machine lacks."""
    reasons = _native.isa_refusals()
    ladder = list(reasons)
    most = ladder.index(_native.isa_level(isa))
    found = []
    for op, formats in LEVELS.items():
        for form, having in formats.items():
            level = [each for each in having if ladder.index(each) <= most][-1]
            better = [each for each in reversed(having) if ladder.index(each) > most]
            found.append(Kernel(op, form, level, {each: reasons[each] or f"{isa} was asked for" for each in better}))
    return tuple(found)
