"""What a user asks a session to store and feed, and what that makes of each linear layer of a Program."""

import dataclasses

from hasten.base.errors import UnsupportedError, one_line
from hasten.formats.linear import LinearFormat
from hasten.program import ops
from hasten.program.lower import LinearFormats
from hasten.program.program import Program

HEAD, BF16 = LinearFormat("int8"), LinearFormat("bf16")


@dataclasses.dataclass(frozen=True, slots=True)
class Formats:
    """By name, None for the backend's own: ``weights`` as in hasten.formats.linear, ``activations`` (bf16 or int8) and ``cache`` (the
    format of keys and values)."""

    weights: str | None = None
    activations: str | None = None
    cache: str | None = None


def linear_formats(program: Program, formats: Formats) -> LinearFormats:
    """Every linear layer as ``formats`` asks, experts too; the head in int8 where that is narrower, routers in no less than bf16, the
    embedding as it is. Nothing asked for leaves all as they come.

    Raises UnsupportedError for weights nobody has, or activations they are not multiplied with."""
    if formats.weights is None and formats.activations is None:
        return LinearFormats()
    form = LinearFormat.parse(formats.weights or "bf16")
    activations = formats.activations or form.activations[0]
    if activations not in form.activations:
        raise UnsupportedError(
            f"activations {one_line(activations)} do not go with weights in {form}; accepted are {', '.join(form.activations)}"
        )
    routers: set[str] = {op.logits for op in program.ops if isinstance(op, ops.Route)}
    stored, fed = {}, {}
    for op in program.ops:
        if isinstance(op, ops.Linear | ops.ExpertLinear):
            its = HEAD if op.y == "logits" and form.bits < HEAD.bits else BF16 if op.y in routers and form.bits < BF16.bits else form
            stored[op.weight] = "dense" if its == BF16 else str(its)
            fed[op.weight] = activations if activations in its.activations else its.activations[0]
    return LinearFormats(
        {name: its for name, its in stored.items() if its != "dense"}, {name: each for name, each in fed.items() if each != "f32"}
    )
