"""The CUDA backend as an engine uses it, against the reference: whole models, however their batches are cut."""

import dataclasses

import numpy as np
import pytest
import torch

from hasten.backends.cuda import session as session_module
from hasten.backends.cuda.backend import INTERPRETED, CudaBackend, find_device
from hasten.backends.cuda.inputs import MOST_SEQUENCES, Bucket, StepInputs, pieces
from hasten.backends.cuda.kernels.chunks import CHUNK
from hasten.backends.cuda.kernels.experts import tell_apart
from hasten.backends.cuda.limits import limits
from hasten.backends.cuda.places import lay_out
from hasten.backends.cuda.session import NOBODY
from hasten.backends.cuda.tape import unsupported_ops
from hasten.backends.cuda.units import units_of
from hasten.backends.reference import ReferenceBackend
from hasten.base.errors import ConfigError, UnsupportedError, UserError
from hasten.checkpoint import load
from hasten.engine.stepper import Stepper
from hasten.families import all_families
from hasten.program import Batch, CopyPage, Formats, Precision, RecurrentGroup, SwapIn, SwapOut, first_pages, hidden_states, lower, ops
from tests.engine.test_recurrent import MIXERS
from tests.engine.test_recurrent import model_of as recurrent_model
from tests.families.oracles import make_checkpoint

LENGTH = 13
LINEAR_ATTENTION = MIXERS[-1]


@pytest.fixture(scope="module")
def backend():
    return CudaBackend() if torch.cuda.is_available() else CudaBackend(INTERPRETED)


def model_of(name, index, directory):
    (config,) = (family.examples[index] for family in all_families() if family.name == name)
    make_checkpoint(config, directory)
    return load(directory), np.random.default_rng(index).integers(0, config["vocab_size"], LENGTH).tolist()


SOME = [
    ("llama", 0, None, None), ("qwen2", 0, "int8", None), ("gpt2", 0, None, None), ("bloom", 1, "int4-g32", None), ("mamba", 0, None, None),
    ("mixtral", 0, "fp8", "fp8"),
]  # fmt: skip
"""In the interpreter, which takes seconds for each; on a device all there are."""
EVERY = [
    (family.name, index, weights, activations)
    for family in all_families()
    for index, example in enumerate(family.examples)
    if not unsupported_ops(lower(family.spec(example)))
    for weights, activations in (((None, None), ("int8", None), ("int4-g32", None), ("fp8", "fp8")) if index == 0 else ((None, None),))
]


@pytest.mark.parametrize(("name", "index", "weights", "activations"), EVERY if torch.cuda.is_available() else SOME)
def test_logits(name, index, weights, activations, tmp_path, backend):
    """Near the reference, and the same bits in pieces beside another sequence."""
    (model, ids), formats = model_of(name, index, tmp_path), Formats(weights, activations)
    assert backend.refusals(model) == ()
    session = backend.session(model, 32, formats)
    whole = session.score(Batch.of([ids]))
    expected = ReferenceBackend().session(model, 32, formats).score(Batch.of([ids]))
    in_bf16 = ReferenceBackend(precision=Precision(compute="bfloat16")).session(model, 32, formats).score(Batch.of([ids]))
    assert np.abs(whole - expected).mean() <= 1.2 * np.abs(in_bf16 - expected).mean()
    stepper = Stepper(session)
    logits, state = stepper.step(Batch.of([ids[3:5], ids[:7]]), stepper.start(2))
    rows = [logits[2:]]
    state = state.select([1])
    for begin, end in ((7, 8), (8, LENGTH)):
        logits, state = stepper.step(Batch.of([ids[begin:end]], [begin]), state)
        rows.append(logits)
    assert np.array_equal(np.concatenate(rows), whole)


def test_pages_are_copied_and_swapped(tmp_path, backend):
    """A sequence goes on from a copy of its page, and from one that was outside meanwhile."""
    model, ids = model_of("llama", 0, tmp_path)
    session = backend.session(model, 32)
    whole = session.score(Batch.of([ids]))
    head, tail = Batch.of([ids[:9]], rows="none"), Batch.of([ids[9:]], [9])
    groups = range(len(session.program.states))
    session.run(head, [[[0] for _ in groups]])
    session.carry_out([CopyPage(group, 0, 1) for group in groups])
    session.carry_out([SwapOut(group, 0, 7) for group in groups])
    assert np.array_equal(session.run(tail, [[[1] for _ in groups]]).numpy(), whole[9:])
    session.run(Batch.of([ids[::-1][:9]], rows="none"), [[[0] for _ in groups]])
    session.carry_out([SwapIn(group, 7, 2) for group in groups])
    assert np.array_equal(session.run(tail, [[[2] for _ in groups]]).numpy(), whole[9:])


