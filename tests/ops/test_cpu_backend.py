"""The native backend against the reference: same Programs, same numbers, and the same bits however a batch is cut."""

import concurrent.futures
import functools

import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu import CpuBackend, unsupported_ops
from hasten.backends.reference import ReferenceBackend
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load
from hasten.engine.stepper import Stepper
from hasten.program import Batch, Formats, lower
from hasten.program.arena import Arena
from tests.cuts import assert_the_same_bits_however_cut

MODEL = load("code-8m")
IDS = np.random.default_rng(0).integers(0, MODEL.spec.vocab, 150).tolist()
ORDER = ["generic", "avx2", "avx512", "amx"]
LEVELS = ORDER[: ORDER.index(_native.isa_level("best")) + 1]


@functools.cache
def reference(weights, activations):
    return ReferenceBackend().session(MODEL, 256, Formats(weights, activations)).score(Batch.of([IDS]))


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(
    ("weights", "activations", "tolerance"),
    [
        ("f32", None, 1e-2), ("f16", None, 1e-2), ("bf16", None, 2e-2), ("fp8", None, 2e-2), ("int8", None, 5e-2), ("int8", "bf16", 2e-2),
        ("int8-g64", None, 5e-2), ("int4", None, 5e-2), ("int4", "bf16", 2e-2), ("int4-g32-zp", None, 5e-2), ("int3-g32", "bf16", 3e-2),
        ("int2-g32-zp", None, 5e-2), ("lut4-g32", None, 5e-2), ("lut4", "bf16", 3e-2),
        ("bf16-sparse", None, 2e-2), ("int8-sparse", None, 5e-2), ("int4-sparse", None, 5e-2),
    ],
)  # fmt: skip
def test_logits_are_near_the_reference(isa, weights, activations, tolerance):
    """Both play the same formats; what is left is the cache in bf16, which moves some activations to the next int8."""
    session = CpuBackend(isa=isa).session(MODEL, 256, Formats(weights, activations))
    expected = reference(weights, activations)
    logits = session.score(Batch.of([IDS]))
    assert relative(logits, expected) <= tolerance
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() >= 0.93
    assert any(f"weight_format={weights}" in line for line in session.program.text().splitlines()) or weights == "bf16"


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_formats_cost_what_they_should(weights):
    plain = reference(None, None)
    logits = CpuBackend().session(MODEL, 256, Formats(weights)).score(Batch.of([IDS]))
    assert relative(logits, plain) <= {"bf16": 2e-2, "int8": 6e-2, "int4": 0.5}[weights]
    assert (logits.argmax(-1) == plain.argmax(-1)).mean() >= {"bf16": 0.97, "int8": 0.93, "int4": 0.7}[weights]


@pytest.mark.row("nondeterminism", "the same tokens however played")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4", "lut4-g64"])
def test_the_same_bits_however_the_batch_is_cut(weights):
    sessions = [CpuBackend(threads=threads).session(MODEL, 256, Formats(weights)) for threads in (1, 2)]
    assert_the_same_bits_however_cut(sessions, IDS)


def test_pages_come_back():
    session = Stepper(CpuBackend().session(MODEL, 256))
    before = [pool.free for pool in session.cache.pools]
    state = session.start(2)
    _, state = session.step(Batch.of([IDS[:40], IDS[:3]]), state)
    assert [pool.free for pool in session.cache.pools] == [free - 4 for free in before]
    state = state.select([1])
    assert [pool.free for pool in session.cache.pools] == [free - 1 for free in before]
    del state
    assert [pool.free for pool in session.cache.pools] == before


def test_more_tokens_than_a_step_takes():
    session = CpuBackend().session(MODEL, 2048)
    ids = np.random.default_rng(1).integers(0, MODEL.spec.vocab, 700).tolist()
    expected = ReferenceBackend().session(MODEL, 2048).score(Batch.of([ids]))
    assert relative(session.score(Batch.of([ids, ids[:5]]))[:700], expected) <= 2e-2


def test_what_a_step_refuses():
    session = Stepper(CpuBackend().session(MODEL, 64))
    with pytest.raises(ConfigError, match="8192"):
        session.step(Batch.of([[8192]]), session.start(1))
    with pytest.raises(ConfigError, match="beyond the context"):
        session.step(Batch.of([[1]], [64]), _at(session, 64))
    with pytest.raises(ConfigError, match="position 5"):
        session.step(Batch.of([[1]], [5]), session.start(1))


def _at(session, length):
    state = session.start(1)
    assert session.cache.grow(state.sequences[0].pages, length)
    state.sequences[0].pages.length = length
    return state


def test_what_the_backend_refuses():
    with pytest.raises(UnsupportedError, match="int5"):
        CpuBackend().session(MODEL, 64, Formats("int5"))
    with pytest.raises(ValueError, match="threads"):
        CpuBackend(threads=10_000).session(MODEL, 64)
    with pytest.raises(ValueError, match="isa"):
        CpuBackend(isa="vax").session(MODEL, 64)


def test_unsupported_ops_are_named():
    from tests.pure.specs import SPECS

    missing = {name: unsupported_ops(lower(spec)) for name, spec in SPECS.items()}
    assert {name for name, reasons in missing.items() if reasons} == {"mixer-relative"}
    assert "AttendRelative" in missing["mixer-relative"]
    assert unsupported_ops(lower(MODEL.spec)) == ()


def test_arena_never_gives_two_values_one_place():
    rng, arena, taken = np.random.default_rng(0), Arena(), {}
    for _ in range(2000):
        if taken and rng.random() < 0.5:
            offset = int(rng.choice(list(taken)))
            taken.pop(offset)
            arena.give_back(offset)
        else:
            count = int(rng.integers(1, 5000))
            offset = arena.take(count)
            assert offset % 64 == 0
            assert all(offset + count <= other or other + size <= offset for other, size in taken.items())
            taken[offset] = count
    assert arena.size >= max(offset + count for offset, count in taken.items())


def test_steps_from_two_python_threads_wait_for_each_other():
    session = CpuBackend(threads=2).session(MODEL, 256)
    prompts = [IDS[:40], IDS[60:100]]
    alone = [session.score(Batch.of([prompt])) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        for _ in range(5):
            for made, expected in zip(executor.map(lambda prompt: session.score(Batch.of([prompt])), prompts), alone, strict=True):
                assert np.array_equal(made, expected)
