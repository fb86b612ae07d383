"""Fused Programs on the native backend: the bits of one op at a time, with fewer meetings of threads; and what a lean step checks."""

import functools

import ml_dtypes
import msgspec
import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu import CpuBackend, CpuSession
from hasten.backends.cpu.backend import PAGE, native_program
from hasten.backends.cpu.compile import compile_program
from hasten.backends.reference import ReferenceBackend
from hasten.base.errors import ConfigError, UnsupportedError, UserError
from hasten.checkpoint import load
from hasten.engine.stepper import Stepper
from hasten.formats.weights import Weight, Weights
from hasten.model import Model
from hasten.program import Batch, Formats, Products, RowChain, lower, unfuse
from hasten.spec import Attention, Block, Embedding, GatedMLP, Head, PreNorm, RMSNorm, Rotary, Sandwich, SlidingWindow, Spec
from tests.ops.packing import POOL, all_packed

LEVELS = _native.available_isas()
FORMATS = pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
RMS = RMSNorm(eps=1e-5)
NAN = 300  # the token whose embedding is no number


def awkward_spec():
    """Widths that fill no tile, norms of q and k in heads, a gate on attention, a window, a row that is a block by itself."""
    mixer = Attention(
        heads=6, kv_heads=2, head_dim=18, value_dim=18, scale=0.25, position=Rotary(base=1e4, dims=10), q_norm=RMS, k_norm=RMS, gate=True,
        bias=True,
    )  # fmt: skip
    window = msgspec.structs.replace(mixer, visible=SlidingWindow(size=9), gate=False, position=None)
    small, wide = GatedMLP(hidden=203, activation="gelu_tanh"), GatedMLP(hidden=17_000, activation="silu")
    norms = Sandwich(mixer=RMS, mixer_post=RMS, feed_forward=RMS, feed_forward_post=RMS)
    return Spec(
        vocab=NAN + 1, width=75, context=64, embedding=Embedding(scale=3.0), norm=RMS, head=Head(tied=False),
        blocks=(Block(mixer=mixer, feed_forward=small, wiring=PreNorm(mixer=RMS, feed_forward=RMS)), Block(window, wide, norms)),
    )  # fmt: skip


