"""Attention with linear biases: the slopes, as every published model spaces them."""


def alibi_slopes(heads: int, steepest: float = 8.0) -> tuple[float, ...]:
    """One slope a head (Press et al. 2021): 2^(-steepest · i / heads) for i = 1 … heads, where ``heads`` is a power of two.

    Any other count takes from the next power's slopes first every second one, then the first few of those left out."""
    power = 1 << (heads - 1).bit_length()
    slopes = [2.0 ** (-steepest * i / power) for i in range(1, power + 1)]
    return tuple(slopes) if power == heads else tuple([*slopes[1::2], *slopes[::2]][:heads])
