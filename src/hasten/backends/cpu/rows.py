"""How rows of activations lie where packed weights read them."""

GROUP = 128  # k per int4 scale, and of the widest tile


def padded_width(width: int) -> int:
    """The row length every packed weight can read: whole tiles of the widest kind."""
    return -(-width // GROUP) * GROUP


def row_stride(width: int, element: int) -> int:
    """Elements from one row to the next: an odd number of cache lines, so that the 16 rows of a tile do not fall into one cache set."""
    lines = padded_width(width) * element // 64
    return (lines + 1 - lines % 2) * 64 // element
