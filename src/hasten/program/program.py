"""Program: the flat list of ops a Spec lowers to, over symbolic sizes. Passes rewrite it; it prints as text."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from hasten.base.errors import ConfigError, UnsupportedError, one_line
from hasten.formats.cache import ROW_FORMATS
from hasten.program.fused import Fused
from hasten.program.ops import Attend, AttendRelative, AttentionMap, AttentionMapRelative, Op, Out, Param, StateRef
from hasten.spec import Causal, SegmentMemory, SlidingWindow, Visibility

RowSymbol = Literal["T", "S", "R"]


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """A named array: ``rows`` is symbolic (T tokens, S sequences, R logit rows), ``features`` the fixed trailing sizes (−1: as long as
    the context)."""

    rows: RowSymbol
    features: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        sizes = ", ".join([self.rows, *("C" if size < 0 else str(size) for size in self.features)])
        return f"{self.dtype}[{sizes}]"


# --- state groups: what must outlive a step

Reuse = Literal["prefix", "snapshot"]
"""When another request may start from this state: at any exact prefix (under a window, its last pages are enough), or only where a
snapshot was kept."""

Rollback = Literal["truncate", "snapshot"]
"""How a rejected draft is undone: by dropping the newest tokens, or by restoring a snapshot and replaying from it."""


@dataclasses.dataclass(frozen=True, slots=True)
class KvGroup:
    """Paged keys and values of ``layers`` layers with one geometry and one rule of visibility; one block table serves them all."""

    name: str
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    visible: Visibility
    format: str = "float32"

    reuse: ClassVar[Reuse] = "prefix"
    rollback: ClassVar[Rollback] = "truncate"

    def bytes_per_token(self) -> int:
        """Cache bytes one token adds, over all layers."""
        rows = ROW_FORMATS[self.format]
        return self.layers * self.kv_heads * (rows.row_bytes(self.key_dim) + rows.row_bytes(self.value_dim))

    def bytes_per_sequence(self) -> int:
        """Bytes a sequence holds whatever its length: none."""
        return 0

    def oldest_visible(self, position: int) -> int:
        """First position a query at ``position`` may see; older pages can be freed."""
        return oldest_visible(self.visible, position)


@dataclasses.dataclass(frozen=True, slots=True)
class LatentGroup:
    """Paged rows of latent attention: one row of ``width`` features per token, whose first ``value_dim`` are also the values."""

    name: str
    layers: int
    width: int
    value_dim: int
    visible: Visibility = Causal()
    format: str = "float32"

    reuse: ClassVar[Reuse] = "prefix"
    rollback: ClassVar[Rollback] = "truncate"

    def bytes_per_token(self) -> int:
        """Cache bytes one token adds, over all layers."""
        return self.layers * ROW_FORMATS[self.format].row_bytes(self.width)

    def bytes_per_sequence(self) -> int:
        """Bytes a sequence holds whatever its length: none."""
        return 0

    def oldest_visible(self, position: int) -> int:
        """First position a query at ``position`` may see."""
        return oldest_visible(self.visible, position)


@dataclasses.dataclass(frozen=True, slots=True)
class RecurrentGroup:
    """Slots of fixed size, one per sequence and layer, overwritten by every token."""

    name: str
    layers: int
    shape: tuple[int, ...]
    format: str = "float32"

    reuse: ClassVar[Reuse] = "snapshot"
    rollback: ClassVar[Rollback] = "snapshot"

    def bytes_per_token(self) -> int:
        """Cache bytes one token adds: none."""
        return 0

    def bytes_per_sequence(self) -> int:
        """Bytes one sequence holds, over all layers."""
        return self.layers * ROW_FORMATS[self.format].row_bytes(math.prod(self.shape))


StateGroup = KvGroup | LatentGroup | RecurrentGroup


def oldest_visible(visible: Visibility, position: int) -> int:
    """First position that a query at ``position`` may see under ``visible``."""
    match visible:
        case Causal():
            return 0
        case SlidingWindow(size=size):
            return max(0, position - size + 1)
        case SegmentMemory(segment=segment, memory=memory):
            return max(0, position // segment * segment - memory)


def most_seen(visible: Visibility) -> int | None:
    """Most tokens that any one sees under ``visible``, itself included; None where that has no bound."""
    match visible:
        case Causal():
            return None
        case SlidingWindow(size=size):
            return size
        case SegmentMemory(segment=segment, memory=memory):
            return segment + memory


# --- the program


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """Ops [start, stop) make one piece of the model: the embedding, a block, an exit or the head. Programs are cut between layers."""

    label: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Program:
    """Ops in order, the type of every value, the shape of every weight, and what outlives a step.

    ``inputs`` are values handed in beside the batch (none but after a cut); ``outputs`` are the values a backend returns."""

    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    params: Mapping[str, tuple[int, ...]]
    states: tuple[StateGroup, ...]
    layers: tuple[Layer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    context: int

    def state(self, name: str) -> StateGroup:
        """The state group of that name."""
        for group in self.states:
            if group.name == name:
                return group
        raise ConfigError(f"no state group {name!r}; there are {[group.name for group in self.states]}")

    def with_outputs(self, names: Iterable[str]) -> "Program":
        """The Program that returns exactly ``names`` (taps), without the ops nothing needs any more.

        ``blocks.N.mixer.map`` names the attention probabilities, which are computed only when tapped. State is still written by every
        layer up to the last op that is needed. Raises UnsupportedError for a name that is no value, listing near ones."""
        program, wanted = self, tuple(dict.fromkeys(names))
        for name in wanted:
            if name.endswith(".mixer.map") and name not in program.values:
                program = program._with_map(name)
        for name in wanted:
            if name not in program.values:
                prefix = name.rsplit(".", 1)[0]
                near = [known for known in program.values if known.startswith(prefix)] or list(program.values)
                raise UnsupportedError(f"no value {one_line(name)} to tap; near it there are {', '.join(near[:12])}")
        return program._without_dead_ops(wanted)

    def cut(self, after: str) -> tuple["Program", "Program"]:
        """Cut behind the layer labelled ``after``: what crosses the cut is the first part's outputs and the second's inputs.

        Early exit compacts rows at such a cut, pipeline stages send it. Wanted outputs made before the cut stay with the first part."""
        labels = [layer.label for layer in self.layers]
        if after not in labels[:-1]:
            raise UnsupportedError(f"cannot cut after {one_line(after)}; layers to cut after are {', '.join(labels[:-1])}")
        if not self.can_cut(after):
            raise UnsupportedError(f"cannot cut after {after}: what is behind reads state that what is before writes, and each has its own")
        index = labels.index(after) + 1
        stop = self.layers[index].start
        made = {name for op in self.ops[:stop] for name in op.outputs} | set(self.inputs)
        needed = {name for op in self.ops[stop:] for name in op.inputs}
        crossing = tuple(name for name in self.values if name in made and name in needed)
        kept = [name for name in self.outputs if name in made]
        first = self._part(0, stop, self.layers[:index], self.inputs, tuple(dict.fromkeys((*crossing, *kept))))
        second = self._part(stop, len(self.ops), self.layers[index:], crossing, tuple(n for n in self.outputs if n not in made))
        return first, second

    def can_cut(self, after: str) -> bool:
        """Does no op behind the layer labelled ``after`` read state that one before it writes, as keys and values of another layer?"""
        stop = next(layer.stop for layer in self.layers if layer.label == after)
        before = {ref for op in self.ops[:stop] for ref in op.state_refs}
        return not any(ref in before for op in self.ops[stop:] for ref in op.state_refs)

    def text(self) -> str:
        """The Program for people: sizes, state, then one line per op; under a fused op, one per part."""
        lines = [
            "# T tokens, S sequences, R logit rows, C context",
            f"# {len(self.ops)} ops, {len(self.params)} weights, context {self.context}",
            *(f"state {_state_text(group)}" for group in self.states),
            *(f"input {name}: {self.values[name]}" for name in self.inputs),
        ]
        for layer in self.layers:
            lines.append(f"{layer.label}:")
            for op in self.ops[layer.start : layer.stop]:
                lines.append("  " + self._op_text(op, self.values))
                if isinstance(op, Fused):
                    types = {**self.values, **dict(op.inner)}
                    lines.extend("    " + self._op_text(part, types) for part in op.parts)
        lines.append(f"return {', '.join(self.outputs)}")
        return "\n".join(lines) + "\n"

    def _op_text(self, op: Op, types: Mapping[str, Value]) -> str:
        made = ", ".join(f"{name}: {types[name]}" for name in op.outputs)
        weights = [f"{name}{list(self.params[name])}" for name in op.params]
        states = [f"@{ref.group}[{ref.slot}]" for ref in op.state_refs]
        attributes = [f"{k}={_attribute_text(v)}" for k, v in op.attributes.items() if v != type(op).default(k)]
        call = f"{type(op).__name__}({', '.join([*op.inputs, *weights, *states, *attributes])})"
        return f"{made} = {call}" if made else call

    def _part(self, start: int, stop: int, layers: tuple[Layer, ...], inputs: tuple[str, ...], outputs: tuple[str, ...]) -> "Program":
        ops = self.ops[start:stop]
        return dataclasses.replace(
            self,
            ops=ops,
            layers=tuple(Layer(layer.label, layer.start - start, layer.stop - start) for layer in layers),
            inputs=inputs,
            outputs=outputs,
        )._trimmed()

    def _with_map(self, name: str) -> "Program":
        prefix = name.removesuffix("map")
        found = [(index, op) for index, op in enumerate(self.ops) if isinstance(op, Attend | AttendRelative) and op.y.startswith(prefix)]
        if not found:
            return self
        index, op = found[0]
        kind = AttentionMap if isinstance(op, Attend) else AttentionMapRelative
        shared = {name: getattr(op, name) for name in kind.__struct_fields__ if name != "y"}
        extra = kind(y=Out(name), **shared)
        layers = tuple(Layer(layer.label, layer.start + (layer.start > index), layer.stop + (layer.stop > index)) for layer in self.layers)
        return dataclasses.replace(
            self,
            ops=(*self.ops[: index + 1], extra, *self.ops[index + 1 :]),
            layers=layers,
            values={**self.values, name: Value("T", (op.heads, -1), "float32")},
        )

    def _without_dead_ops(self, outputs: tuple[str, ...]) -> "Program":
        needed, keep, live = set(outputs), [False] * len(self.ops), False
        for index in range(len(self.ops) - 1, -1, -1):
            op = self.ops[index]
            wanted = any(name in needed for name in op.outputs)
            live = live or wanted
            if wanted or (live and "writes" in op.contract.state):
                keep[index] = True
                needed.update(op.inputs)
        layers: list[Layer] = []
        ops: list[Op] = []
        for layer in self.layers:
            start = len(ops)
            ops.extend(op for op, kept in zip(self.ops[layer.start : layer.stop], keep[layer.start : layer.stop]) if kept)
            if len(ops) > start:
                layers.append(Layer(layer.label, start, len(ops)))
        return dataclasses.replace(self, ops=tuple(ops), layers=tuple(layers), outputs=outputs)._trimmed()

    def _trimmed(self) -> "Program":
        """Without the values, weights and state that no op names; the state that stays is numbered anew, densely."""
        names = {name for op in self.ops for name in (*op.inputs, *op.outputs)} | set(self.inputs)
        params = {Param(name) for op in self.ops for name in op.params}
        slots: dict[str, dict[StateRef, StateRef]] = {}
        for ref in (ref for op in self.ops for ref in op.state_refs):
            known = slots.setdefault(ref.group, {})
            known.setdefault(ref, StateRef(ref.group, len(known)))
        return dataclasses.replace(
            self,
            ops=tuple(op.with_state(lambda ref: slots[ref.group][ref]) for op in self.ops),
            values={name: value for name, value in self.values.items() if name in names},
            params={name: shape for name, shape in self.params.items() if name in params},
            states=tuple(dataclasses.replace(group, layers=len(slots[group.name])) for group in self.states if group.name in slots),
        )


def _attribute_text(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 4:
        return f"({value[0]:.4g}, …, {value[-1]:.4g}; {len(value)})"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _state_text(group: StateGroup) -> str:
    sizes = [f"{n:,} bytes a token ({group.format})" for n in [group.bytes_per_token()] if n]
    sizes += [f"{n:,} bytes a sequence" for n in [group.bytes_per_sequence()] if n]
    match group:
        case KvGroup():
            shape = (
                f"keys and values, {group.layers} layers × {group.kv_heads} heads × ({group.key_dim} + {group.value_dim}), {group.visible}"
            )
        case LatentGroup():
            shape = f"latent rows, {group.layers} layers × {group.width} (values: first {group.value_dim})"
        case RecurrentGroup():
            shape = f"recurrent, {group.layers} layers × {' × '.join(map(str, group.shape))}"
    return f"{group.name}: {shape}; {', '.join(sizes)}; reuse: {group.reuse}; rollback: {group.rollback}"


def find_ops(program: Program, ref: StateRef) -> tuple[Op, ...]:
    """The ops of ``program`` that touch ``ref``."""
    return tuple(op for op in program.ops if ref in op.state_refs)
