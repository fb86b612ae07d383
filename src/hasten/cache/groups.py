"""What a cache must know of each state group: how many pages it has, and which of them a sequence needs."""

import dataclasses
from collections.abc import Mapping, Sequence

from hasten.program import RecurrentGroup, StateGroup, most_seen, oldest_visible
from hasten.spec import Causal, Visibility


@dataclasses.dataclass(frozen=True, slots=True)
class TokenPages:
    """``pages`` of some tokens each. Which of its tokens a sequence still needs is a rule of visibility."""

    name: str
    pages: int
    visible: Visibility = Causal()
    page_bytes: int = 0

    @property
    def sees_all(self) -> bool:
        """Does every token see all before it?"""
        return isinstance(self.visible, Causal)

    def oldest(self, position: int) -> int:
        """First position that a token at ``position`` or later may see."""
        return oldest_visible(self.visible, position)

    def most_seen(self) -> int | None:
        """Most tokens that any one sees, itself included; None where that has no bound."""
        return most_seen(self.visible)


@dataclasses.dataclass(frozen=True, slots=True)
class StatePages:
    """``pages`` that each hold one sequence's recurrent state: one a running sequence, the others for snapshots."""

    name: str
    pages: int
    page_bytes: int = 0


PageGroup = TokenPages | StatePages


def page_groups(states: Sequence[StateGroup], page: int, pages: Mapping[str, int]) -> tuple[PageGroup, ...]:
    """The groups of a Program's ``states``, in pages of ``page`` tokens; ``pages`` says how many of each group there are."""
    return tuple(
        StatePages(state.name, pages[state.name], state.bytes_per_sequence())
        if isinstance(state, RecurrentGroup)
        else TokenPages(state.name, pages[state.name], state.visible, page * state.bytes_per_token())
        for state in states
    )
