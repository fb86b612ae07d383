"""What a native step does with arrays that ask for the impossible, and with numbers that are none: an error or a defined result."""

import dataclasses

import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu import CpuBackend
from hasten.formats.weights import Weight, Weights
from hasten.program import Batch, Formats
from tests.pure.test_checkpoint import tiny

MODEL = tiny()
VOCAB, CONTEXT, PAGE = MODEL.spec.vocab, 48, 16
every_isa = pytest.mark.parametrize("isa", _native.available_isas())
FORMATS = [
    "f32",
    "f16",
    "bf16",
    "fp8",
    "int8",
    "int8-g64",
    "int4",
    "int4-g32-zp",
    "int3",
    "int2-zp",
    "lut4-g64",
    "bf16-sparse",
    "int8-sparse",
]
every_format = pytest.mark.parametrize("weights", FORMATS)


def table(*pages):
    return _native.PageTable([pages])


@dataclasses.dataclass
class Step:
    """What Tape.run is given: two sequences, of 3 and 18 tokens, the second over two pages."""

    tokens: np.ndarray
    positions: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    tables: list[_native.PageTable]
    logits: np.ndarray

    @classmethod
    def good(cls):
        return cls(
            np.arange(1, 22, dtype=np.int32),
            np.concatenate([np.arange(3), np.arange(18)]).astype(np.int32),
            np.array([0, 3, 21], np.int32),
            np.array([2, 20], np.int32),
            [table(4), table(2, 5)],
            np.full((2, VOCAB), np.nan, np.float32),
        )

    def run(self, session):
        session.compiled.tape.run(self.tokens, self.positions, self.offsets, self.rows, self.tables, self.logits)
        return self.logits


@pytest.fixture(scope="module")
def session():
    return CpuBackend(threads=1).session(MODEL, CONTEXT)


def put(name, index, value):
    """A step that is good but for one number."""

    def change(step):
        getattr(step, name)[index] = value

    return change


def swap(**arrays):
    """A step that is good but for whole arrays."""

    def change(step):
        for name, array in arrays.items():
            setattr(step, name, array)

    return change


def ints(*values):
    return np.array(values, np.int32)


LARGE = np.iinfo(np.int32).max
NOTHING = {"tokens": ints(), "positions": ints(), "offsets": ints(0), "rows": ints(), "logits": np.zeros((0, VOCAB), np.float32)}
REFUSED = {
    "token id too large": (put("tokens", 20, VOCAB), f"token id {VOCAB} is outside the vocabulary"),
    "token id far too large": (put("tokens", 0, LARGE), "outside the vocabulary"),
    "token id negative": (put("tokens", 7, -1), "token id -1 is outside the vocabulary"),
    "no tokens": (swap(tables=[], **NOTHING), "at least one token"),
    "no tokens of a sequence": (swap(tables=[table(4)], **NOTHING | {"offsets": ints(0, 0)}), "at least one token"),
    "no sequences": (swap(offsets=ints(0), tables=[]), "offsets"),
    "no offsets": (swap(offsets=ints()), "page table"),
    "a sequence without tokens": (swap(offsets=ints(0, 3, 3, 21), tables=[table(4), table(1), table(2, 5)]), "sequence 1 has no tokens"),
    "offsets that fall": (swap(offsets=ints(0, 22, 21)), "has no tokens"),
    "offsets from elsewhere": (put("offsets", 0, 1), "offsets"),
    "offsets beyond the tokens": (put("offsets", 2, 22), "offsets"),
    "fewer positions than tokens": (swap(positions=ints(0, 1, 2)), "as many positions"),
    "position negative": (put("positions", 0, -1), "position -1"),
    "position beyond the context": (put("positions", 20, CONTEXT), f"position {CONTEXT} is beyond the context"),
    "position far beyond": (put("positions", 20, LARGE), "beyond the context"),
    "positions with a gap": (put("positions", 20, 19), "do not follow one another"),
    "logit row negative": (put("rows", 0, -1), "logit row -1"),
    "logit row too large": (put("rows", 1, 21), "logit row 21"),
    "logit rows that fall": (swap(rows=ints(20, 2)), "rise"),
    "logits of another width": (swap(logits=np.zeros((2, VOCAB - 1), np.float32)), "logits must be"),
    "logits of too few rows": (swap(logits=np.zeros((1, VOCAB), np.float32)), "logits must be"),
    "page too large": (swap(tables=[table(4), table(2, 10**6)]), "page 1000000 is outside the cache"),
    "page negative": (swap(tables=[table(-1), table(2, 5)]), "page -1 is outside the cache"),
    "page table too short": (swap(tables=[table(4), table(2)]), "too short for its positions"),
    "page table without pages": (swap(tables=[table(), table(2, 5)]), "too short"),
    "page table of fewer groups": (swap(tables=[_native.PageTable([]), table(2, 5)]), "per state group"),
    "fewer page tables than sequences": (swap(tables=[table(4)]), "one page table per sequence"),
    "no page table": (swap(tables=[None, table(2, 5)]), "page table"),
}


