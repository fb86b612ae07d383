"""Mixtures of experts on a tape: where their rows lie.

From the first ExpertLinear to Combine, a value [T, A, N] lies expert by expert rather than token by token: Route's choices are sorted
once a step, the rows of tokens are gathered, every expert's rows are one run, and Combine finds each by its place."""

import dataclasses
from collections.abc import Sequence

from hasten import _native
from hasten.backends.cpu.rows import ELEMENT_BYTES, row_stride
from hasten.program import Program, ops
from hasten.program.arena import Arena


@dataclasses.dataclass(frozen=True, slots=True)
class _Grouping:
    """Where a Route's sorted choices lie: first rows of the experts [E + 1], and the row of each choice [T·A], int32."""

    starts: int
    places: int
    count: int
    top_k: int


class ExpertPlaces:
    """Places of what the experts' kernels need beside the Program's values, and the tape ops that use them."""

    def __init__(self, program: Program, arena: Arena, most_tokens: int) -> None:
        self._program, self._arena, self._most_tokens = program, arena, most_tokens
        self._groupings: dict[str, _Grouping] = {}  # by the name of the chosen experts, and of their weights
        self._gathered: dict[tuple[str, str], tuple[int, int]] = {}  # (x, experts) → rows of choices, scales
        self._done: set[tuple[str, str]] = set()
        self._with: dict[str, list[int]] = {}  # value → places given back with it

    def plan(self, op: ops.Op) -> None:
        """Take the places that ``op`` needs beside its outputs."""
        match op:
            case ops.Route():
                count = self._program.values[op.logits].features[-1]
                starts, places = self._arena.take(4 * (count + 1)), self._arena.take(4 * self._most_tokens * op.top_k)
                self._groupings[op.experts] = self._groupings[op.weights] = _Grouping(starts, places, count, op.top_k)
                self._with[op.weights] = [starts, places]  # Combine, the last to ask for a place, reads the weights
            case ops.ExpertLinear() if self._is_shared(op) and (op.x, op.experts) not in self._gathered:
                choices = self._most_tokens * self._program.values[op.experts].features[-1]
                rows, scales = self._arena.take(choices * self._row_bytes(op)), self._arena.take(4 * choices)
                self._gathered[op.x, op.experts] = rows, scales
                self._with.setdefault(op.experts, []).extend((rows, scales))

    def give_back(self, name: str) -> None:
        """Nobody reads value ``name`` any more."""
        for place in self._with.pop(name, ()):
            self._arena.give_back(place)

    def emit_route(self, tape: _native.Tape, op: ops.Route, at: dict[str, int], correction: Sequence[float]) -> None:
        """Choose, and sort what was chosen."""
        grouping = self._groupings[op.experts]
        tape.route(
            at[op.logits], at[op.experts], at[op.weights], grouping.count, op.top_k, op.score == "sigmoid", op.normalize, op.scale,
            op.groups, op.top_groups, list(correction),
        )  # fmt: skip
        tape.group_by_expert(at[op.experts], grouping.starts, grouping.places, grouping.count, op.top_k)

    def emit_linear(
        self,
        tape: _native.Tape,
        op: ops.ExpertLinear,
        weights: _native.ExpertWeights,
        rows: int,
        scales: int | None,
        y: int,
        bias: list[float],
    ) -> None:
        """The product; tokens' rows are gathered first, once for all products that read them."""
        grouping, key, scaled = self._groupings[op.experts], (op.x, op.experts), op.scale is not None
        if self._is_shared(op):
            from_rows, from_scales = rows, scales or 0
            rows, scales = self._gathered[key]
            if key not in self._done:
                self._done.add(key)
                tape.gather_rows(from_rows, from_scales, grouping.places, rows, scales, grouping.top_k, self._row_bytes(op), scaled)
        stride = self._row_bytes(op) // ELEMENT_BYTES[self._program.values[op.x].dtype]
        tape.expert_linear(weights, scaled, rows, scales or 0, grouping.starts, y, stride, bias)

    def emit_combine(self, tape: _native.Tape, op: ops.Combine, at: dict[str, int]) -> None:
        """The weighted sum, from rows expert by expert back to rows of tokens."""
        grouping = self._groupings[op.weights]
        tape.combine(at[op.x], at[op.weights], grouping.places, at[op.y], grouping.top_k, self._program.values[op.y].features[-1])

    def _is_shared(self, op: ops.ExpertLinear) -> bool:
        """Every chosen expert reads the token's row, rather than each its own."""
        return len(self._program.values[op.x].features) == 1

    def _row_bytes(self, op: ops.ExpertLinear) -> int:
        """From one row that the product reads to the next."""
        value = self._program.values[op.x]
        element = ELEMENT_BYTES[value.dtype]
        return (value.features[-1] if value.dtype == "float32" else row_stride(value.features[-1], element)) * element
