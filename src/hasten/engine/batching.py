"""Which requests run together, and in which order they come: choices of the scheduler, each a type."""

import dataclasses
from typing import ClassVar, Protocol


class Batching(Protocol):
    """When waiting requests may join. ``slots`` is the most sequences that run together."""

    @property
    def slots(self) -> int: ...

    @property
    def rectangular(self) -> bool:
        """Does a sequence that has ended keep its row until the whole batch has, computing for nobody?"""
        ...

    def opens(self, running: int, waiting: int, waited_s: float) -> bool:
        """May requests join now? ``waiting`` sequences are there, the first for ``waited_s``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Continuous:
    """A request joins at any step, as soon as a slot is free (iteration-level scheduling: Yu et al. 2022, Orca, OSDI)."""

    slots: int = 64
    rectangular: ClassVar[bool] = False

    def opens(self, running: int, waiting: int, waited_s: float) -> bool:
        """Always."""
        return True


@dataclasses.dataclass(frozen=True, slots=True)
class Static:
    """A batch of what waits, up to ``slots``, runs until the last of it has ended; its rows stay as many as they were (padding).

    Prompts are not padded to the longest of their batch, as where a batch must be a rectangle: a step here takes sequences of any lengths,
    whatever the policy, so static differs from continuous batching in nothing but when a request may join. What continuous batching is
    seen to gain over it comes from the lengths of outputs alone, which is also what `hasten.measure.throughput.Bound` is reckoned from;
    over a rectangle of unequal prompts it would gain more."""

    slots: int = 64
    rectangular: ClassVar[bool] = True

    def opens(self, running: int, waiting: int, waited_s: float) -> bool:
        """When the last batch has ended."""
        return not running


@dataclasses.dataclass(frozen=True, slots=True)
class Dynamic:
    """A static batch that is not begun before ``slots`` sequences wait, or the first has waited ``window_s`` seconds."""

    slots: int = 64
    window_s: float = 0.01
    rectangular: ClassVar[bool] = True

    def opens(self, running: int, waiting: int, waited_s: float) -> bool:
        """When the last batch has ended, and enough wait or one long enough."""
        return not running and (waiting >= self.slots or waited_s >= self.window_s)


class Order(Protocol):
    """Who comes first where not all can: the request of the smaller rank."""

    def rank(self, arrived_s: float, priority: int) -> float: ...


@dataclasses.dataclass(frozen=True, slots=True)
class FirstCome:
    """In the order of arrival."""

    def rank(self, arrived_s: float, priority: int) -> float:
        """The time of arrival."""
        return arrived_s


@dataclasses.dataclass(frozen=True, slots=True)
class ByPriority:
    """The higher ``priority`` first. A level is worth ``level_s`` seconds of waiting, so that nobody waits for ever."""

    level_s: float = 10.0

    def rank(self, arrived_s: float, priority: int) -> float:
        """The time of arrival, earlier by what the priority is worth."""
        return arrived_s - priority * self.level_s
