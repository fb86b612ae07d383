"""What a user asks a session to store and feed, and what that makes of each linear layer of a Program."""

import dataclasses

from hasten.base.errors import UnsupportedError, one_line
from hasten.formats.linear import NUMBERS, LinearFormat
from hasten.program import ops
from hasten.program.lower import LinearFormats
from hasten.program.program import Program

HEAD = LinearFormat("int8")


@dataclasses.dataclass(frozen=True, slots=True)
class Formats:
    """By name, None for the backend's own: ``weights`` as in hasten.formats.linear, ``activations`` (bf16 or int8) and ``cache`` (the
    format of keys and values)."""

    weights: str | None = None
    activations: str | None = None
    cache: str | None = None


def linear_formats(program: Program, formats: Formats) -> LinearFormats:
    """Every linear layer as ``formats`` asks, experts too; the head in int8 where that is narrower, embedding and routers as they are.

    Raises UnsupportedError for weights nobody has, or activations they are not multiplied with."""
    form = LinearFormat.parse(formats.weights or "bf16")
    activations = formats.activations or form.activations[0]
    if activations not in form.activations:
        raise UnsupportedError(
            f"activations {one_line(activations)} do not go with weights in {form}; accepted are {', '.join(form.activations)}"
        )
    if str(form) == "bf16":
        return LinearFormats()
    routers: set[str] = {op.logits for op in program.ops if isinstance(op, ops.Route)}
    linear = [op for op in program.ops if isinstance(op, ops.Linear | ops.ExpertLinear) and op.y not in routers]
    head = HEAD if NUMBERS[form.number][0] < NUMBERS[HEAD.number][0] else form
    return LinearFormats(
        weights={op.weight: str(head if op.y == "logits" else form) for op in linear},
        activations={op.weight: "int8" for op in linear if activations == "int8"},
    )