@pytest.mark.parametrize("mixer", ["mamba2", "linear attention"])
def test_a_recurrence_in_chunks_goes_on_from_anywhere(mixer, tmp_path, backend):
    """Near the reference and the same bits when cut within chunks and across their ends, and from a copy of a state within a chunk."""
    model = model_of("mamba2", 0, tmp_path)[0] if mixer == "mamba2" else recurrent_model(LINEAR_ATTENTION)
    ids = np.random.default_rng(2).integers(0, model.spec.vocab, CHUNK + 9).tolist()
    session = backend.session(model, 96, cache_bytes=1 << 24)
    whole = session.score(Batch.of([ids]))
    expected = ReferenceBackend().session(model, 96).score(Batch.of([ids]))
    in_bf16 = ReferenceBackend(precision=Precision(compute="bfloat16")).session(model, 96).score(Batch.of([ids]))
    assert np.abs(whole - expected).mean() <= 1.2 * np.abs(in_bf16 - expected).mean()
    groups, rows = range(len(session.program.states)), []
    assert {type(group) for group in session.program.states} == {RecurrentGroup}
    for begin, end in ((0, 11), (11, CHUNK - 1), (CHUNK - 1, CHUNK), (CHUNK, CHUNK + 1), (CHUNK + 1, len(ids))):
        rows.append(session.run(Batch.of([ids[begin:end]], [begin]), [[[0] for _ in groups]]).numpy())
        if end == CHUNK - 1:
            session.carry_out([CopyPage(group, 0, 1) for group in groups])
    assert np.array_equal(np.concatenate(rows), whole)
    assert np.array_equal(session.run(Batch.of([ids[CHUNK - 1 :]], [CHUNK - 1]), [[[1] for _ in groups]]).numpy(), whole[CHUNK - 1 :])


def test_experts_read_nothing_for_rows_of_nobody(tmp_path, backend):
    """They fill a bucket, and choose none."""
    model, ids = model_of("mixtral", 0, tmp_path)
    session, batch = backend.session(model, 32), Batch.of([ids[:5]])
    session.run(batch, [[[0]]])
    bucket = Bucket.of(batch)
    told = [launch for launch in session._player("logits", bucket).tape.launches if launch.func is tell_apart]
    assert told
    chosen = {op.top_k for op in session.program.ops if isinstance(op, ops.Route)}
    assert bucket.rows > 5
    assert {int(launch.args[1].counts.sum()) for launch in told} == {5 * count for count in chosen}


def test_hidden_states(tmp_path, backend):
    model, ids = model_of("llama", 0, tmp_path)
    session, batch = backend.session(model, 32), Batch.of([ids], rows="last")
    expected = ReferenceBackend().session(model, 32).hidden(batch, first_pages(session.program, batch, session.page, session.pages))
    rows = session.hidden(batch, first_pages(session.program, batch, session.page, session.pages))
    assert np.abs(rows - expected).max() <= 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_rows_of_nobody_leave_no_trace(name, tmp_path, backend):
    """What a tape is warmed up with, so that no batch meets a kernel that was never compiled: keys, values and states stay as they were."""
    model, ids = model_of(name, 0, tmp_path)
    session = backend.session(model, 32)
    session.score(Batch.of([ids]))
    kept = [x.clone() for pool in session.pools.values() for x in pool.tensors]
    assert any(x.float().abs().sum() for x in kept)
    player = session._player("logits", Bucket.of(Batch.of([ids])))
    with torch.inference_mode():
        player.play(NOBODY, (), session.drawer.drawn)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x for pool in session.pools.values() for x in pool.tensors), strict=True))


def test_out_of_memory_while_a_tape_is_made(tmp_path, backend, monkeypatch):
    """The step that asked for it fails, with nothing kept of it; the next is as ever."""
    model, ids = model_of("llama", 0, tmp_path)
    session, batch = backend.session(model, 32), Batch.of([ids[:4]], rows="last")
    with monkeypatch.context() as patched:
        patched.setattr(StepInputs, "__init__", injected)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            session.run(batch, [[[0]]])
    assert [bucket for _, bucket in session._tapes] == [Bucket(1, 1, 1)]
    assert np.array_equal(session.run(batch, [[[0]]]).numpy(), session.score(batch))


