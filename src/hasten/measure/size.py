"""Bytes of a model as it is stored."""

import dataclasses

from hasten.measure.cost import linear_weights
from hasten.model import Model
from hasten.program import lower


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """``bytes`` of all weights, ``linear_bytes`` of the ``linear_weights`` numbers of linear layers (head and routers left out), scales and
    zero points counted."""

    bytes: int
    linear_bytes: int
    linear_weights: int

    @property
    def bits_per_linear_weight(self) -> float | None:
        """Stored bits of a number of a linear layer, None where there is none."""
        return 8 * self.linear_bytes / self.linear_weights if self.linear_weights else None

    @classmethod
    def of(cls, model: Model) -> "Size":
        """Of ``model``, of which nothing is loaded."""
        linear = [model.weights[name] for name in linear_weights(lower(model.spec))]
        return cls(model.weights.nbytes, sum(each.nbytes for each in linear), sum(each.size for each in linear))
