"""Admission: how much work the server takes on. What is more is refused at once, before anything is computed for it."""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Admission:
    """Counts outputs that are on their way: at most ``most``, those that run in ``slots`` and those that wait together. One request of more
    than may wait is taken while none does. ``draining`` takes none.

    ``seconds`` is what an output took of late (a moving mean), which is what a refused client is told to wait by."""

    most: int
    slots: int
    taken: int = 0
    draining: bool = False
    seconds: float = 1.0

    def take(self, outputs: int) -> bool:
        """Room for so many more outputs?  Then they are counted."""
        many = outputs > self.most - self.slots and self.taken < self.slots
        if self.draining or (self.taken + outputs > self.most and not many):
            return False
        self.taken += outputs
        return True

    def give_back(self, outputs: int, seconds: float) -> None:
        """So many have ended, after so long."""
        self.leave(outputs)
        self.seconds += 0.1 * (seconds - self.seconds)

    def leave(self, outputs: int) -> None:
        """So many need no slot; how long that took says nothing about those that do."""
        self.taken -= outputs

    @property
    def retry_s(self) -> int:
        """Whole seconds until a slot should be free."""
        return max(1, min(60, math.ceil(self.seconds * max(1, self.taken - self.slots) / self.slots)))
