"""Tensor maps: whatever chain of steps, shapes are foretold, the inverse undoes it bit for bit, and nothing is copied without need."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.base.errors import CheckpointError
from hasten.formats.tensor_map import (
    TRANSPOSE,
    Each,
    First,
    Join,
    Merge,
    Permute,
    Repeat,
    Reshape,
    Split,
    Stack,
    TensorMapping,
    Unstack,
    apply_map,
    inverse,
    rename,
    split,
    stack,
)
from hasten.formats.weights import DTYPES, Weight

ONE_TO_ONE = ("permute", "reshape")


def cut_sizes(draw, total):
    """Sizes of 1 to 3 pieces that add up to ``total``."""
    cuts = sorted(draw(st.lists(st.integers(1, total - 1), max_size=2, unique=True))) if total > 1 else []
    return tuple(b - a for a, b in itertools.pairwise([0, *cuts, total]))


def one_to_one(draw, shape):
    """A step that takes one array of ``shape`` to one array."""
    if draw(st.sampled_from(ONE_TO_ONE)) == "permute":
        return Permute(tuple(draw(st.permutations(range(len(shape))))))
    size = math.prod(shape)
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    first = draw(st.sampled_from(divisors))
    second = draw(st.sampled_from([n for n in divisors if size // first % n == 0]))
    return Reshape(shape, (first, second, size // first // second))


@st.composite
def chains(draw):
    """Source shapes and a chain of steps that fits them."""
    first = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    sources = [first] * draw(st.integers(1, 3))
    shapes, steps = list(sources), []
    for _ in range(draw(st.integers(0, 5))):
        equal = len(set(shapes)) == 1
        options = ["each", "first", "permute" if len({len(shape) for shape in shapes}) == 1 else "each"]
        if equal:
            options += ["reshape", "stack"]
        if len(shapes) == 1:
            options += ["split", "split", "unstack", "repeat"]
        else:
            axes = [a for a in range(len(shapes[0])) if equal or joinable(shapes, a)]
            options += ["join"] * 2 * bool(axes)
        match draw(st.sampled_from(options)):
            case "permute":
                step = Permute(tuple(draw(st.permutations(range(len(shapes[0]))))))
            case "reshape":
                step = Reshape(shapes[0], (math.prod(shapes[0]), 1))
            case "stack":
                step = Stack(len(shapes))
            case "split":
                axis = draw(st.integers(0, len(shapes[0]) - 1))
                step = Split(cut_sizes(draw, shapes[0][axis]), axis)
            case "unstack":
                step = Unstack(shapes[0][0]) if len(shapes[0]) > 1 else Repeat(2)
            case "repeat":
                step = Repeat(draw(st.integers(1, 3)))
            case "join":
                axis = draw(st.sampled_from(axes))
                step = Join(tuple(shape[axis] for shape in shapes), axis)
            case "first":
                step = First(1, 1, one_to_one(draw, shapes[0]))
            case _:
                step = Each(tuple(one_to_one(draw, shape) if draw(st.booleans()) else None for shape in shapes))
        steps.append(step)
        shapes = step.shapes(shapes)
    targets = tuple(f"target{i}" for i in range(len(shapes)))
    return sources, TensorMapping(tuple(f"source{i}" for i in range(len(sources))), targets, tuple(steps))


def joinable(shapes, axis):
    return len({(len(s), s[:axis], s[axis + 1 :]) for s in shapes}) == 1


def numbers(shapes, seed=0, dtype=np.uint16):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1 << 16, shape).astype(np.uint16).view(dtype) for shape in shapes]


def same(a, b):
    """Equal bit for bit, NaNs and zeros of both signs included."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@given(chains(), st.sampled_from([np.uint16, DTYPES["bfloat16"], np.float16]))
