"""Who teaches: a model as the native backend plays it, or torch where that has no kernels for it."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hasten.backends.cpu import CpuBackend, CpuSession
from hasten.backends.reference import ReferenceBackend, ReferenceSession
from hasten.compress.students import weights_digest
from hasten.engine.backends import fed_otherwise
from hasten.model import Model
from hasten.program import Batch, Formats, Precision, RecurrentGroup
from hasten.train import Teacher

SHORTEST = 512
"""Tokens that a session is opened for at the least, so that many short sequences find pages at once."""


def teacher_of(
    model: Model, context: int, threads: int, precision: Literal["float32", "bfloat16"], weights: str | None = None
) -> Teacher:  # fmt: skip
    """``model`` as it is stored, or with its linear ``weights`` rounded to a format, for sequences of up to ``context`` tokens, on
    ``threads`` threads; ``precision`` is what torch computes it in where the native backend does not play it.

    What plays a training's teacher never depends on what is free, so that one that was killed goes on."""
    opened = max(context, min(SHORTEST, model.spec.context))
    native = CpuBackend(threads)
    torchs = ReferenceBackend(precision=Precision("float32", precision, "float32"))
    backend = torchs if native.refusals(model) or fed_otherwise(model) else native
    session = backend.session(model, opened, Formats(weights=weights))
    session.settle()  # minutes become steps by the time that steps take
    return Teacher(lambda batch: scored(session, batch), f"{weights_digest(model)} on {backend.name}\n{session.program.text()}")


def scored(session: CpuSession | ReferenceSession, batch: Batch) -> NDArray[np.float32]:
    """Logits float32 [T, vocabulary] of every token of whole sequences, as many at once as the session has pages for."""
    made = [session.score(part) for part in parts_of(session, batch)]
    return made[0] if len(made) == 1 else np.concatenate(made)


def parts_of(session: CpuSession | ReferenceSession, batch: Batch) -> Iterator[Batch]:
    """The batch in parts, in order, of one sequence at the least."""
    together: list[list[int]] = []
    taken = {group.name: 0 for group in session.program.states}
    for begin, end in zip(batch.offsets, batch.offsets[1:]):
        needed = {
            group.name: 1 if isinstance(group, RecurrentGroup) else -(-int(end - begin) // session.page) for group in session.program.states
        }
        if together and any(taken[name] + needed[name] > session.pages[name] for name in needed):
            yield Batch.of(together)
            together, taken = [], dict.fromkeys(needed, 0)
        together.append(batch.tokens[begin:end].tolist())
        taken = {name: taken[name] + needed[name] for name in needed}
    yield Batch.of(together)
