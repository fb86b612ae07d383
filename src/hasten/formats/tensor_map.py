"""Invertible maps between a checkpoint's tensors and hasten's canonical weights.

A map is a list of mappings; each takes some source tensors through a chain of steps to some target weights. Every step can say what
it does to shapes without touching data, can do it to arrays (as views where numpy allows), and has an inverse, so that what was read
can be written back under its own names.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from hasten.base.errors import CheckpointError
from hasten.formats.linear import ClusteredLinear, QuantizedLinear
from hasten.formats.quantized import DequantizedWeight, QuantizedWeight, StaticWeight, dequantized, static_as
from hasten.formats.weights import Array, Weight

Shape = tuple[int, ...]


class Step(Protocol):
    """An invertible function from a list of arrays to a list of arrays."""

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """The shapes made from arrays of these shapes. Raises ValueError where they do not fit."""
        ...

    def apply(self, arrays: list[Array]) -> list[Array]:
        """Do it. Views where possible."""
        ...

    def inverse(self) -> "Step":
        """The step that undoes this one."""
        ...

    def beside(self, shapes: list[Shape], width: int) -> "Step | None":
        """The same for what has ``width`` numbers where arrays of ``shapes`` have a row (their last axis), such as a row's scales; None
        where this step reaches into rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Permute:
    """Reorder the axes of every array."""

    axes: tuple[int, ...]

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """Permuted."""
        if any(len(shape) != len(self.axes) for shape in shapes):
            raise ValueError(f"{len(self.axes)} axes expected, shapes are {shapes}")
        return [tuple(shape[axis] for axis in self.axes) for shape in shapes]

    def apply(self, arrays: list[Array]) -> list[Array]:
        """Views."""
        return [array.transpose(self.axes) for array in arrays]

    def inverse(self) -> "Permute":
        """The permutation back."""
        return Permute(tuple(int(i) for i in np.argsort(self.axes)))

    def beside(self, shapes: list[Shape], width: int) -> "Permute | None":
        """Itself, where the last axis stays the last."""
        return self if self.axes[-1] == len(self.axes) - 1 else None


TRANSPOSE = Permute((1, 0))


@dataclasses.dataclass(frozen=True)
class Reshape:
    """Give every array, of shape ``before``, the shape ``after``."""

    before: Shape
    after: Shape

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """``after``, once per array."""
        if any(shape != self.before for shape in shapes):
            raise ValueError(f"shape {self.before} expected, found {shapes}")
        return [self.after for _ in shapes]

    def apply(self, arrays: list[Array]) -> list[Array]:
        """Views of contiguous arrays, copies of others."""
        return [array.reshape(self.after) for array in arrays]

    def inverse(self) -> "Reshape":
        """The other way round."""
        return Reshape(self.after, self.before)

    def beside(self, shapes: list[Shape], width: int) -> "Reshape | None":
        """Itself with rows of another width, where rows stay whole."""
        whole = self.before[-1:] == self.after[-1:]
        return Reshape((*self.before[:-1], width), (*self.after[:-1], width)) if whole else None


@dataclasses.dataclass(frozen=True)
class Split:
    """Cut one array along ``axis`` into pieces of ``sizes``."""

    sizes: tuple[int, ...]
    axis: int = 0

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """One shape per piece."""
        (shape,) = shapes
        if self.axis >= len(shape) or shape[self.axis] != sum(self.sizes):
            raise ValueError(f"axis {self.axis} must have {sum(self.sizes)} entries, shape is {shape}")
        return [(*shape[: self.axis], size, *shape[self.axis + 1 :]) for size in self.sizes]

    def apply(self, arrays: list[Array]) -> list[Array]:
        """Views."""
        return np.split(arrays[0], np.cumsum(self.sizes)[:-1], axis=self.axis)

    def inverse(self) -> "Join":
        """Lay the pieces together again."""
        return Join(self.sizes, self.axis)

    def beside(self, shapes: list[Shape], width: int) -> "Split | None":
        """Itself, along any axis but the last."""
        return self if self.axis < len(shapes[0]) - 1 else None


