"""A named weight: its shape and dtype are known at once, its numbers are mapped or made only when asked for."""

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
"""The dtypes a dense weight may have, by the name used in Spec."""


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """One weight: an array of ``shape`` in plain numbers of ``dtype``.

    ``load`` returns it; it is cheap for mapped weights (a view of the file) and may compute for derived ones."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was: whoever changes or replaces it changes one of these. ``path`` is absolute, without links."""

    path: str
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | os.PathLike[str], status: os.stat_result) -> "FileStamp":
        """The stamp of the file at ``path``, whose status is ``status``."""
        return cls(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)

    @property
    def holds(self) -> bool:
        """Whether the file is still the same."""
        try:
            return FileStamp.of(self.path, os.stat(self.path)) == self
        except OSError:
            return False


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where the numbers of all weights come from: equal origins, equal numbers. ``recipe`` says how they were made of the files."""

    recipe: str
    files: tuple[FileStamp, ...] = ()


class Weights(Mapping[str, Weight]):
    """Weights by canonical name, in the order the model uses them. Those that were transformed have no ``origin``."""

    def __init__(self, weights: Mapping[str, Weight], origin: Origin | None = None) -> None:
        self._weights, self.origin = dict(weights), origin

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def array(self, name: str) -> Array:
        """The numbers of ``name``."""
        return self._weights[name].load()

    def arrays(self, names: Iterable[str] | None = None, threads: int = 2) -> Iterator[tuple[str, Array]]:
        """Names (all unless given) with their numbers, in order, loaded by ``threads`` threads a little ahead of the reader."""
        waiting: deque[tuple[str, Future[Array]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for name in self if names is None else names:
                waiting.append((name, pool.submit(self._weights[name].load)))
                if len(waiting) > 2 * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()

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