def test_out_of_memory_while_a_model_is_opened(tmp_path, backend, monkeypatch):
    model, _ = model_of("llama", 0, tmp_path)
    monkeypatch.setattr(session_module, "compile_tape", injected)  # not the planner's, which takes no memory
    with pytest.raises(UserError, match=r"does not hold .*weights take [\d,]+ bytes.*--max-model-len"):
        backend.session(model, 32)


def injected(*_):
    raise torch.cuda.OutOfMemoryError("injected")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a device")
def test_a_captured_step_has_the_bits_of_a_launched_one(tmp_path, backend):
    model, ids = model_of("llama", 0, tmp_path)
    session = backend.session(model, 32)
    for batch in (Batch.of([ids[:4]]), Batch.of([ids[2:6]]), Batch.of([ids[5:8], ids[:1]])):
        player, pages = session._player("logits", Bucket.of(batch)), first_pages(session.program, batch, session.page, session.pages)
        session.run(batch, pages)
        session.settle()
        assert player.replay is not None
        with torch.inference_mode():
            replayed = player.play(batch, pages, session.drawer.drawn).cpu().numpy()
            player.tape.inputs.fill(batch, pages)
            player.result.fill_(float("nan"))
            player.tape.play()
        assert np.array_equal(player.result[: len(batch.rows)].cpu().numpy(), replayed)


def test_what_is_out_of_range(tmp_path, backend):
    model, ids = model_of("llama", 0, tmp_path)
    session = backend.session(model, 32)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        session.score(Batch.of([[*ids, 10**6]]))
    with pytest.raises(ConfigError, match="beyond the context of 32"):
        session.run(Batch.of([ids], [25]), [[[0, 1, 2] for _ in session.program.states]])


def test_limits_are_measured(backend):
    copied, multiplied = limits(backend.on.device, "f32", 1 << 20)
    assert 0.1 < copied < 1e5
    assert 1e-3 < multiplied < 1e5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device():
    with pytest.raises(UnsupportedError, match=r"needs an NVIDIA GPU.*--backend cpu"):
        find_device()


def test_doctor_is_told_of_every_kind_of_product():
    told = CudaBackend(INTERPRETED).kernels()
    assert told["int4 × int8"].startswith("triton; not cublas: reads dense weights alone")
    assert "batch" in told["bf16 × bf16"]
    assert len(told) == 7
    assert told["fp8 × fp8"].startswith("triton; not cublas: ")
    assert "not scaled_mm: is cut by its library, so a row's bits would depend on its batch" in told["fp8 × fp8"]
    old = CudaBackend(dataclasses.replace(INTERPRETED, capability=(8, 6))).kernels()
    for product in ("fp8 × bf16", "fp8 × fp8"):
        assert old[product].startswith("none: ")
        assert "8.9" in old[product]


# --- what a tape is made of


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "gpt_oss", "falcon", "mpt"])
@pytest.mark.parametrize(("weights", "activations"), [("bf16", None), ("int8", None), ("fp8", "fp8")])
def test_units_play_every_op_once_and_hide_what_nobody_else_reads(name, weights, activations, tmp_path):
    model, _ = model_of(name, 0, tmp_path)
    program = CudaBackend(INTERPRETED).program(model, 32, Formats(weights, activations))
    units = units_of(program)
    assert sorted(map(repr, (part for unit in units for part in unit.parts))) == sorted(map(repr, program.ops))
    written, hidden = set(program.inputs), {name for unit in units for name, _ in unit.inner}
    for unit in units:
        assert set(unit.inputs) <= written
        written |= set(unit.outputs)
    assert not hidden & {*program.outputs, *(name for unit in units for name in unit.inputs)}
    if weights != "bf16":
        assert hidden
        rounding = ops.QuantizeRows if weights == "int8" else ops.QuantizeFp8
        assert any(isinstance(unit.parts[-1], rounding) and len(unit.parts) > 1 for unit in units)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "falcon", "phi3"])