@dataclasses.dataclass(frozen=True)
class Join:
    """Lay arrays together along ``axis``, piece i having ``sizes[i]`` entries there."""

    sizes: tuple[int, ...]
    axis: int = 0

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """The one joined shape."""
        if tuple(shape[self.axis] for shape in shapes) != self.sizes:
            raise ValueError(f"pieces of {self.sizes} expected along axis {self.axis}, shapes are {shapes}")
        first = shapes[0]
        if any(shape[: self.axis] + shape[self.axis + 1 :] != first[: self.axis] + first[self.axis + 1 :] for shape in shapes):
            raise ValueError(f"pieces must agree outside axis {self.axis}, shapes are {shapes}")
        return [(*first[: self.axis], sum(self.sizes), *first[self.axis + 1 :])]

    def apply(self, arrays: list[Array]) -> list[Array]:
        """A copy."""
        return [np.concatenate(arrays, axis=self.axis)]

    def inverse(self) -> Split:
        """Cut them apart."""
        return Split(self.sizes, self.axis)

    def beside(self, shapes: list[Shape], width: int) -> "Join | None":
        """Itself, along any axis but the last."""
        return self if self.axis < len(shapes[0]) - 1 else None


@dataclasses.dataclass(frozen=True)
class Stack:
    """Make ``count`` arrays of one shape into one with a new first axis."""

    count: int

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """The one stacked shape."""
        if len(shapes) != self.count or len(set(shapes)) != 1:
            raise ValueError(f"{self.count} equal shapes expected, found {shapes}")
        return [(self.count, *shapes[0])]

    def apply(self, arrays: list[Array]) -> list[Array]:
        """A copy."""
        return [np.stack(arrays)]

    def inverse(self) -> "Unstack":
        """Take them apart."""
        return Unstack(self.count)

    def beside(self, shapes: list[Shape], width: int) -> "Stack":
        """Itself."""
        return self


@dataclasses.dataclass(frozen=True)
class Unstack:
    """One array per entry of the first axis."""

    count: int

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """``count`` shapes."""
        (shape,) = shapes
        if not shape or shape[0] != self.count:
            raise ValueError(f"first axis of {self.count} expected, shape is {shape}")
        return [shape[1:]] * self.count

    def apply(self, arrays: list[Array]) -> list[Array]:
        """Views."""
        return list(arrays[0])

    def inverse(self) -> Stack:
        """Stack them again."""
        return Stack(self.count)

    def beside(self, shapes: list[Shape], width: int) -> "Unstack | None":
        """Itself, where an entry has rows."""
        return self if len(shapes[0]) > 1 else None


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One array under ``count`` names (a tensor that several layers share)."""

    count: int

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """The same shape, ``count`` times."""
        (shape,) = shapes
        return [shape] * self.count

    def apply(self, arrays: list[Array]) -> list[Array]:
        """The same array."""
        return [arrays[0]] * self.count

    def inverse(self) -> "Merge":
        """Back to one, which must be one."""
        return Merge(self.count)

    def beside(self, shapes: list[Shape], width: int) -> "Repeat":
        """Itself."""
        return self


@dataclasses.dataclass(frozen=True)
class Merge:
    """``count`` equal arrays become one; different ones cannot be written under one name."""

    count: int

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """The one shape."""
        if len(shapes) != self.count or len(set(shapes)) != 1:
            raise ValueError(f"{self.count} shared weights of one shape expected, found {shapes}")
        return shapes[:1]

    def apply(self, arrays: list[Array]) -> list[Array]:
        """The first, once the others were compared with it."""
        if any(array is not arrays[0] and not np.array_equal(_bits(array), _bits(arrays[0])) for array in arrays):
            raise CheckpointError("weights that this layout shares between layers have become different; save with layout 'hasten' instead")
        return arrays[:1]

    def inverse(self) -> Repeat:
        """Under many names again."""
        return Repeat(self.count)

    def beside(self, shapes: list[Shape], width: int) -> "Merge":
        """Itself."""
        return self


@dataclasses.dataclass(frozen=True)
class Each:
    """One step per array, side by side; ``None`` leaves an array as it is."""

    steps: tuple[Step | None, ...]

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """Each step's."""
        return [shape if step is None else step.shapes([shape])[0] for step, shape in zip(self.steps, shapes, strict=True)]

    def apply(self, arrays: list[Array]) -> list[Array]:
        """Each step's."""
        return [array if step is None else step.apply([array])[0] for step, array in zip(self.steps, arrays, strict=True)]

    def inverse(self) -> "Each":
        """Each step's inverse."""
        return Each(tuple(step and step.inverse() for step in self.steps))

    def beside(self, shapes: list[Shape], width: int) -> "Each | None":
        """Each step's."""
        steps = [step and step.beside([shape], width) for step, shape in zip(self.steps, shapes, strict=True)]
        return Each(tuple(steps)) if all(made or not step for made, step in zip(steps, self.steps, strict=True)) else None


