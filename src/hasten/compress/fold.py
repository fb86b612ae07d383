"""Moving a scale from the inputs of linear layers into what makes them, so that the function stays as it was."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hasten.compress.sites import NormBefore, ScaleGroup


def fold(
    weights: Mapping[str, Tensor], group: ScaleGroup, scales: Tensor, norm_dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor]:
    """Of ``weights`` (float32, by name) those that change when the value ``group.x`` is divided by ``scales`` [in] where it is made, and
    multiplied back where it is read; and the scales as they came to be.

    A norm's weight is rounded to ``norm_dtype``, and the readers take the scale that it then stands for."""
    changed: dict[str, Tensor] = {}
    before = group.before
    if isinstance(before, NormBefore):
        norm = weights[before.weight] + before.offset
        divided = ((norm / scales - before.offset).to(norm_dtype)).float()
        stands_for = norm / (divided + before.offset)
        safe = torch.isfinite(stands_for) & (stands_for > 0)
        scales = torch.where(safe, stands_for, torch.ones_like(scales))
        changed[before.weight] = torch.where(safe, divided, weights[before.weight])
        if before.bias is not None:
            changed[before.bias] = weights[before.bias] / scales
    else:
        rows = torch.ones(weights[before.weight].shape[-2])
        rows[torch.tensor(before.sources)] = scales
        changed[before.weight] = weights[before.weight] / rows[:, None]
        if before.bias is not None:
            changed[before.bias] = weights[before.bias] / rows
    for name in group.readers:
        changed[name] = weights[name] * scales
    return changed, scales


def tie_of(group: ScaleGroup) -> Tensor | None:
    """For each input, the row it comes from, where several may come from one; None where each has its own."""
    if isinstance(group.before, NormBefore) or len(set(group.before.sources)) == len(group.before.sources):
        return None
    return torch.tensor(group.before.sources)
