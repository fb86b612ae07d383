"""Session: what the engine needs of a backend."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.program import Batch, Drawer, Logits, Move, PageLists, Program

if TYPE_CHECKING:
    from hasten import _native


class Session(Protocol):
    """A Program to play, and pages for what its sequences keep. Which page holds what the engine decides; the backend carries it out."""

    @property
    def program(self) -> Program: ...

    @property
    def page(self) -> int:
        """Tokens of a page."""
        ...

    @property
    def pages(self) -> Mapping[str, int]:
        """How many there are, by state group."""
        ...

    @property
    def threads(self) -> "_native.ThreadPool | None":
        """Threads that sampling may share between steps; None where there are none of its own."""
        ...

    @property
    def drawer(self) -> Drawer | None:
        """What draws tokens where the logits lie, while the next step is planned; None where the engine draws them."""
        ...

    def carry_out(self, moves: Sequence[Move]) -> None:
        """Copy pages, swap them out and in, in this order. Whatever it raises, no page but what these moves were to write has changed."""
        ...

    def run(self, batch: Batch, pages: Sequence[PageLists]) -> Logits:
        """Logits [R, vocab] of the batch's rows, where they were computed; what is kept of sequence s goes to ``pages[s]``. Where there is
        a ``drawer``, nothing is waited for, and a token may be one that is being drawn.

        Raises StateLostError where the batch cannot be played again, for recurrent states may have moved on; after any other error it
        can."""
        ...

    def settle(self) -> None:
        """Wait until nothing that would make later steps faster is under way in the background, as whoever measures must."""
        ...

    def hidden(self, batch: Batch, pages: Sequence[PageLists]) -> NDArray[np.float32]:
        """The same, but hidden states [R, width] after the last norm (`hasten.program.hidden_states`)."""
        ...
