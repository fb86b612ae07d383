"""How rows of activations lie where packed weights read them."""

from hasten.formats.linear import LinearFormat
from hasten.program import ops

TILE = 256  # inputs that a row is padded to: the deepest tile of any weight format
FEEDS = {"float32": "f32", "bfloat16": "bf16", "int8": "int8"}  # how a product calls what it reads
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def padded_width(width: int) -> int:
    """The row length every packed weight can read: whole tiles of the widest kind."""
    return -(-width // TILE) * TILE


def row_stride(width: int, element: int) -> int:
    """Elements from one row to the next: an odd number of cache lines, so that the 16 rows of a tile do not fall into one cache set."""
    lines = padded_width(width) * element // 64
    return (lines + 1 - lines % 2) * 64 // element


def format_of(op: ops.Linear | ops.HeadLinear | ops.ExpertLinear) -> LinearFormat:
    """How the kernels store the weight."""
    return LinearFormat.parse("bf16" if op.weight_format == "dense" else op.weight_format)