@dataclasses.dataclass(frozen=True)
class First:
    """``step`` makes ``gives`` arrays of the first ``takes``; the others follow as they are."""

    takes: int
    gives: int
    step: Step

    def shapes(self, shapes: list[Shape]) -> list[Shape]:
        """The step's, then the others."""
        return [*self.step.shapes(shapes[: self.takes]), *shapes[self.takes :]]

    def apply(self, arrays: list[Array]) -> list[Array]:
        """The step's, then the others."""
        return [*self.step.apply(arrays[: self.takes]), *arrays[self.takes :]]

    def inverse(self) -> "First":
        """The step's inverse on what it gave."""
        return First(self.gives, self.takes, self.step.inverse())

    def beside(self, shapes: list[Shape], width: int) -> "First | None":
        """The step's."""
        step = self.step.beside(shapes[: self.takes], width)
        return None if step is None else First(self.takes, self.gives, step)


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """``sources`` taken through ``steps`` give ``targets``."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def inverse(self) -> "TensorMapping":
        """From targets to sources."""
        return TensorMapping(self.targets, self.sources, tuple(step.inverse() for step in reversed(self.steps)))

    def beside(self, sources: Sequence[Shape], width: int) -> "TensorMapping | None":
        """The mapping of what has ``width`` numbers to a row of these sources; None where a step reaches into rows."""
        steps, shapes = list[Step](), list(sources)
        for step in self.steps:
            if (made := step.beside(shapes, width)) is None:
                return None
            steps.append(made)
            shapes = step.shapes(shapes)
        return TensorMapping(self.sources, self.targets, tuple(steps))

    def shapes(self, sources: Sequence[Shape]) -> list[Shape]:
        """Target shapes for these source shapes. Raises CheckpointError naming the tensors where they do not fit."""
        shapes = list(sources)
        try:
            for step in self.steps:
                shapes = step.shapes(shapes)
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"tensor {_names(self.sources)} has the wrong shape for {_names(self.targets)}: {error}") from None
        return shapes

    def apply(self, arrays: Sequence[Array]) -> list[Array]:
        """Target arrays."""
        result = list(arrays)
        for step in self.steps:
            result = step.apply(result)
        return result


def rename(source: str, target: str, *steps: Step) -> TensorMapping:
    """One tensor under another name, perhaps permuted or reshaped."""
    return TensorMapping((source,), (target,), steps)


def split(source: str, targets: Iterable[str], *steps: Step) -> TensorMapping:
    """One tensor that holds several weights."""
    return TensorMapping((source,), tuple(targets), steps)


def stack(sources: Iterable[str], target: str) -> TensorMapping:
    """Tensors of one shape that make one weight with a new first axis."""
    names = tuple(sources)
    return TensorMapping(names, (target,), (Stack(len(names)),))


TensorMap = tuple[TensorMapping, ...]


def inverse(tensor_map: TensorMap) -> TensorMap:
    """The map that writes back what ``tensor_map`` read."""
    return tuple(mapping.inverse() for mapping in tensor_map)


def apply_map(tensor_map: TensorMap, sources: Mapping[str, Weight]) -> dict[str, Weight]:
    """Lazy target weights from lazy source weights. Every source a mapping names must be there.

    Raises CheckpointError naming missing tensors, or tensors of a wrong shape."""
    missing = [name for mapping in tensor_map for name in mapping.sources if name not in sources]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"tensor {', '.join(missing[:3])}{more} missing from the checkpoint; download it again, or check config.json")
    targets: dict[str, Weight] = {}
    for mapping in tensor_map:
        weights = [sources[name] for name in mapping.sources]
        targets.update(zip(mapping.targets, _mapped(mapping, weights), strict=True))
    return targets


def _mapped(mapping: TensorMapping, weights: list[Weight]) -> list[Weight]:
    """The targets; still quantized where all sources are, in the same way, and no step reaches into rows."""
    shapes = mapping.shapes([weight.shape for weight in weights])
    stored = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if stored and (quantized := _mapped_quantized(mapping, weights, stored, shapes)) is not None:
        return quantized
    made = _Targets(mapping, [weight.load for weight in weights])
    if not stored and not any(isinstance(weight, DequantizedWeight) for weight in weights):
        return [Weight(shape, weights[0].dtype, functools.partial(made.load, index)) for index, shape in enumerate(shapes)]
    first = next(weight for weight in weights if isinstance(weight, QuantizedWeight | DequantizedWeight))
    known = first if isinstance(first, DequantizedWeight) else dequantized(first, "the map from the checkpoint's tensors reaches into rows")
    bits = 8 * sum(weight.nbytes for weight in weights) / max(1, sum(weight.size for weight in weights))
    return [
        DequantizedWeight.of(shape, functools.partial(made.load, index), known.stored, known.reason, bits)
        for index, shape in enumerate(shapes)
    ]


def _mapped_quantized(
    mapping: TensorMapping, weights: list[Weight], stored: list[QuantizedWeight], shapes: list[Shape]
) -> list[Weight] | None:
    """The targets with their codes and scales; None where they cannot be had so."""
    first, width = stored[0], stored[0].shape[-1]
    groups = -(-width // first.form.group) if first.form.group else 1
    scales = mapping.beside([weight.shape for weight in weights], groups)
    alike = {(weight.form, weight.activations, weight.shape[-1]) for weight in stored}
    if scales is None or len(stored) != len(weights) or len(alike) != 1 or any(len(shape) < 2 for shape in shapes):
        return None
    if first.form.has_codebook and (len(stored) != 1 or shapes != [first.shape] or (len(first.shape) != 2 and mapping.steps)):
        return None  # a codebook is of one matrix, all of it
    made = _QuantizedTargets(mapping, scales, stored)
    bits = sum(weight.bits * weight.size for weight in stored) / sum(weight.size for weight in stored)
    fed = "int8" if isinstance(first, StaticWeight) else first.activations
    return [
        static_as(stored, QuantizedWeight.of(shape, first.form, functools.partial(made.load, index), fed, bits))
        for index, shape in enumerate(shapes)
    ]


class _QuantizedTargets:
    """The targets of one mapping, as _Targets, with what lies beside their rows."""

    def __init__(self, mapping: TensorMapping, scales: TensorMapping, weights: list[QuantizedWeight]) -> None:
        self._mapping, self._scales, self._weights = mapping, scales, weights
        self._lock = threading.Lock()
        self._made: dict[int, QuantizedLinear] = {}

    def load(self, index: int) -> QuantizedLinear:
        with self._lock:
            if index not in self._made:
                self._made = dict(enumerate(self._make([weight.quantized() for weight in self._weights])))
            return self._made.pop(index)

    def _make(self, sources: list[QuantizedLinear]) -> list[QuantizedLinear]:
        group, q = sources[0].group, self._mapping.apply([source.q for source in sources])
        scales = [source.scales for source in sources if source.scales is not None]
        zeros = [source.zeros for source in sources if source.zeros is not None]
        made_scales = self._scales.apply(scales) if scales else [None] * len(q)
        made_zeros = self._scales.apply(zeros) if zeros else [None] * len(q)
        if isinstance(sources[0], ClusteredLinear):
            return [dataclasses.replace(sources[0], q=q[0], scales=made_scales[0])]
        return [QuantizedLinear(*each, group) for each in zip(q, made_scales, made_zeros, strict=True)]


class _Targets:
    """The targets of one mapping, made together and handed out one by one: a stack of experts is taken apart once, not once an expert."""

    def __init__(self, mapping: TensorMapping, loads: list[Callable[[], Array]]) -> None:
        self._mapping, self._loads = mapping, loads
        self._lock = threading.Lock()
        self._made: dict[int, Array] = {}

    def load(self, index: int) -> Array:
        with self._lock:
            if index not in self._made:
                self._made = dict(enumerate(self._mapping.apply([load() for load in self._loads])))
            return self._made.pop(index)  # whoever asked holds it now; the others wait for theirs


def _bits(array: Array) -> Array:
    """The same memory as whole numbers, so that a NaN equals itself and -0 is not 0."""
    return array.view(f"u{array.dtype.itemsize}")


def _names(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
