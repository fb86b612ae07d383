"""Program: what a Spec lowers to, op by op."""

from hasten.program.batch import Batch, token_array
from hasten.program.formats import Formats, linear_formats
from hasten.program.lower import LinearFormats, Precision, lower
from hasten.program.ops import OPS, Contract, In, Op, Out, Param, StateRef
from hasten.program.program import KvGroup, LatentGroup, Layer, Program, RecurrentGroup, StateGroup, Value, oldest_visible
from hasten.program.rotary import lowering_contexts

__all__ = [
    "OPS", "Batch", "Contract", "Formats", "In", "KvGroup", "LatentGroup", "Layer", "LinearFormats", "Op", "Out", "Param", "Precision",
    "Program", "RecurrentGroup", "StateGroup", "StateRef", "Value", "linear_formats", "lower", "lowering_contexts", "oldest_visible",
    "token_array",
]  # fmt: skip
