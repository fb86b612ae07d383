"""Round-to-nearest: every weight for itself."""

import torch
from torch import Tensor

from hasten.compress.grid import Clip, Grid
from hasten.formats.linear import LinearFormat, QuantizedLinear


def round_to_nearest(weight: Tensor, form: LinearFormat, *, clip: Clip = "none", moments: Tensor | None = None) -> QuantizedLinear:
    """``weight`` [out, in] rounded to nearest, half to even, in its own dtype, on the grid that ``clip`` chooses (see Grid.fit)."""
    inputs = torch.arange(weight.shape[1])
    grid = Grid.fit(weight, form, clip=clip, moments=moments)
    return grid.quantized(grid.codes(weight, inputs))
