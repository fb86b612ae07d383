"""How rows of activations lie where packed weights read them."""

from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat
from hasten.program import ops

TILE = 256  # inputs that a row is padded to: the deepest tile of any weight format
ELEMENT_BYTES = {"f32": 4, "bf16": 2, "int8": 1}  # of what a product reads


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


def feed_of(op: ops.Linear | ops.ExpertLinear) -> str:
    """What the product reads: int8 where the Program says so, else what the weight's format is multiplied with.

    Raises UnsupportedError where the Program feeds int8 to weights that are not multiplied with it."""
    accepted = format_of(op).activations
    if op.scale is None:
        return next(each for each in accepted if each != "int8")
    if "int8" not in accepted:
        raise UnsupportedError(
            f"{op.weight}: weights in {op.weight_format} are not multiplied with int8; accepted are {', '.join(accepted)}"
        )
    return "int8"
