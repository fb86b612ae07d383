"""What a killed training goes on with: masters, the optimizers' state, the step, in one file that is replaced as a whole."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import UserError
from hasten.formats.safetensors import SafetensorsFile, layout_of, write
from hasten.train.optimizers import Optimizers

_MASTERS, _OPTIMIZERS = "master:", "optimizer:"


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """``step`` of ``steps`` are done, which took ``seconds`` so far."""

    step: int
    steps: int
    seconds: float


def keep(path: Path, key: str, progress: Progress, masters: Mapping[str, Tensor], optimizers: Optimizers) -> None:
    """Write all of it to ``path``. ``key`` is what it depends on."""
    named = {_MASTERS + name: tensor for name, tensor in masters.items()}
    named |= {_OPTIMIZERS + name: tensor for name, tensor in optimizers.state().items()}
    arrays = {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in named.items()}
    write(path, layout_of(arrays), arrays.__getitem__, {"key": key, "progress": json.dumps(dataclasses.asdict(progress))})


def take_up(path: Path, key: str, masters: Mapping[str, Tensor], optimizers: Optimizers) -> Progress | None:
    """What ``path`` holds, into masters and optimizers; None where there is none. Raises UserError for another training's."""
    if not path.is_file():
        return None
    file = SafetensorsFile.open(path)
    if file.metadata.get("key") != key:
        raise UserError(f"{path.parent} holds an unfinished training of another model, text or settings; remove it, or name another folder")
    with torch.no_grad():
        for name, tensor in masters.items():
            tensor.copy_(torch.from_numpy(np.array(file.read(_MASTERS + name))))
    names = [name for name in file.entries if name.startswith(_OPTIMIZERS)]
    optimizers.load({name.removeprefix(_OPTIMIZERS): torch.tensor(file.read(name)) for name in names})
    return Progress(**json.loads(file.metadata["progress"]))
