"""Fused ops: several ops of a Program played as one. What each part computes is written at the part's own class."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from hasten.program.ops import Contract, Op, StateRef

if TYPE_CHECKING:
    from hasten.program.program import Value


class Fused(Op, frozen=True, kw_only=True):
    """``parts``, in order, give what they give one by one, bit for bit.

    ``inner`` are the values that only parts read, with their types: nobody else sees them, so a backend may keep them where it likes.
    All other values that parts make are outputs."""

    parts: tuple[Op, ...]
    inner: "tuple[tuple[str, Value], ...]" = ()

    roles: ClassVar[dict[str, str]] = {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values read that no part makes, in order of first use."""
        made = {name for part in self.parts for name in part.outputs}
        return tuple(dict.fromkeys(name for part in self.parts for name in part.inputs if name not in made))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the values made that are not inner ones."""
        hidden = {name for name, _ in self.inner}
        return tuple(name for part in self.parts for name in part.outputs if name not in hidden)

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the weights that parts read, each once."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.params))

    @property
    def state_refs(self) -> tuple[StateRef, ...]:
        """The places in state groups that parts touch, each once."""
        return tuple(dict.fromkeys(ref for part in self.parts for ref in part.state_refs))

    @property
    def attributes(self) -> dict[str, Any]:
        """None of its own."""
        return {}

    @property
    def contract(self) -> Contract:  # type: ignore[override]  # an op's contract belongs to its class; here it follows from the parts
        """What the parts' contracts come to: errors add up."""
        contracts = [part.contract for part in self.parts]
        states = " and ".join(verb for verb in ("reads", "writes") if any(verb in contract.state for contract in contracts))
        coarse, fine = (sum(contract.tolerance[i] for contract in contracts) for i in (0, 1))
        return Contract((coarse, fine), all(contract.differentiable for contract in contracts), states or "none")  # type: ignore[arg-type]

    def renamed(self, rename: Callable[[str], str]) -> "Fused":
        """The same op with every value name of every part passed through ``rename``."""
        inner = tuple((rename(name), value) for name, value in self.inner)
        return msgspec.structs.replace(self, parts=tuple(part.renamed(rename) for part in self.parts), inner=inner)

    def with_state(self, place: Callable[[StateRef], StateRef]) -> "Fused":
        """The same op with every state reference passed through ``place``."""
        return msgspec.structs.replace(self, parts=tuple(part.with_state(place) for part in self.parts))


class Products(Fused, frozen=True, kw_only=True):
    """Linear layers that read the same rows: one op with several weights and several outputs, whose channels are shared out together."""


class RowChain(Fused, frozen=True, kw_only=True):
    """Ops one after another whose rows are independent: row r of what a part makes needs row r of its inputs only.

    So whoever plays a block of rows can take it through all parts while it is in the cache, without waiting for others. State that
    parts write is read by none of them."""
