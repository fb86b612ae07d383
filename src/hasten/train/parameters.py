"""What is learned: float32 masters, and the weights a Program is played with as a function of them.

Whatever ties, masks, rounds or factors weights while they are learned is one more such function, of its own type."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.formats.weights import Array, Weights
from hasten.program import Program, ops, parts_of


class Parameters(Protocol):
    """``masters`` are leaves, float32, by name; ``matrices`` names those that are matrices of linear layers."""

    @property
    def masters(self) -> Mapping[str, Tensor]: ...

    @property
    def matrices(self) -> frozenset[str]: ...

    def weights(self) -> Mapping[str, Tensor]:
        """A tensor for each weight of the Program, differentiable in the masters."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """The masters are the weights; those in ``fixed`` are not learned."""

    masters: Mapping[str, Tensor]
    matrices: frozenset[str]
    fixed: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, weights: Mapping[str, Array] | Weights, fixed: Iterable[str] = ()) -> "Plain":
        """Those of ``program`` as ``weights`` has them, in memory of torch's own. Raises ConfigError for a fixed name that is none."""
        still = frozenset(fixed)
        if unknown := sorted(still - program.params.keys()):
            raise ConfigError(f"{unknown[0]} is no weight of the model, so it cannot be left as it is")
        arrays = weights.arrays(program.params) if isinstance(weights, Weights) else weights.items()
        made = {name: torch.tensor(np.asarray(array, np.float32)) for name, array in arrays}
        learned = {name: tensor.requires_grad_() for name, tensor in made.items() if name not in still}
        return cls(learned, linear_weights(program) & learned.keys(), {name: made[name] for name in still})

    def weights(self) -> Mapping[str, Tensor]:
        """The masters and what is fixed."""
        return {**self.masters, **self.fixed}


@dataclasses.dataclass(frozen=True, slots=True)
class Masked:
    """Weights of ``inner`` that stay 0 wherever ``keep`` (bool, of a weight's shape, by name) is False."""

    inner: Parameters
    keep: Mapping[str, Tensor]

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Those of ``inner``."""
        return self.inner.masters

    @property
    def matrices(self) -> frozenset[str]:
        """Those of ``inner``."""
        return self.inner.matrices

    def weights(self) -> Mapping[str, Tensor]:
        """Those of ``inner``, masked."""
        made = dict(self.inner.weights())
        for name, keep in self.keep.items():
            made[name] = made[name] * keep
        return made


def linear_weights(program: Program) -> frozenset[str]:
    """Names of the matrices of linear layers, experts' among them; not those that tokens are looked up in."""
    parts = [part for op in program.ops for part in parts_of(op)]
    found = {part.weight for part in parts if isinstance(part, ops.Linear | ops.HeadLinear | ops.ExpertLinear)}
    return frozenset(found - {part.weight for part in parts if isinstance(part, ops.Embed)})


def untrained(program: Program, seed: int) -> dict[str, Array]:
    """Weights to begin with where there are none: matrices normal with variance 1/inputs, tables with 0.02², norms 1, biases 0; what
    writes to the residual stream is smaller by √(2 · blocks) (Radford et al. 2019)."""
    random = np.random.default_rng(seed)
    blocks = sum(layer.label.startswith("blocks.") for layer in program.layers)
    linear = linear_weights(program)
    made: dict[str, Array] = {}
    for name, shape in program.params.items():
        if len(shape) < 2:
            made[name] = np.zeros(shape, np.float32) if name.endswith("bias") else np.ones(shape, np.float32)
            continue
        deviation = 1 / math.sqrt(shape[-1]) if name in linear else 0.02
        if name.endswith((".o.weight", ".down.weight")):
            deviation /= math.sqrt(2 * max(1, blocks))
        made[name] = random.standard_normal(shape, np.float32) * np.float32(deviation)
    return made
