"""Several models in one training: their Programs joined to one, their parameters side by side, whoever of them learns."""

import dataclasses
from collections.abc import Mapping

import msgspec
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.program import In, Layer, Op, Out, Param, Program, StateRef, Value, ops
from hasten.train.parameters import Parameters


def joined(members: Mapping[str, Program]) -> Program:
    """One Program that plays all ``members`` on the same batch, one after the other; what NAME had as a value, weight or state is
    ``NAME.`` and that in it. Raises ConfigError for a member that was cut."""
    made: list[Op] = []
    layers: list[Layer] = []
    for name, program in members.items():
        if program.inputs:
            raise ConfigError(f"{name} takes inputs beside the batch, so it cannot be played beside others; join it before it is cut")
        start = len(made)
        made.extend(_named(op, f"{name}.") for op in program.ops)
        layers.extend(Layer(f"{name}.{layer.label}", layer.start + start, layer.stop + start) for layer in program.layers)
    return Program(
        ops=tuple(made), layers=tuple(layers), inputs=(), context=min(program.context for program in members.values()),
        values={f"{name}.{value}": kind for name, program in members.items() for value, kind in program.values.items()},
        params={f"{name}.{param}": shape for name, program in members.items() for param, shape in program.params.items()},
        states=tuple(
            dataclasses.replace(group, name=f"{name}.{group.name}") for name, program in members.items() for group in program.states
        ),
        outputs=tuple(f"{name}.{output}" for name, program in members.items() for output in program.outputs),
    )  # fmt: skip


def projected(program: Program, projections: Mapping[str, tuple[str, int]]) -> Program:
    """``program`` with values that are learned linear maps of others: by name, of which value and how many features. The weight of NAME
    is ``NAME.weight`` [features, value's features]. They are float32, and nothing in the program reads them."""
    made, values, params, layers = list(program.ops), dict(program.values), dict(program.params), list(program.layers)
    for name, (of, features) in projections.items():
        index = next((place for place, op in enumerate(made) if of in op.outputs), None)
        if index is None:
            raise ConfigError(f"there is no value {of} to project")
        width = values[of].features[-1]
        made.insert(index + 1, ops.Linear(x=In(of), weight=Param(f"{name}.weight"), y=Out(name), dtype="float32"))
        values[name], params[Param(f"{name}.weight")] = Value(values[of].rows, (features,), "float32"), (features, width)
        layers = [Layer(each.label, each.start + (each.start > index), each.stop + (each.stop > index)) for each in layers]
    return dataclasses.replace(program, ops=tuple(made), values=values, params=params, layers=tuple(layers))


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """Parameters of several side by side; what NAME of ``members`` has is ``NAME.`` and that here. Their gradient has one norm."""

    members: Mapping[str, Parameters]

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Those of all members."""
        return {f"{name}.{key}": master for name, member in self.members.items() for key, master in member.masters.items()}

    @property
    def matrices(self) -> frozenset[str]:
        """Those of all members."""
        return frozenset(f"{name}.{key}" for name, member in self.members.items() for key in member.matrices)

    def weights(self) -> Mapping[str, Tensor]:
        """Those of all members."""
        return {f"{name}.{key}": weight for name, member in self.members.items() for key, weight in member.weights().items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Beside:
    """Parameters of one Program in parts: ``inner``, and ``more`` that it takes beside them, as projections are."""

    inner: Parameters
    more: Parameters

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Those of both."""
        return {**self.inner.masters, **self.more.masters}

    @property
    def matrices(self) -> frozenset[str]:
        """Those of both."""
        return self.inner.matrices | self.more.matrices

    def weights(self) -> Mapping[str, Tensor]:
        """Those of both."""
        return {**self.inner.weights(), **self.more.weights()}


def of_member(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to member ``name``, under its own names."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _named(op: Op, prefix: str) -> Op:
    """The same op with values, weights and state under names that begin with ``prefix``."""
    renamed = op.renamed(lambda name: prefix + name).with_state(lambda ref: StateRef(prefix + ref.group, ref.slot))
    params = {name: prefix + value for name, role in op.roles.items() if role == "param" and (value := getattr(op, name)) is not None}
    return msgspec.structs.replace(renamed, **params)
