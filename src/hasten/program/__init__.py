"""Program: what a Spec lowers to, op by op."""

from hasten.program.batch import Batch, token_array
from hasten.program.draws import Drawer, Drawn, HostLogits, Logits, Wanted
from hasten.program.formats import Formats, linear_formats
from hasten.program.fuse import fuse, parts_of, unfuse
from hasten.program.fused import Fused, Products, RowChain
from hasten.program.hidden import hidden_states
from hasten.program.lower import LinearFormats, Precision, lower
from hasten.program.ops import OPS, Contract, In, Op, Out, Param, StateRef
from hasten.program.pages import CopyPage, Move, PageLists, StateLostError, SwapIn, SwapOut, first_pages, page_counts
from hasten.program.program import KvGroup, LatentGroup, Layer, Program, RecurrentGroup, StateGroup, Value, most_seen, oldest_visible
from hasten.program.rotary import lowering_contexts

__all__ = [
    "OPS", "Batch", "Contract", "CopyPage", "Drawer", "Drawn", "Formats", "Fused", "HostLogits", "In", "KvGroup", "LatentGroup",
    "Layer", "LinearFormats", "Logits", "Move", "Op", "Out", "PageLists", "Param", "Precision", "Products", "Program",
    "RecurrentGroup", "RowChain", "StateGroup", "StateLostError", "StateRef", "SwapIn", "SwapOut", "Value", "Wanted", "first_pages",
    "fuse", "hidden_states", "linear_formats", "lower", "lowering_contexts", "most_seen", "oldest_visible", "page_counts", "parts_of",
    "token_array", "unfuse",
]  # fmt: skip