@functools.cache
def awkward():
    rng, spec = np.random.default_rng(3), awkward_spec()
    arrays = {
        name: (rng.standard_normal(shape) * (1.0 if len(shape) == 1 else shape[-1] ** -0.5)).astype(ml_dtypes.bfloat16)
        for name, shape in lower(spec).params.items()
    }
    arrays["embedding.weight"][NAN] = np.nan
    return Model(
        "awkward", spec, Weights({name: Weight(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()})
    )


@functools.cache
def model(name):
    return awkward() if name == "awkward" else load(name)


def session(name, weights, *, fused, threads=2, isa="best", most_tokens=64, pages=64):
    """A session of the Program as it is, or fused; its arena and chains' blocks hold NaN."""
    spec = model(name).spec
    program = native_program(spec, 64, Formats(weights))
    assert {type(op) for op in program.ops} >= {Products, RowChain}
    if not fused:
        program = unfuse(program)
    pool = _native.ThreadPool(threads)
    counts = {group.name: pages for group in program.states}
    compiled = compile_program(
        program, model(name).weights, all_packed(pool), pool, isa=isa, most_tokens=most_tokens, page=PAGE, pages=counts
    )  # fmt: skip
    made = Stepper(CpuSession(program, compiled, pool))
    if name == "awkward":
        assert np.isnan(made.score(Batch.of([[NAN] * 64]))).all()
    return made


def played(session, ids):
    """Logits of a prompt beside others, of what follows in chunks, and of single tokens."""
    state = session.start(3)
    first, state = session.step(Batch.of([ids[:20], ids[20:21], ids[21:40]]), state)
    second, state = session.step(Batch.of([ids[40:45], ids[45:62], ids[62:63]], [20, 1, 19], rows="last"), state)
    last = state.select([1])
    third, last = session.step(Batch.of([ids[63:64]], [18]), last)
    none, last = session.step(Batch.of([ids[64:65]], [19], rows="none"), last)
    assert none.shape[0] == 0
    fourth, last = session.step(Batch.of([ids[65:66]], [20]), last)
    return np.concatenate([first, second, third, fourth])


@FORMATS
@pytest.mark.parametrize(("name", "isa"), [*(("awkward", isa) for isa in LEVELS), ("code-8m", LEVELS[0])])
def test_fused_and_plain_give_the_same_bits(name, weights, isa):
    ids = np.random.default_rng(5).integers(0, min(NAN, model(name).spec.vocab), 70).tolist()
    plain = played(session(name, weights, fused=False, threads=1, isa=isa), ids)
    assert np.isfinite(plain).all()
    for threads in (1, 2):
        assert np.array_equal(played(session(name, weights, fused=True, threads=threads, isa=isa), ids), plain)


def test_the_awkward_model_is_near_the_reference():
    ids = np.random.default_rng(6).integers(0, NAN, 50).tolist()
    expected = ReferenceBackend().session(awkward(), 64).score(Batch.of([ids]))
    assert np.abs(session("awkward", "bf16", fused=True).score(Batch.of([ids])) - expected).max() <= 5e-2 * np.abs(expected).max()


def meetings(session, batch):
    state = session.start(len(batch.offsets) - 1)
    for sequence in state.sequences:
        assert session.cache.grow(sequence.pages, 5)
    tables = [_native.PageTable(sequence.pages.tables) for sequence in state.sequences]
    logits = np.empty((len(batch.rows), session.session.vocab), np.float32)
    return session.session.compiled.tape.run(batch.tokens, batch.positions, batch.offsets, batch.rows, tables, logits)


def test_threads_meet_less_often_fused():
    plain, fused = (session("code-8m", "int8", fused=fused) for fused in (False, True))
    prompt, token = Batch.of([[1, 2, 3, 4, 5]] * 8), Batch.of([[1]])
    assert meetings(plain, prompt) > 1.8 * meetings(fused, prompt)
    assert meetings(fused, token) < meetings(fused, prompt)  # where there is one row, one thread goes on alone
    layers = len(model("code-8m").spec.blocks)
    assert meetings(fused, token) <= 8 * layers + 2
    assert plain.session.compiled.tape.ops - 1 == len(plain.session.program.ops)  # and the table of cosines
    assert fused.session.compiled.tape.ops - 1 == len(fused.session.program.ops)


@FORMATS
def test_a_batch_longer_than_a_step_gives_the_same_bits(weights):
    ids = np.random.default_rng(7).integers(0, NAN, 60).tolist()
    batch = Batch.of([ids, ids[3:9], ids[9:10], ids[1:50]])
    some = Batch(batch.tokens, batch.positions, batch.offsets, np.array([0, 5, 23, 24, 59, 66, 115], np.int32))
    whole = session("awkward", weights, fused=True, most_tokens=128).score(batch)
    for most in (24, 23, 7):
        cut = session("awkward", weights, fused=True, most_tokens=most)
        assert np.array_equal(cut.score(batch), whole)
        assert np.array_equal(cut.score(some), whole[some.rows])


def replaced(batch, **arrays):
    names = ("tokens", "positions", "offsets", "rows")
    return Batch(*(np.array(arrays.get(name, getattr(batch, name)), np.int32) for name in names))


REFUSED = {
    "token id 301 is outside": {"tokens": [1] * 39 + [301]},
    "token id -1 is outside": {"tokens": [1, -1] + [1] * 38},
    "do not follow one another": {"positions": [*range(30), *range(5), 6, *range(6, 10)]},
    "position -1 is beyond": {"positions": [0, -1, *range(2, 30), *range(10)]},
    "sequence 1 goes on at position 3": {"positions": [*range(30), *range(3, 13)]},
    "logit row 40 is no row": {"rows": [40]},
    "logit row -1 is no row": {"rows": [-1, 3]},
    "rows must rise": {"rows": [3, 3]},
    "as many positions": {"tokens": [1] * 39},
    "a batch of 3 sequences": {"offsets": [0, 30, 35, 40]},
    "from 0 to the number of tokens": {"offsets": [0, 30, 39]},
    "sequence 0 has no tokens": {"offsets": [0, 0, 40], "positions": [0, *range(39)]},
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_refused_batch_changes_nothing(said):
    here = session("awkward", "bf16", fused=True, most_tokens=16)
    batch = Batch.of([[5] * 30, [6] * 10])
    expected = here.score(batch)
    state = here.start(2)
    with pytest.raises(ConfigError, match=said):
        here.step(replaced(batch, **REFUSED[said]), state)
    assert [sequence.length for sequence in state.sequences] == [0, 0]
    assert np.array_equal(here.step(batch, state)[0], expected)


def test_pages_run_out_and_come_back():
    here = session("awkward", "bf16", fused=True, pages=5)
    state = here.start(2)
    with pytest.raises(UserError, match="5 pages of .* are all in use"):
        here.step(Batch.of([[1] * 40, [2] * 40]), state)
    del state
    assert [pool.free for pool in here.cache.pools] == [5] * len(here.cache.pools)
    assert np.isfinite(here.score(Batch.of([[1] * 64]))).all()


@pytest.mark.row("memory safety", "native code refuses what does not fit")
def test_page_tables_that_point_outside_are_refused():
    here = session("awkward", "bf16", fused=True)
    batch, logits = Batch.of([[1] * 17]), np.empty((17, here.session.vocab), np.float32)
    groups, tape = len(here.cache.groups), here.session.compiled.tape
    for pages, said in (([0], "too short"), ([0, 64], "page 64 is outside"), ([-1, 0], "page -1 is outside")):
        with pytest.raises(ValueError, match=said):
            tape.run(batch.tokens, batch.positions, batch.offsets, batch.rows, [_native.PageTable([pages] * groups)], logits)
    with pytest.raises(ValueError, match="list per state group"):
        tape.run(batch.tokens, batch.positions, batch.offsets, batch.rows, [_native.PageTable([[]] * (groups + 1))], logits)


def test_what_a_tape_does_not_join():
    tape = _native.Tape(_native.ThreadPool(1), "best", 4096, 16, 8, 16)
    tape.open_chain(16, 0)
    with pytest.raises(ValueError, match="close comes before"):
        tape.open_products()
    with pytest.raises(ValueError, match="cannot be joined"):
        tape.attend(0, 0, 0, 0, 1, 1, 4, 4, 1.0, 0, 0.0, [], [])
    tape.add(0, 64, 128, 4)
    tape.select_rows(0, 128, 4)
    with pytest.raises(ValueError, match="the same rows"):
        tape.close()


def test_products_of_rows_that_nobody_rounded_are_refused():
    program = lower(model("code-8m").spec, context=64, cache="bfloat16")
    counts = {group.name: 4 for group in program.states}
    with pytest.raises(UnsupportedError, match="accepted are bf16"):
        compile_program(program, model("code-8m").weights, all_packed(POOL), POOL, isa="best", most_tokens=16, page=PAGE, pages=counts)


def test_a_backends_session_plays_the_fused_program():
    assert CpuBackend().session(load("code-8m"), 64, Formats("int8")).program == native_program(load("code-8m").spec, 64, Formats("int8"))