@settings(max_examples=250, deadline=None)
def test_shapes_foretell_apply_and_the_inverse_undoes_it(chain, dtype):
    shapes, mapping = chain
    arrays = numbers(shapes, dtype=dtype)
    made = mapping.apply(arrays)
    assert [array.shape for array in made] == mapping.shapes(shapes)
    assert len(made) == len(mapping.targets)
    back = mapping.inverse()
    assert (back.sources, back.targets) == (mapping.targets, mapping.sources)
    assert back.shapes([array.shape for array in made]) == [tuple(shape) for shape in shapes]
    assert all(same(a, b) for a, b in zip(back.apply(made), arrays, strict=True))
    again = back.inverse()
    assert all(same(a, b) for a, b in zip(again.apply(arrays), made, strict=True))
    assert again.shapes(shapes) == mapping.shapes(shapes)


@given(chains())
@settings(max_examples=60, deadline=None)
def test_maps_of_lazy_weights_there_and_back(chain):
    shapes, mapping = chain
    arrays = numbers(shapes)
    loads = []

    def weight(index, array):
        return Weight(array.shape, array.dtype, lambda: loads.append(index) or array)

    sources = {name: weight(i, array) for i, (name, array) in enumerate(zip(mapping.sources, arrays))}
    targets = apply_map((mapping,), sources)
    assert tuple(targets) == mapping.targets
    again = apply_map(inverse((mapping,)), targets)
    assert tuple(again) == mapping.sources
    assert not loads, "nothing may be read before it is asked for"
    for name, array in zip(mapping.sources, arrays):
        assert again[name].shape == array.shape
        assert again[name].dtype == array.dtype
        assert same(again[name].load(), array)
    for target in targets.values():
        assert target.load().shape == target.shape


@given(chains())
@settings(max_examples=60, deadline=None)
def test_views_share_memory_until_something_must_be_laid_together(chain):
    shapes, mapping = chain
    arrays = numbers(shapes)
    made = mapping.apply(arrays)
    copying = (Join, Stack, Reshape)

    def copies(step):
        inner = step.steps if isinstance(step, Each) else (step.step,) if isinstance(step, First) else ()
        return isinstance(step, copying) or any(copies(part) for part in inner if part is not None)

    if not any(copies(step) for step in mapping.steps):
        for array in made:
            assert any(np.shares_memory(array, source) for source in arrays)


def test_what_is_promised_as_a_view_is_one():
    (square,) = numbers([(4, 6)])
    for mapping in (
        rename("a", "b"),
        rename("a", "b", TRANSPOSE),
        rename("a", "b", Reshape((4, 6), (2, 2, 6))),
        split("a", ["b", "c"], Split((1, 3))),
        split("a", ["b", "c"], Split((2, 4), axis=1)),
        split("a", ["b", "c", "d", "e"], Unstack(4)),
        split("a", ["b", "c"], Repeat(2)),
    ):
        assert all(np.shares_memory(array, square) for array in mapping.apply([square])), mapping
        assert mapping.apply([square])[0].base is not None or mapping.apply([square])[0] is square
    assert rename("a", "b").apply([square])[0] is square


def test_splits_are_where_they_are_said_to_be():
    array = np.arange(24).reshape(4, 6)
    first, second = Split((1, 3)).apply([array])
    assert np.array_equal(first, array[:1])
    assert np.array_equal(second, array[1:])
    left, right = Split((4, 2), axis=1).apply([array])
    assert np.array_equal(left, array[:, :4])
    assert np.array_equal(right, array[:, 4:])
    assert np.array_equal(Permute((1, 0)).apply([array])[0], array.T)
    assert np.array_equal(Stack(2).apply([array, array + 1])[0][1], array + 1)
    assert Permute((2, 0, 1)).shapes([(5, 6, 7)]) == [(7, 5, 6)]
    assert Permute((2, 0, 1)).inverse() == Permute((1, 2, 0))


