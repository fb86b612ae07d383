"""What readers of quantized checkpoints ask of their tensors: the parts of a weight, each of the dtype and shape it must have."""

from collections.abc import Mapping
from typing import NoReturn

import ml_dtypes
import numpy as np

from hasten.base.errors import CheckpointError, one_line
from hasten.formats.linear import Floats
from hasten.formats.weights import Array, Weight

SCALES = ("float32", "float16", "bfloat16")
IN_LIMIT = 1 << 24
"""Most inputs or outputs of one quantized weight."""


class Parts:
    """The tensors of one quantized weight, by the end of their names. Errors name ``name`` and the tensor."""

    def __init__(self, name: str, tensors: Mapping[str, Weight]) -> None:
        self.name, self._tensors = name, tensors

    def __contains__(self, part: str) -> bool:
        return part in self._tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def shape(self, part: str, *dtypes: str) -> tuple[int, ...]:
        """The shape of a part, which must be there and of one of ``dtypes``."""
        if part not in self._tensors:
            raise CheckpointError(f"tensor {self.name}.{part} is missing, which the quantized weight needs; download the checkpoint again")
        tensor = self._tensors[part]
        if tensor.dtype.name not in dtypes:
            raise CheckpointError(f"tensor {self.name}.{part} has dtype {tensor.dtype}; accepted: {', '.join(dtypes)}")
        return tensor.shape

    def must_be(self, part: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Refuse another shape or dtype."""
        if (found := self.shape(part, *dtypes)) != shape:
            self.wrong(part, f"has shape {list(found)}", f"{list(shape)}, as the other tensors and the config say")

    def wrong(self, part: str, what: str, accepted: str) -> NoReturn:
        """Raise CheckpointError about a part."""
        raise CheckpointError(f"tensor {self.name}.{part} {what}; needed: {accepted}")

    def load(self, part: str) -> Array:
        """The numbers of a part."""
        return self._tensors[part].load()

    def scales(self, part: str) -> Floats:
        """The numbers of a part that holds scales, float32. Raises CheckpointError where one is no positive finite number."""
        scales = self.load(part).astype(np.float32)
        if scales.size and not (float(scales.min()) > 0 and float(scales.max()) < np.inf):
            bad = scales[~((scales > 0) & (scales < np.inf))].flat[0]
            self.wrong(part, f"has a scale of {bad}", "positive finite numbers; the file is damaged, download it again")
        return scales


def gathered(tensors: Mapping[str, Weight], ends: tuple[str, ...], needs: tuple[str, ...]) -> tuple[dict[str, Parts], dict[str, Weight]]:
    """By module: its tensors whose names end in one of ``ends``, where one of ``needs`` is there; and all other tensors."""
    modules: dict[str, dict[str, Weight]] = {}
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        if end in ends:
            modules.setdefault(module, {})[end] = tensor
    found = {name: Parts(name, parts) for name, parts in modules.items() if any(part in parts for part in needs)}
    taken = {f"{name}.{part}" for name in found for part in modules[name]}
    return found, {name: tensor for name, tensor in tensors.items() if name not in taken}


def checked_size(name: str, what: str, size: int) -> int:
    """A number of inputs or outputs that a weight may have."""
    if not 1 <= size <= IN_LIMIT:
        raise CheckpointError(f"{name} has {one_line(size)} {what}; accepted: 1 to {IN_LIMIT}")
    return size


F8 = ml_dtypes.float8_e4m3fn.__name__
