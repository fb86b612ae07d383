"""Each kernel of a GPU alone against its own limit: what a step of a model launches, all layers' launches of one size together."""

from collections.abc import Collection, Iterator

from hasten.checkpoint import random_model
from hasten.engine.backends import find_loaded
from hasten.measure.kernels import KernelTime, Setup
from hasten.measure.roofline import Slice
from hasten.program import Formats

FORMATS = (("bf16", "bf16"), ("int8", "int8"), ("int4", "int8"), ("int8", "bf16"), ("int4", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"))
"""Weights and activations that linear layers are measured in; all else in the first of them that has it."""


def device_kernel_names(shape: str) -> tuple[str, ...]:
    """The kernels that `device_kernels` can measure. Raises UnsupportedError for an unknown shape, and where there is no device."""
    model, names = random_model(shape), dict[str, None]()
    backend = find_loaded("cuda", model)
    backend.described()  # where there is none, that is what has to be said first
    for weights, activations in FORMATS:
        names |= dict.fromkeys(backend.op_names(model, Formats(weights, activations)))
    return tuple(names)


def device_kernels(setup: Setup, only: Collection[str]) -> Iterator[KernelTime]:
    """Every kernel among ``only`` of a model of ``setup``'s shape, whose weights are made and brought over once a format."""
    model, seen = random_model(setup.shape), set[object]()
    backend = find_loaded("cuda", model)
    context = max(*setup.rows, *setup.contexts)
    for weights, activations in FORMATS:
        formats = Formats(weights, activations)
        if not set(only) & {*backend.op_names(model, formats)}:
            continue
        session = backend.session(model, context, formats, 0)
        for found in backend.op_times(session, setup.rows, setup.contexts, lambda cost: cost.op in only and cost not in seen):
            its = found.cost
            seen.add(its)
            limit = Slice(*session.limits(its.arithmetic, found.distinct))
            us, least = found.seconds * 1e6, limit.seconds(its.bytes, its.operations)
            yield KernelTime(
                its.op, its.format, its.shape, its.rows, its.context, us, its.bytes, its.operations, its.bytes / us / 1e3,
                its.operations / us / 1e6, "read" if limit.seconds(its.bytes, 0) >= limit.seconds(0, its.operations) else "peak",
                least / found.seconds, session.isa, None,
            )  # fmt: skip
        del session  # before the next is opened
