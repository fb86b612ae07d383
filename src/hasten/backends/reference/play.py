"""Playing a Program in torch: ops in order, values freed after their last use."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hasten.backends.reference.kernels import compute, stored_name
from hasten.backends.reference.state import State
from hasten.backends.reference.step import Adapter, Step
from hasten.base.errors import ConfigError
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Array, Weights
from hasten.program import Batch, Program, ops, parts_of


def play(
    program: Program,
    weights: Mapping[str, Tensor],
    batch: Batch,
    state: State | None = None,
    *,
    given: Mapping[str, Tensor] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> tuple[dict[str, Tensor], State]:
    """The program's outputs by name, and the state after this batch.

    ``weights`` holds a tensor per entry of ``program.params``. With ``state`` None nothing is carried in or out (training, scoring);
    a fresh ``State(S)`` starts S sequences. ``given`` supplies the program's inputs, those of a cut; ``adapters`` names linear slots
    that get a low-rank addition. Differentiable in weights, adapters, given and state. Raises ConfigError for token ids or positions
    outside the tables."""
    device = next((tensor.device for tensor in (*weights.values(), *(given or {}).values())), torch.device("cpu"))
    _check_ids(program, batch)
    _check_names(program, given or {}, adapters or {})
    if state is not None:
        state.check(batch)
    step = Step(program, batch, weights, state, adapters or {}, device)
    values: dict[str, Tensor] = dict(given or {})
    last_use = {name: index for index, op in enumerate(program.ops) for name in op.inputs}
    for index, op in enumerate(program.ops):
        made = compute(op, step, *(values[name] for name in op.inputs))
        for name in op.inputs:
            if last_use[name] == index and name not in program.outputs:
                values.pop(name, None)
        values.update(zip(op.outputs, made, strict=True))
    return {name: values[name] for name in program.outputs}, step.new_state()


def weights_of(program: Program, weights: Weights, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The program's weights as tensors, mapped without a copy where dtype, device and layout allow. Floats become ``dtype`` where given.

    A linear weight that the program has in another format is there a second time, as what the format makes of it (``stored_name``); one
    that is stored in that format already, as it is."""
    tensors = {}
    stored: dict[str, str] = {
        op.weight: op.weight_format for op in program.ops if isinstance(op, ops.Linear | ops.HeadLinear | ops.ExpertLinear)
    }
    for name, array in weights.arrays(program.params):
        tensor = as_tensor(array).to(device).contiguous()  # rounding must not depend on how a checkpoint lays a weight out
        tensors[str(name)] = tensor if dtype is None else tensor.to(dtype)
        if (form := stored.get(name, "dense")) != "dense":
            weight = weights[name]
            if isinstance(weight, QuantizedWeight) and str(weight.form) == form:  # array is what it means
                tensors[stored_name(name, form)] = tensors[name]
                continue
            meant = as_tensor(LinearFormat.parse(form).quantize(array).dense()).to(device)
            tensors[stored_name(name, form)] = meant if dtype is None else meant.to(dtype)
    return tensors


def as_tensor(array: Array) -> Tensor:
    """A numpy array, bfloat16 included, as a tensor over the same memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _check_names(program: Program, given: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> None:
    if set(given) != set(program.inputs):
        raise ConfigError(f"the program's inputs are {list(program.inputs)}, given are {sorted(given)}; give exactly those")
    slots = {part.adapter for op in program.ops for part in parts_of(op) if isinstance(part, ops.Linear)}
    if unknown := adapters.keys() - slots:
        raise ConfigError(f"no linear layer has the adapter slot {sorted(unknown)[0]!r}; see the program's text for slots")


def _check_ids(program: Program, batch: Batch) -> None:
    for op in (part for whole in program.ops for part in parts_of(whole)):
        if isinstance(op, ops.Embed):
            vocab = program.params[op.weight][0]
            if batch.tokens.size and int(batch.tokens.max()) >= vocab:
                raise ConfigError(f"token id {int(batch.tokens.max())} is outside the vocabulary; accepted are 0 to {vocab - 1}")
        if isinstance(op, ops.EmbedPositions):
            count = program.params[op.weight][0] - op.offset
            if batch.positions.size and int(batch.positions.max()) >= count:
                raise ConfigError(f"position {int(batch.positions.max())} has no learned vector; accepted are 0 to {count - 1}")
    if batch.positions.size and int(batch.positions.max()) >= program.context:
        raise ConfigError(f"position {int(batch.positions.max())} is beyond the context of {program.context} tokens; shorten the input")
