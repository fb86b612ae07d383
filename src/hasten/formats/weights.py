"""A named weight: its shape and format are known at once, its numbers are mapped or made only when asked for."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UnsupportedError

Array = NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes a dense weight may have, by the name used in Spec and in `--dtype`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """One weight. ``format`` is 'dense' for plain numbers of ``dtype``; other formats name how ``load`` must be read.

    ``load`` returns an array of ``shape``; it is cheap for mapped weights (a view of the file) and may compute for derived ones."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]
    format: str = "dense"

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return self.size * self.dtype.itemsize


class Weights(Mapping[str, Weight]):
    """Weights by canonical name, in the order the model uses them."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = dict(weights)

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def array(self, name: str) -> Array:
        """The numbers of ``name``."""
        return self._weights[name].load()

    @property
    def parameters(self) -> int:
        """Number of elements over all weights."""
        return sum(weight.size for weight in self.values())

    @property
    def nbytes(self) -> int:
        """Stored bytes over all weights."""
        return sum(weight.nbytes for weight in self.values())


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name of a dense dtype. Raises UnsupportedError for one a weight cannot have."""
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise UnsupportedError(f"weights of dtype {dtype} are not supported; accepted are {', '.join(DTYPES)}")
