"""What the planner counts of a device against what is allocated there: tensors that are alive, whoever made them."""

import dataclasses
import gc

import pytest
import torch

from hasten.backends.cuda.backend import INTERPRETED, CudaBackend
from hasten.backends.cuda.inputs import Bucket, buckets
from hasten.backends.cuda.kernels.cache import PAGE
from hasten.backends.cuda.kernels.linear import default_order
from hasten.backends.cuda.products import products_of
from hasten.backends.cuda.tape import compile_tape
from hasten.backends.cuda.tuned import TunedLinear
from hasten.program import Batch, Formats
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
    """Once every bucket came, to the byte; before that less."""
    session = backend.session(model_named(name, tmp_path), 64, formats)
    planned = backend.arena_bytes(session.program, 4)
    assert session.step_bytes < planned
    for bucket in buckets(4):
        session._player("logits", bucket)
    assert session.step_bytes == planned


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
    met = {Bucket.of(Batch.of([[1] * 4] * count, rows="last")) for count in range(1, 60)}
    met |= {Bucket.of(Batch.of([[1] * count], rows="last")) for count in range(1, 200)}
    assert met <= set(buckets(256))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba2"])
def test_weights_take_what_is_planned(name, tmp_path, backend):
    session = backend.session(model_named(name, tmp_path), 64)
    weights = session.weights
    linear = [x for each in weights._linear.values() for x in (each.codes, each.scales, each.zeros) if x is not None]
    taken = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in [*weights._plain.values(), *linear]}
    assert backend.weight_bytes(session.program) == sum(taken.values())
