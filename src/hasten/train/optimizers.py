"""Muon for matrices of linear layers, AdamW (torch's) for the rest, and their state as plain tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hasten.base.errors import CheckpointError
from hasten.train.muon import Muon
from hasten.train.parameters import Parameters


class Optimizers:
    """Steps masters by their gradients, at a learning rate of ``rate`` at most. ``decay`` is the weight decay of matrices.

    With ``muon`` False all are AdamW's."""

    def __init__(self, parameters: Parameters, *, rate: float, decay: float, muon: bool = True) -> None:
        masters = parameters.masters
        by_muon = sorted(parameters.matrices) if muon else []
        plain = sorted(masters.keys() - set(by_muon))
        matrices = [name for name in plain if name in parameters.matrices]
        others = [name for name in plain if name not in parameters.matrices]
        self._names = {"muon": by_muon, "adamw": [*matrices, *others]}
        groups = [{"params": [masters[name] for name in names], "weight_decay": each} for names, each in ((matrices, decay), (others, 0.0))]
        self._made: dict[str, torch.optim.Optimizer] = {"adamw": torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))}
        if by_muon:
            self._made["muon"] = Muon([masters[name] for name in by_muon], lr=rate, weight_decay=decay)
        self._rate = rate

    def step(self, share: float) -> None:
        """By the gradients that the masters have, at ``share`` of the learning rate; then the gradients are gone."""
        for made in self._made.values():
            for group in made.param_groups:
                group["lr"] = self._rate * share
            made.step()
            made.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Everything to go on with, by name."""
        made: dict[str, Tensor] = {}
        for kind, optimizer in self._made.items():
            for index, entries in optimizer.state_dict()["state"].items():
                made |= {f"{kind}:{key}:{self._names[kind][index]}": torch.as_tensor(value) for key, value in entries.items()}
        return made

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what ``state`` gave. Raises CheckpointError for that of other masters."""
        for kind, optimizer in self._made.items():
            places = {name: index for index, name in enumerate(self._names[kind])}
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                of, what, name = key.split(":", 2)
                if of == kind:
                    if name not in places:
                        raise CheckpointError(f"the state of {name} is kept and it is not learned; begin anew")
                    entries.setdefault(places[name], {})[what] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
