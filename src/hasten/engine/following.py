"""Following: which requests' grammars have said what may come next, and which outputs they end."""

from collections.abc import Collection

from hasten.engine.constraint import Constraints
from hasten.engine.live import Live

MASK_S = 0.003
"""How long a step waits for what a grammar allows next, once a token; who is later than that sits steps out."""


class Following:
    """Over the requests of ``live``, whose grammars ``constraints`` follow."""

    def __init__(self, constraints: Constraints | None, live: Live) -> None:
        self.constraints = constraints
        self._live = live
        self._late: Collection[int] = ()  # requests that the last step did not wait for

    def held(self) -> Collection[int]:
        """Requests whose grammar has not said yet what may come next: they do not draw in this step.

        Raises UserError, a fault of all of them, where the tokenizer can be held to no grammar."""
        live = self._live
        self.wait([number for number in live.constrained if number not in self._late], MASK_S)
        self._late = {number for number in live.constrained if not all(state.ready for state in live.states(number))}
        return self._late

    def wait(self, numbers: Collection[int], seconds: float) -> None:
        """Wait until the grammars of all these requests have said what may come next, for so long at most. Raises as `held`."""
        if self.constraints is not None:
            self.constraints.wait(seconds, [state for number in numbers for state in self._live.states(number)])

    def ended(self, number: int) -> list[int]:
        """Sequences of a request whose grammar is complete or has failed; before the first token, only if all of them are to end."""
        live = self._live
        running = live.running(number)
        ended = [sequence for sequence in running if (state := live.requests[sequence].constraint) and (state.error or state.complete)]
        if len(ended) < len(running) and not any(live.requests[sequence].output for sequence in running):
            return []
        return ended
