"""Which kernel each op gets on this machine, and why not a better one."""

import dataclasses
from collections.abc import Mapping

from hasten import _native
from hasten.formats.cache import CACHE_FORMATS
from hasten.formats.linear import NUMBERS

_PLAIN = ("generic",)
_VECTOR = ("generic", "avx2", "avx512")
_TILES = (*_VECTOR, "amx")

LEVELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Embed": {"bf16": _PLAIN},
    "EmbedPositions": {"float32": _PLAIN},
    "RmsNorm": {"float32": _VECTOR},
    "LayerNorm": {"float32": _VECTOR},
    "QuantizeRows": {"int8": _VECTOR},
    "QuantizeFixed": {"int8": _VECTOR},
    "Cast": {"bf16": _VECTOR, "float32": _PLAIN},
    "Linear": {form: _VECTOR if form in {"f32", "f16"} else _TILES for form in NUMBERS},
    "HeadLinear": {"bf16": _TILES},
    "ExpertLinear": {form: _VECTOR if form in {"f32", "f16"} else _TILES for form in NUMBERS},
    "Route": {"float32": _PLAIN},
    "Combine": {"float32": _PLAIN},
    "Rotate": {"float32": _VECTOR},
    "AppendKv": dict.fromkeys(CACHE_FORMATS, _PLAIN),
    "Attend": dict.fromkeys(CACHE_FORMATS, _TILES),
    "Add": {"float32": _VECTOR},
    "Scale": {"float32": _VECTOR},
    "Clip": {"float32": _VECTOR},
    "SoftCap": {"float32": _VECTOR},
    "Activate": {"float32": _VECTOR},
    "Gate": {"float32": _VECTOR},
    "Split": {"float32": _PLAIN},
    "HeadSplit": {"float32": _PLAIN},
    "Concat": {"float32": _PLAIN},
    "SelectRows": {"float32": _PLAIN},
    "CausalConv": {"float32": _VECTOR},
    "SelectiveScan": {"float32": _VECTOR},
    "DualScan": {"float32": _VECTOR},
    "GatedDeltaScan": {"float32": _VECTOR},
    "LinearScan": {"float32": _VECTOR},
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
