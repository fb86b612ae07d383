"""Who teaches and learns nothing: played by whatever plays it fastest, outside the Program that is differentiated."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.program import Batch


@dataclasses.dataclass(frozen=True, slots=True)
class Teacher:
    """``score`` gives logits float32 [R, vocabulary] of a batch's rows, as a backend's session does; ``key`` is one string for the model
    and for what plays it."""

    score: Callable[[Batch], NDArray[np.float32]]
    key: str

    def logits(self, batch: Batch) -> Tensor:
        """Of the batch's rows, [R, vocabulary]."""
        return torch.from_numpy(self.score(batch))
