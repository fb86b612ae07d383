"""The native cache: its formats against the reference, who holds which page, and sequences that go on after a fork."""

import gc
import itertools

import numpy as np
import pytest
import torch

from hasten import _native
from hasten.backends.cpu import CpuBackend
from hasten.backends.cpu.backend import PAGE, STEP_TOKENS
from hasten.backends.reference import ReferenceBackend
from hasten.backends.reference.attention import as_cached
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load
from hasten.engine import LLM, SamplingParams
from hasten.engine.stepper import Stepper
from hasten.formats.cache import CACHE_FORMATS, ROW_FORMATS
from hasten.measure import Evaluation, cut_windows, held_out, score_windows
from hasten.program import Batch, Formats
from tests.families.oracles import make_checkpoint

MODEL = load("code-8m")
IDS = np.random.default_rng(0).integers(0, MODEL.spec.vocab, 150).tolist()
CACHES = pytest.mark.parametrize("cache", CACHE_FORMATS)
WINDOW = 50


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A small model all of whose layers see 50 tokens."""
    directory = tmp_path_factory.mktemp("windowed")
    config = {
        "model_type": "mistral", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 4096, "sliding_window": WINDOW,
    }  # fmt: skip
    make_checkpoint(config, directory)
    return load(directory)


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


# --- formats


@pytest.mark.parametrize("form", ROW_FORMATS)
def test_the_reference_rounds_as_the_codec(form):
    rng = np.random.default_rng(2)
    rows = (rng.standard_normal((50, 3, 13)) * np.geomspace(1e-12, 1e12, 50)[:, None, None]).astype(np.float32)
    rows[3, 0, 4], rows[4, 1, 2], rows[5] = np.nan, -np.inf, 0
    if form == "float16":
        rows = np.clip(rows, -6e4, 6e4)
    codec = ROW_FORMATS[form]
    kept = codec.decode(*codec.encode(rows)).astype(np.float32)
    assert np.array_equal(as_cached(torch.from_numpy(rows), form).numpy(), kept, equal_nan=True)


@CACHES
def test_logits_are_near_the_reference_of_the_same_cache(cache):
    """fp8 has 3 bits of mantissa, so a key that bf16 weights move a little may round to its neighbour."""
    native = CpuBackend().session(MODEL, 256, Formats(cache=cache)).score(Batch.of([IDS]))
    reference = {name: ReferenceBackend().session(MODEL, 256, Formats(cache=name)).score(Batch.of([IDS])) for name in CACHE_FORMATS}
    assert relative(native, reference[cache]) <= {"bf16": 2e-2, "int8": 4e-2, "fp8": 8e-2}[cache]
    error = {name: float(np.abs(native - logits).mean()) for name, logits in reference.items()}
    other = "fp8" if cache != "fp8" else "bf16"
    assert error[cache] < 0.75 * error[other]


def test_a_page_is_what_the_program_says_it_costs():
    for cache in CACHE_FORMATS:
        session = CpuBackend().session(MODEL, 64, Formats(cache=cache))
        per_token = sum(group.bytes_per_token() for group in session.program.states)
        assert sum(pool.page_bytes for pool in session.compiled.pools) == per_token * PAGE
        assert per_token == {"bf16": 8 * 2 * 2 * 64 * 2, "int8": 8 * 2 * 2 * (64 + 2), "fp8": 8 * 2 * 2 * (64 + 2)}[cache]


def test_held_out_loss():
    windows = cut_windows(MODEL, held_out(), 256, 2000)
    loss = {
        cache: Evaluation.of(list(score_windows(MODEL, windows, window=256, backend="cpu", formats=Formats(cache=cache)))).loss
        for cache in CACHE_FORMATS
    }
    assert 0 < abs(loss["int8"] - loss["bf16"]) <= 0.003
    assert 0 < abs(loss["fp8"] - loss["bf16"]) <= 0.02


@pytest.mark.parametrize(("weights", "cache"), list(itertools.product(["bf16", "int8"], ["int8", "fp8"])))
def test_the_same_bits_however_the_batch_is_cut(weights, cache):
    sessions = [Stepper(CpuBackend(threads=threads).session(MODEL, 256, Formats(weights, cache=cache))) for threads in (1, 2)]
    whole = sessions[0].score(Batch.of([IDS]))
    assert np.isfinite(whole).all()
    for session, seed in itertools.product(sessions, range(2)):
        cuts = sorted(np.random.default_rng(seed).choice(np.arange(1, len(IDS)), 5, replace=False).tolist())
        state, rows = session.start(3), []
        for begin, end in zip([0, *cuts], [*cuts, len(IDS)]):
            if begin == 0:  # the first piece beside two other prompts, the rest alone
                logits, state = session.step(Batch.of([IDS[7:19], IDS[:end], IDS[50:51]], [0, 0, 0]), state)
                rows.append(logits[12 : 12 + end])
                state = state.select([1])
            else:
                logits, state = session.step(Batch.of([IDS[begin:end]], [begin]), state)
                rows.append(logits)
        assert np.array_equal(np.concatenate(rows), whole)


def test_caches_that_are_refused():
    for call in (
        lambda: CpuBackend().session(MODEL, 64, Formats(cache="int5")),
        lambda: ReferenceBackend().session(MODEL, 64, Formats(cache="int5")),
        lambda: LLM(MODEL, formats=Formats(cache="int5")),
    ):
        with pytest.raises(UnsupportedError, match="cache 'int5' is not supported; accepted are bf16, int8, fp8"):
            call()
    with pytest.raises(ValueError, match="cache format is 'int5'; accepted: bf16, int8, fp8"):
        _native.PagePool("int5", 1, 1, 16, 1, 4, 4)
    with pytest.raises(ValueError, match="at least one"):
        _native.PagePool("int8", 1, 0, 16, 1, 4, 4)


def test_an_engine_keeps_its_cache_as_asked():
    completions = {
        cache: LLM(MODEL, backend="cpu", formats=Formats(cache=cache)).generate([IDS[:40]], SamplingParams(max_tokens=12))[0].token_ids
        for cache in CACHE_FORMATS
    }
    assert {len(tokens) for tokens in completions.values()} == {12}


# --- pages and their holders (tests/pure/test_simulation.py has who holds which)


@CACHES
def test_a_fork_goes_on_as_if_it_had_never_been_one(cache):
    session = Stepper(CpuBackend().session(MODEL, 256, Formats(cache=cache)))
    copied = spy_on_copies(session)
    tails = [IDS[40:60], IDS[60:61], IDS[70:110]]
    alone = [session.score(Batch.of([IDS[:37] + tail]))[37:] for tail in tails]
    free = session.cache.pools[0].free
    _, state = session.step(Batch.of([IDS[:37]], rows="none"), session.start(1))
    state = state.select([0, 0, 0])
    assert free - session.cache.pools[0].free == 3  # 37 tokens, once
    logits, state = session.step(Batch.of(tails, [37] * 3), state)
    assert np.array_equal(logits, np.concatenate(alone))
    assert len(copied) == 2  # the last to write has the page to itself
    logits, state = session.step(Batch.of([IDS[:5]], [38]), state.select([1]).select([0]))
    assert np.array_equal(logits, session.score(Batch.of([IDS[:37] + tails[1] + IDS[:5]]))[38:])
    assert len(copied) == 2
    del state
    gc.collect()
    assert session.cache.pools[0].free == free


def spy_on_copies(stepper):
    copied, carry_out = [], stepper.session.carry_out

    def seen(moves):
        copied.extend(moves)
        carry_out(moves)

    stepper.session.carry_out = seen
    return copied


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    session = Stepper(CpuBackend().session(MODEL, 256))
    copied = spy_on_copies(session)
    _, state = session.step(Batch.of([IDS[:32]], rows="none"), session.start(1))
    logits, _ = session.step(Batch.of([IDS[40:50], IDS[50:60]], [32, 32]), state.select([0, 0]))
    assert np.array_equal(logits[:10], session.score(Batch.of([IDS[:32] + IDS[40:50]]))[32:])
    assert not copied


def test_native_copies_of_pages():
    pool = _native.PagePool("int8", 2, 3, 4, 1, 4, 4)
    assert pool.page_bytes == 2 * 4 * (4 + 4 + 4)
    for pages in ((0, 3), (-1, 0), (3, 0)):
        with pytest.raises(ValueError, match="outside the cache"):
            pool.copy_page(*pages)
    pool.copy_page(1, 1)
    kept = np.random.default_rng(5).integers(0, 256, (3, pool.page_bytes), np.uint8)
    for page, data in enumerate(kept):
        pool.write_page(page, data)
    pool.copy_page(0, 2)
    read = np.zeros_like(kept)
    for page, into in enumerate(read):
        pool.read_page(page, into)
    assert np.array_equal(read, kept[[0, 1, 0]])
    for wrong in ((3, read[0]), (-1, read[0]), (0, read[0][1:])):
        for call in (pool.read_page, pool.write_page):
            with pytest.raises(ValueError, match="outside the cache|bytes, not"):
                call(*wrong)


# --- windows


@CACHES
def test_a_window_gives_its_pages_back(windowed, cache):
    session = Stepper(CpuBackend().session(windowed, 4096, Formats(cache=cache)))
    (allocator,) = session.cache.pools
    ids = np.random.default_rng(3).integers(0, 97, 1500).tolist()
    free, fewest = allocator.free, allocator.free
    state, rows, at = session.start(1), [], 0
    for count in itertools.cycle([1, 3, 40, 200, 16]):
        if at == len(ids):
            break
        logits, state = session.step(Batch.of([ids[at : at + count]], [at]), state)
        rows.append(logits)
        at = min(at + count, len(ids))
        fewest = min(fewest, allocator.free)
    assert free - fewest <= (WINDOW + 200) // PAGE + 2
    assert free - allocator.free <= WINDOW // PAGE + 2
    assert state.sequences[0].pages.gone == [(1500 - WINDOW + 1) // PAGE]
    whole = session.score(Batch.of([ids]))  # in steps of 512, where what the first sees is gone when the last begins
    assert np.array_equal(np.concatenate(rows), whole)
    if cache == "bf16":
        assert len(ids) > 2 * STEP_TOKENS
        assert relative(whole, ReferenceBackend().session(windowed, 4096).score(Batch.of([ids]))) <= 3e-2
    forked = state.select([0, 0])
    logits, forked = session.step(Batch.of([ids[:7], ids[:7]], [1500] * 2), forked)
    assert np.array_equal(logits[:7], logits[7:])
    del state, forked
    gc.collect()
    assert allocator.free == free


# --- what must not crash


@CACHES
def test_keys_that_are_no_numbers(cache):
    """NaN and infinity in cached rows give NaN where they are seen, and nothing where they are not."""
    rng = np.random.default_rng(4)
    rows, dim = 80, 24
    codec = ROW_FORMATS[CACHE_FORMATS[cache]]
    store = np.zeros((10, 8 * 2 * codec.row_bytes(dim)), np.uint8)
    k, v, q = (rng.standard_normal((rows, dim)).astype(np.float32) for _ in range(3))
    k[70, 3], v[71, 5] = np.nan, np.inf
    table = np.arange(10, dtype=np.int32)
    _native.append_kv(store, cache, 8, 1, k, v, np.arange(rows))
    for isa in ("generic", _native.isa_level("best")):
        for at in (69, 75):
            y = np.full((1, dim), 7.0, np.float32)
            _native.attend(isa, store, cache, 8, 1, dim, dim, table, q[at : at + 1], at, 0.2, y)
            assert np.isfinite(y).all() == (at == 69)


def test_a_table_that_points_outside():
    store, ones = np.zeros((2, 8 * 2 * 8), np.uint8), np.ones((1, 4), np.float32)
    for table in ([5], [-1]):
        with pytest.raises(ValueError, match="table must name pages"):
            _native.attend("generic", store, "int8", 8, 1, 4, 4, np.array(table, np.int32), ones, 0, 1.0, ones.copy())
    session = CpuBackend().session(MODEL, 64, Formats(cache="int8"))
    for table, said in (([10**6, 0], "page 1000000 is outside the cache"), ([0], "too short"), ([0, -1], "page -1 is outside")):
        with pytest.raises(ConfigError, match=said):
            session.run(Batch.of([IDS[:20]]), [[table]])