@pytest.mark.parametrize(
    ("mapping", "shapes"),
    [
        (rename("their.weight", "ours", TRANSPOSE), [(3,)]),
        (rename("their.weight", "ours", Reshape((2, 3), (6,))), [(3, 2)]),
        (split("their.weight", ["ours", "ours.b"], Split((2, 3))), [(6,)]),
        (split("their.weight", ["ours", "ours.b"], Split((2, 3), axis=1)), [(5,)]),
        (split("their.weight", ["ours", "ours.b"], Unstack(2)), [(3, 2)]),
        (split("their.weight", ["ours", "ours.b"], Unstack(2)), [()]),
        (stack(["their.weight", "their.second"], "ours"), [(3, 2), (2, 3)]),
        (TensorMapping(("their.weight", "their.second"), ("ours",), (Join((1, 2)),)), [(1, 4), (3, 4)]),
        (TensorMapping(("their.weight", "their.second"), ("ours",), (Join((1, 2)),)), [(1, 4), (2, 5)]),
        (TensorMapping(("their.weight", "their.second"), ("ours",), (Join((1, 2), axis=1),)), [(1,), (2,)]),
        (TensorMapping(("their.weight", "their.second"), ("ours",), (Merge(2),)), [(1, 4), (2, 4)]),
        (TensorMapping(("their.weight", "their.second"), ("ours", "two"), (Each((None,)),)), [(1,), (1,)]),
        (TensorMapping(("their.weight", "their.second"), ("ours", "two"), (Each((TRANSPOSE, None)),)), [(1,), (1,)]),
        (TensorMapping(("their.weight", "their.second"), ("ours",), (Split((1, 1)),)), [(2,), (2,)]),
        (TensorMapping(("their.weight", "their.second"), ("ours", "two"), (First(1, 1, TRANSPOSE),)), [(1,), (1, 1)]),
    ],
)
def test_wrong_shapes_are_refused_by_the_tensors_names(mapping, shapes):
    with pytest.raises(CheckpointError) as caught:
        mapping.shapes(shapes)
    message = str(caught.value)
    assert "their.weight" in message
    assert "ours" in message
    assert "\n" not in message
    sources = {name: Weight(shape, np.dtype(np.float32), lambda: pytest.fail("read")) for name, shape in zip(mapping.sources, shapes)}
    with pytest.raises(CheckpointError, match="wrong shape"):
        apply_map((mapping,), sources)


def test_missing_tensors_are_named():
    names = [f"layers.{i}.weight" for i in range(5)]
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight, layers\.1\.weight, layers\.2\.weight and 2 more missing"):
        apply_map(tuple(rename(name, f"ours.{name}") for name in names), {})
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\.weight missing"):
        apply_map((rename(names[0], "ours"),), {})


def test_shared_weights_that_became_different_are_not_written_under_one_name():
    mapping = split("shared", ["a", "b", "c"], Repeat(3)).inverse()
    one, other = numbers([(2, 3)]) * 2, numbers([(2, 3)], seed=1)
    assert mapping.apply([one[0], one[0], one[0].copy()])[0] is one[0]
    with pytest.raises(CheckpointError, match="become different"):
        mapping.apply([one[0], one[1], other[0]])


def test_shared_weights_with_nan_are_still_equal_to_themselves():
    array = np.array([1.0, np.nan], np.float32)
    assert Merge(2).apply([array, array.copy()])[0] is array


def test_a_stack_is_taken_apart_once_however_many_names_it_gives():
    reads = []

    def expert(index):
        def load():
            reads.append(index)
            return np.full((2, 3), index, np.float32)

        return Weight((2, 3), np.dtype(np.float32), load)

    sources = {f"theirs.{index}": expert(index) for index in range(16)}
    canonical = apply_map((stack(sources, "ours"),), sources)
    back = apply_map(inverse((stack(sources, "ours"),)), canonical)
    for name in sources:
        assert np.array_equal(back[name].load(), np.full((2, 3), int(name.split(".")[1])))
    assert len(reads) == 16
    assert np.array_equal(back["theirs.3"].load(), np.full((2, 3), 3))  # and it can be asked for again