def test_values_that_live_together_lie_apart(family, tmp_path):
    """Every byte belongs to one value at a time, but for pieces of one."""
    model, _ = model_of(family, 0, tmp_path)
    program = hidden_states(CudaBackend(INTERPRETED).program(model, 32, Formats("int8")))
    units = units_of(program)
    layout = lay_out(program, units, Bucket(12, 12, 12))
    whole = {piece: unit.parts[0].x for unit in units if isinstance(unit.parts[0], ops.Split) for piece in unit.outputs}

    def root(name):
        return root(whole[name]) if name in whole else name

    owner = np.full(layout.size, "", dtype=object)
    for index, unit in enumerate(units):
        for name in unit.outputs:
            if name in layout.places and name not in whole:
                assert not owner[its_bytes(layout.places[name])].any(), f"{name} is written over what is needed still"
                owner[its_bytes(layout.places[name])] = name
            elif name in whole:
                assert (owner[its_bytes(layout.places[name])] == root(name)).all(), f"{name} lies outside of what it is a piece of"
        needed = {root(name) for later in units[index + 1 :] for name in later.inputs}
        for name in set(owner) - {""} - needed:
            owner[owner == name] = ""
    assert layout.size < sum(place.rows * int(np.prod(place.features)) * place.dtype.itemsize for place in layout.places.values()) / 2


def its_bytes(place):
    size, numbers = place.dtype.itemsize, int(np.prod(place.features))
    row = np.arange(place.first * size, (place.first + numbers) * size)
    return (place.start + np.arange(place.rows)[:, None] * place.width * size + row).ravel()


def test_buckets_are_few_and_take_what_comes():
    random = np.random.default_rng(0)
    met = set()
    for _ in range(300):
        lengths = random.integers(1, 40, random.integers(1, 30))
        batch = Batch.of([[1] * length for length in lengths], rows=["all", "last", "none"][random.integers(3)])
        bucket = Bucket.of(batch)
        assert bucket.rows >= len(batch.tokens)
        assert bucket.sequences >= len(lengths)
        assert bucket.wanted >= len(batch.rows)
        assert bucket.rows <= 1.5 * len(batch.tokens) + 15
        met.add(bucket.rows)
    assert len(met) <= 22
    assert Bucket.of(Batch.of([[1]])) == Bucket(1, 1, 1)


def test_pieces_are_the_batch():
    random = np.random.default_rng(1)
    for rows in (1, 7, 64, 10_000):
        lengths = random.integers(1, 30, 2 * MOST_SEQUENCES if rows == 10_000 else 9)
        batch = Batch.of([random.integers(0, 99, length).tolist() for length in lengths], random.integers(0, 9, len(lengths)).tolist())
        wanted = np.sort(random.choice(len(batch.tokens), 5, replace=False)).astype(np.int32)
        batch = Batch(batch.tokens, batch.positions, batch.offsets, wanted)
        made = pieces(batch, [[[number]] for number in range(len(lengths))], rows)
        assert np.array_equal(np.concatenate([part.tokens for part, _ in made]), batch.tokens)
        assert np.array_equal(np.concatenate([part.positions for part, _ in made]), batch.positions)
        owners = [lists[0][0] for part, its in made for lists, count in zip(its, np.diff(part.offsets)) for _ in range(count)]
        assert owners == np.repeat(np.arange(len(lengths)), lengths).tolist()
        begins = np.cumsum([0, *(len(part.tokens) for part, _ in made)])
        assert np.array_equal(np.concatenate([part.rows + begin for (part, _), begin in zip(made, begins)]), wanted)
        assert max(len(part.tokens) for part, _ in made) <= rows
        assert max(len(its) for _, its in made) <= MOST_SEQUENCES
        assert len(made) > 1


def test_inputs_are_filled_whole(tmp_path):
    """What an earlier, larger batch left is gone."""
    model, _ = model_of("llama", 0, tmp_path)
    groups = CudaBackend(INTERPRETED).program(model, 64).states
    inputs = StepInputs(Bucket(8, 4, 4), groups, 64, 16, [4], torch.device("cpu"))
    inputs.fill(Batch.of([[5, 6, 7, 8], [9, 10, 11, 12]], [3, 20], rows="last"), [[[3]], [[4, 5]]])
    inputs.fill(Batch.of([[7, 8], [9]], [0, 17], rows="last"), [[[2]], [[1, 0]]])
    assert inputs.tokens.tolist() == [7, 8, 9, -1, -1, -1, -1, -1]
    assert inputs.positions.tolist() == [0, 1, 17, 0, 0, 0, 0, 0]
    assert inputs.sequence.tolist() == [0, 0, 1, -1, -1, -1, -1, -1]
    assert inputs.rows.tolist() == [1, 2, -1, -1]
    assert inputs.offsets.tolist() == [0, 2, 3, 3, 3]
    assert inputs.pages[groups[0].name].tolist() == [[2, -1, -1, -1], [1, 0, -1, -1], *[[-1] * 4] * 2]
    assert inputs.tiles[4].tolist()[:4] == [[0, 2], [2, 1], [3, 4], [7, 1]]