@pytest.mark.row("memory safety", "native code refuses what does not fit")
@pytest.mark.parametrize("case", REFUSED)
def test_a_step_is_refused(case, session):
    expected = Step.good().run(session).copy()
    change, message = REFUSED[case]
    step = Step.good()
    change(step)
    with pytest.raises(ValueError, match=message) as caught:
        step.run(session)
    assert "\n" not in str(caught.value)
    assert np.array_equal(Step.good().run(session), expected)  # and nothing is left behind


@pytest.mark.parametrize("logits", [np.zeros((2, VOCAB)), np.zeros((4, VOCAB), np.float32)[::2], np.zeros((2, VOCAB), np.int32), None])
def test_logits_that_cannot_be_written_in_place_are_refused(logits, session):
    step = Step.good()
    step.logits = logits
    with pytest.raises(TypeError):
        step.run(session)


@pytest.mark.parametrize("wrong", [np.int64, np.uint32, np.float32, "strided", "square", "list"], ids=str)
@pytest.mark.parametrize("field", ["tokens", "positions", "offsets", "rows"])
def test_arrays_of_another_type_are_refused(field, wrong, session):
    step = Step.good()
    given = getattr(step, field)
    spoilt = {"strided": np.repeat(given, 2)[::2], "square": given[None], "list": given.tolist()}
    setattr(step, field, spoilt[wrong] if wrong in spoilt else given.astype(wrong))
    with pytest.raises(TypeError, match=f"{field} must be a C-contiguous array of int32 of 1 dimensions"):
        step.run(session)


def test_no_logits_asked_for(session):
    step = Step.good()
    step.rows, step.logits = ints(), np.zeros((0, VOCAB), np.float32)
    step.run(session)


def test_empty_batches_are_refused():
    for sequences in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            Batch.of(sequences)


def changed(name, change):
    """MODEL with one of its weights put through ``change``."""
    array = MODEL.weights.array(name).copy()
    change(array)
    weights = {key: MODEL.weights[key] for key in MODEL.weights} | {name: Weight(array.shape, array.dtype, lambda: array)}
    return dataclasses.replace(MODEL, weights=Weights(weights))


EMBEDDING = "embedding.weight"
PRODUCTS = ["blocks.0.mixer.q.weight", "blocks.1.feed_forward.down.weight"]


@every_isa
@every_format
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_no_numbers_stay_in_their_sequence(isa, weights, value):
    """Token 7 brings the value into every layer; a sequence without it has the bits it has alone."""

    def spoil(table):
        table[7, 3] = value

    session = CpuBackend(threads=1, isa=isa).session(changed(EMBEDDING, spoil), CONTEXT, Formats(weights=weights))
    clean, spoilt = list(range(20, 39)), [1, 2, 7, 3, 4]
    alone = session.score(Batch.of([clean]))
    assert np.isfinite(alone).all()
    both = session.score(Batch.of([spoilt, clean, spoilt]))
    assert np.array_equal(both[5:24], alone)
    assert not np.isfinite(both[2:5]).all(axis=1).any()
    assert not np.isfinite(both[26:]).all(axis=1).any()
    again = session.score(Batch.of([clean]))  # over pages that held the others
    assert np.array_equal(again, alone)


@every_isa
@every_format
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_that_are_no_numbers(isa, weights, value, name):
    """A step comes to its end, and says that something is wrong."""

    def spoil(weight):
        weight[5, 11] = value

    logits = (
        CpuBackend(threads=1, isa=isa).session(changed(name, spoil), CONTEXT, Formats(weights=weights)).score(Batch.of([list(range(9))]))
    )
    assert not np.isfinite(logits).all()
