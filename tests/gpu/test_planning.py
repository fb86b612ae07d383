"""What the planner counts of a device against what is allocated there: tensors that are alive, whoever made them."""

import dataclasses
import gc

import numpy as np
import pytest
import torch

from hasten.backends.cuda import backend as module
from hasten.backends.cuda.backend import INTERPRETED, CudaBackend
from hasten.backends.cuda.drawer import DeviceDrawer, DeviceLogits
from hasten.backends.cuda.inputs import SCORED_TOKENS, Bucket, buckets
from hasten.backends.cuda.kernels.cache import PAGE
from hasten.backends.cuda.kernels.linear import default_order
from hasten.backends.cuda.products import products_of
from hasten.backends.cuda.session import HIDDEN_TOKENS, STEP_TOKENS
from hasten.backends.cuda.tape import compile_tape
from hasten.backends.cuda.tuned import TunedLinear
from hasten.engine import LLM
from hasten.program import Batch, Formats, Wanted
from tests.engine.test_recurrent import MIXERS
from tests.engine.test_recurrent import model_of as recurrent_model
from tests.gpu.test_backend import model_of

LONG = 1100
"""A context of more parts of attention than one."""
FAMILIES = ["llama", "bloom", "mixtral", "gpt_oss", "deepseek_v3", "recurrent"]


def model_named(name, directory):
    return recurrent_model(*MIXERS) if name == "recurrent" else model_of(name, 0, directory)[0]


def alive():
    """Bytes of memory that tensors have, by where it begins."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
    return {each.data_ptr(): each.nbytes() for each in storages if each.nbytes()}


@pytest.fixture(scope="module")
def backend():
    return CudaBackend(INTERPRETED)


@pytest.mark.parametrize(("name", "formats"), [*((name, None) for name in FAMILIES), ("llama", Formats("fp8", "fp8"))])
def test_a_tape_has_what_it_says(name, formats, tmp_path, backend):
    session = backend.session(model_named(name, tmp_path), 64, formats)

    def compiled(bucket):
        return compile_tape(session.program, session.weights, session.pools, bucket, session.on, PAGE, session.room)

    for bucket in (Bucket(2, 2, 2), Bucket(48, 48, 48), Bucket(96, 8, 8)):
        compiled(bucket)  # what is brought over for it stays there
        before = alive()
        tape = compiled(bucket)
        made = {begin: size for begin, size in alive().items() if begin not in before}
        on_the_host = tape.inputs._whole.untyped_storage().data_ptr()
        assert sum(size for begin, size in made.items() if begin != on_the_host) == tape.nbytes
        assert tape.nbytes > 0


@pytest.mark.parametrize(("name", "formats"), [*((name, None) for name in FAMILIES), ("llama", Formats("fp8", "fp8"))])
def test_steps_take_what_is_planned(name, formats, tmp_path, backend):
    """Once every bucket came, of hidden states too, to the byte; before that less."""
    session = backend.session(model_named(name, tmp_path), 64, formats)
    planned = backend.arena_bytes(session.program, 96)
    for what, most in (("logits", 96), ("hidden", 64)):
        assert session.step_bytes < planned
        for bucket in buckets(most):
            session._player(what, bucket)
    assert session.step_bytes == planned


def test_rows_of_logits_lie_in_the_room_that_tapes_share(tmp_path, backend):
    """However many are asked for: a step of many tokens gives no more than SCORED_TOKENS of them."""
    session = backend.session(model_named("llama", tmp_path), 64)
    room = session.room.results
    assert room.numel() == SCORED_TOKENS * session.program.values["logits"].features[-1]
    found = {bucket.wanted for bucket in buckets(STEP_TOKENS)}
    assert max(found) == SCORED_TOKENS
    for bucket in (Bucket(96, 8, 96), Bucket(1024, 8, SCORED_TOKENS), Bucket(STEP_TOKENS, 256, SCORED_TOKENS)):
        assert bucket in buckets(STEP_TOKENS)
        tape = compile_tape(session.program, session.weights, session.pools, bucket, session.on, PAGE, session.room)
        assert tape.outputs["logits"].data_ptr() == room.data_ptr()
        assert tape.outputs["logits"].shape[0] == bucket.wanted


@pytest.mark.parametrize("most", [1, 6, 8])
def test_drawing_takes_what_is_planned(most, tmp_path):
    """For one row, then more, all with penalties: histories of as many slots were there beside those of half as many."""
    backend = CudaBackend() if torch.cuda.is_available() else CudaBackend(INTERPRETED)
    program = backend.program(model_named("llama", tmp_path), 64)
    vocab, drawer = program.values["logits"].features[-1], DeviceDrawer(backend.on)
    wide = 1 << (most - 1).bit_length()
    for rows in range(1, most + 1):
        logits = DeviceLogits(torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)).to(backend.on.device))
        wanted = [Wanted(key=(rows, row), seed=row, position=2, frequency_penalty=0.5, prompt=(1, 2)) for row in range(rows)]
        assert not drawer.draw(logits, range(rows), wanted).left
    assert len(drawer._history.words) == wide
    before = wide // 2 * (4 * vocab + 8 * 1024)
    assert backend.drawing_bytes(program, most) == drawer.nbytes + before
    kept = {
        x.untyped_storage().data_ptr()
        for x in (drawer._history.words, drawer._history.biases, *(x for each in drawer._scratch.values() for x in each._all))
    }
    assert drawer.nbytes == sum(size for begin, size in alive().items() if begin in kept)


def test_an_llm_plans_for_drawing(tmp_path, backend, monkeypatch):
    monkeypatch.setattr(module, "find_device", lambda: INTERPRETED)
    llm = LLM(model_named("llama", tmp_path), backend="cuda", context=64, max_sequences=5, cache_bytes=1)
    (load,) = llm.loads()
    logits = 4 * load.program.values["logits"].features[-1] * (2 * 5 + 64)
    assert llm.memory_plan().arena == backend.arena_bytes(load.program, 64) + backend.drawing_bytes(load.program, 5) + logits


@pytest.mark.parametrize(("kernel", "formats"), [("cublas", None), ("semi_structured", None), ("scaled_mm", Formats("fp8", "fp8"))])
def test_it_is_planned_alike_where_a_librarys_kernel_was_measured(kernel, formats, tmp_path, backend):
    """Whatever weights turn out to be: the scratch that Triton's would need is there in any case."""
    program = backend.program(model_named("llama", tmp_path), 64, formats)
    measured = INTERPRETED.tuned
    for each in products_of(program):
        measured = measured.having(each.name, TunedLinear(default_order(each.weight(INTERPRETED.device)), kernel=kernel))
    assert measured.linear
    other = CudaBackend(dataclasses.replace(INTERPRETED, tuned=measured))
    assert other.arena_bytes(program, 4) == backend.arena_bytes(program, 4)


