"""Live: the requests that an engine has in hand, and which sequences are whose."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hasten.engine.constraint import ConstraintState
from hasten.engine.draw import TokenLogprob
from hasten.engine.request import Chunk, Request
from hasten.engine.search import Search

if TYPE_CHECKING:
    from hasten.engine.scoring import PromptScores


@dataclasses.dataclass(slots=True)
class Step:
    """What comes of a step beside tokens: ``errors`` by computed sequence, log-probabilities by drawn one, and outputs that ended."""

    errors: dict[int, str] = dataclasses.field(default_factory=dict)
    logprobs: dict[int, TokenLogprob] = dataclasses.field(default_factory=dict)
    chunks: list[Chunk] = dataclasses.field(default_factory=list)


class Live:
    """Every output or beam is a sequence; a request goes by the number of its first one."""

    def __init__(self) -> None:
        self.ids = itertools.count()
        """Of sequences to come."""
        self.requests: dict[int, Request] = {}
        """By sequence; those of a search all have its first output."""
        self.sequences: dict[int, list[int]] = {}
        """By request: its outputs' or beams'."""
        self.numbers: dict[int, int] = {}
        """By sequence: of its request."""
        self.searches: dict[int, tuple[Search, Sequence[Request]]] = {}
        """By request, with the outputs to return."""
        self.scores: dict[int, PromptScores] = {}
        """By the sequence that computes the prompt."""
        self.constrained: dict[int, None] = {}
        """Requests with a grammar."""

    def add(
        self, sequences: Sequence[int], outputs: Sequence[Request], search: Search | None, scores: "PromptScores | None"
    ) -> None:  # fmt: skip
        """A request that was handed in."""
        number = sequences[0]
        self.requests.update(zip(sequences, outputs))
        self.numbers.update(dict.fromkeys(sequences, number))
        self.sequences[number] = list(sequences)
        if search is not None:
            self.searches[number] = search, outputs
        if scores is not None:
            self.scores[number] = scores
        if self.states(number):
            self.constrained[number] = None

    def running(self, number: int) -> list[int]:
        """Sequences of a request that have not ended."""
        return [sequence for sequence in self.sequences.get(number, ()) if sequence in self.requests]

    def states(self, number: int) -> list[ConstraintState]:
        """What follows the grammar for each output or beam of a request."""
        if number in self.searches:
            return self.searches[number][0].followed
        each = [self.requests[sequence].constraint for sequence in self.running(number)]
        return [state for state in each if state is not None]

    def forget(self, sequence: int) -> None:
        """One output has ended."""
        number = self.numbers.pop(sequence)
        del self.requests[sequence]
        if not self.running(number):
            self.drop(number)

    def replace(self, number: int, beams: Sequence[int]) -> None:
        """A search goes on with ``beams`` in place of those it had."""
        output = self.searches[number][1][0]
        for sequence in self.sequences[number]:
            del self.requests[sequence], self.numbers[sequence]
        self.requests.update(dict.fromkeys(beams, output))
        self.numbers.update(dict.fromkeys(beams, number))
        self.sequences[number] = list(beams)

    def drop(self, number: int) -> None:
        """A request has ended, wherever it was; an unknown one has before."""
        for sequence in self.sequences.pop(number, ()):
            if (request := self.requests.pop(sequence, None)) is not None and request.constraint is not None:
                request.constraint.close()
            self.numbers.pop(sequence, None)
        self.constrained.pop(number, None)
        self.scores.pop(number, None)
        if (found := self.searches.pop(number, None)) is not None:
            found[0].close()
