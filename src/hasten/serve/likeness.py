"""Likeness: prompts as vectors of the engine's, for the semantic cache."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UserError
from hasten.serve.mailbox import Mailbox
from hasten.serve.messages import Vector
from hasten.serve.supervisor import Supervisor

REMEMBERED = 256
"""Prompts whose vectors are kept from looking for an answer until one is kept."""


class Likeness:
    """The mean of a prompt's last hidden states, as the engine of ``supervisor`` computes it. A prompt of late is not computed again."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._known: OrderedDict[tuple[int, ...], NDArray[np.float32]] = OrderedDict()

    async def embed(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        """Its vector [width]. Raises UserError, or EngineGoneError, where there is none."""
        key = tuple(prompt)
        if (vector := self._known.get(key)) is None:
            vector = self._known[key] = await self._asked(key)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return vector

    async def _asked(self, prompt: tuple[int, ...]) -> NDArray[np.float32]:
        supervisor, mailbox = self._supervisor, Mailbox[Vector]()
        id = supervisor.embed([list(prompt)], mailbox)
        try:
            (one,) = await mailbox.take()
        except BaseException:
            supervisor.abort(id)
            raise
        supervisor.ended(id)
        if one.error is not None:
            raise UserError(one.error)
        return np.frombuffer(one.data, "<f4")