def test_parts_of_attention_are_counted(tmp_path, backend):
    """Of the largest bucket that shares positions out, once for all tapes."""
    model = recurrent_model(MIXERS[1])
    session = backend.session(model, 192)
    assert not session.room.parts.nbytes
    program = backend.program(model, LONG)
    parts = -(-LONG // 512)
    assert backend.arena_bytes(program, 64) > backend.arena_bytes(backend.program(model, 192), 64) + 64 * 6 * parts * (20 + 2) * 4
    session = backend.session(model, LONG)
    before = alive()
    session.run(Batch.of([[5]], [0]), [[[0]]])
    session._player("logits", Bucket(2, 2, 2))
    launches = session._player("logits", Bucket(2, 2, 2)).tape.launches
    found = [each.keywords["parts"] for each in launches if each.keywords.get("parts") is not None]
    assert found
    room = session.room.parts
    assert all(
        room.data_ptr() <= x.data_ptr() < room.data_ptr() + room.nbytes for each in found for x in (each.sums, each.totals, each.maxima)
    )
    assert room.nbytes in before.values()


def test_buckets_are_those_that_batches_come_to():
    """Whichever rows of them are asked for."""
    met = set()
    for rows in ("last", "all", "none"):
        met |= {Bucket.of(Batch.of([[1] * 4] * count, rows=rows)) for count in range(1, 60)}
        met |= {Bucket.of(Batch.of([[1] * count], rows=rows)) for count in range(1, 257)}
    some = Batch.of([[1] * 700] * 3, rows="none")
    for count in (8, 9, SCORED_TOKENS):
        met.add(
            Bucket.of(Batch(some.tokens[:2000], some.positions[:2000], np.minimum(some.offsets, 2000), np.arange(count, dtype=np.int32)))
        )
    assert met <= set(buckets(STEP_TOKENS))
    assert len(met) == 23


def test_parts_that_are_played_are_of_buckets_that_are_planned(tmp_path, backend, monkeypatch):
    """As a session cuts what it is asked."""
    session, met = backend.session(model_named("llama", tmp_path), 1100, cache_bytes=1 << 22), []

    class Met:
        def play(self, batch, *_):
            return torch.zeros(len(batch.rows), 3)

    monkeypatch.setattr(session, "_player", lambda what, bucket: met.append((what, bucket)) or Met())
    for rows in ("last", "all"):
        batch = Batch.of([[1] * 1100, [2] * 600, *[[3]] * 300], rows=rows)
        pages = [[[0]] for _ in range(302)]
        for what in ("logits", "hidden"):
            assert len(session._play(what, batch, pages)) == len(batch.rows)
    assert len(met) > 30
    assert {bucket for what, bucket in met if what == "logits"} <= set(buckets(STEP_TOKENS))
    assert {bucket for what, bucket in met if what == "hidden"} <= set(buckets(HIDDEN_TOKENS))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba2"])
def test_weights_take_what_is_planned(name, tmp_path, backend):
    session = backend.session(model_named(name, tmp_path), 64)
    weights = session.weights
    linear = [x for each in weights._linear.values() for x in (each.codes, each.scales, each.zeros) if x is not None]
    taken = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in [*weights._plain.values(), *linear]}
    assert backend.weight_bytes(session.program) == sum(taken.values())
