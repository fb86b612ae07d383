"""Graphs of steps: who records them, when, and what becomes of those that fail. What is recorded here is played again as it was."""

import gc
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hasten import SamplingParams
from hasten.backends.cuda import backend as module
from hasten.backends.cuda import graphs
from hasten.backends.cuda.backend import INTERPRETED, CudaBackend
from hasten.backends.cuda.graphs import DeviceRecorder
from hasten.backends.cuda.inputs import Bucket
from hasten.backends.cuda.kernels import rows as kernels
from hasten.backends.cuda.session import CudaSession, _Player
from hasten.checkpoint import load
from hasten.engine import LLM
from hasten.engine.batching import Continuous
from hasten.engine.engine import Engine
from hasten.engine.plan import Settings
from hasten.families import all_families
from hasten.measure.latency import Case, Trial, open_runner
from hasten.measure.throughput import Workload, run_workload
from hasten.program import Batch, Formats, first_pages
from tests.engine.test_engine import finish, request
from tests.engine.test_recurrent import MIXERS
from tests.engine.test_recurrent import model_of as recurrent_model
from tests.families.oracles import make_checkpoint


class Recording:
    """Records what it is given when it ``may``, in whatever thread. ``given`` and ``replayed`` are players."""

    def __init__(self, error=None):
        self.may, self.error = threading.Event(), error
        self.given, self.replayed, self.threads = [], [], set()
        self.may.set()

    def record(self, play):
        player = weakref.ref(play.__self__)
        self.given.append(player)
        self.threads.add(threading.current_thread())
        assert self.may.wait(60)
        if self.error is not None:
            raise self.error

        def replay():
            self.replayed.append(player)
            player().launch()

        return replay


@pytest.fixture(scope="module")
def backend():
    return CudaBackend() if torch.cuda.is_available() else CudaBackend(INTERPRETED)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def model_named(name, directory):
    if name == "recurrent":
        return recurrent_model(*MIXERS)
    config = next(family.examples[0] for family in all_families() if family.name == name)
    if not (directory / name).exists():
        make_checkpoint(config, directory / name)
    return load(directory / name)


def session_of(backend, model, recorder):
    opened = backend.session(model, 64)
    return CudaSession(opened.program, opened.weights, opened.pools, opened.pages, opened.on, recorder)


def logits_of(session, batch):
    """Into results that hold nothing."""
    session.room.results.fill_(float("nan"))
    return session.run(batch, first_pages(session.program, batch, session.page, session.pages)).numpy()


SHORT, LONGER = Batch.of([[5, 6, 7]], rows="last"), Batch.of([[*range(11)]], rows="last")


def test_steps_are_launched_until_a_graph_is_there(backend, directory):
    """Each size of a step is recorded once, after its first, in a thread of its own that is gone when nothing waits."""
    recording = Recording()
    recording.may.clear()
    session = session_of(backend, model_named("llama", directory), recording)
    session.make_ready()
    assert not recording.given
    short, longer = (session._player("logits", Bucket.of(batch)) for batch in (SHORT, LONGER))
    first, others = logits_of(session, SHORT), logits_of(session, LONGER)
    assert np.array_equal(logits_of(session, SHORT), first)
    assert (recording.replayed, short.replay, longer.replay) == ([], None, None)
    worker = session._recordings._thread
    recording.may.set()
    session.settle()
    assert recording.threads == {worker}
    assert worker is not threading.current_thread()
    assert not worker.is_alive()
    assert [player() for player in recording.given] == [short, longer]
    for batch, player, logits in ((SHORT, short, first), (LONGER, longer, others), (SHORT, short, first)):
        assert np.array_equal(logits_of(session, batch), logits)
        assert recording.replayed.pop()() is player
    session.hidden(SHORT, first_pages(session.program, SHORT, session.page, session.pages))
    session.settle()
    assert len(recording.given) == 3  # of hidden states is another tape


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_tokens_are_the_same(name, backend, directory, monkeypatch):
    """Where a step in the middle of outputs is the first that is replayed, and where none is."""
    launched = []
    launch = _Player.launch
    monkeypatch.setattr(_Player, "launch", lambda player: (launched.append(player), launch(player))[1])
    prompts = [np.random.default_rng(number).integers(0, 50, length).tolist() for number, length in enumerate((9, 4, 7))]
    params, found = [SamplingParams(max_tokens=4, temperature=number % 2, ignore_eos=True) for number in range(3)], []
    for recorder in (None, recording := Recording()):
        session = session_of(backend, model_named(name, directory), recorder)
        launched.clear()
        engine = Engine(session, Settings(16, Continuous(2)))
        asked = [request(index, *each) for index, each in enumerate(zip(prompts, params))]
        for one in asked:
            engine.submit([one])
        while engine.busy and not all(one.output for one in asked[:2]):
            engine.step()
        session.settle()
        assert any(not one.finish_reason for one in asked[:2])
        finish(engine)
        found.append([one.output for one in asked])
    assert found[0] == found[1]
    assert [len(each) for each in found[0]] == [4, 4, 4]
    assert 0 < len(recording.replayed) < len(launched)


def test_a_recorder_that_fails_leaves_the_session_alive_and_is_told_once(backend, directory, caplog):
    recording = Recording(torch.cuda.OutOfMemoryError("no memory\nfor graphs"))
    session = session_of(backend, model_named("llama", directory), recording)
    first = logits_of(session, SHORT)
    session.settle()
    for _ in range(2):
        assert np.array_equal(logits_of(session, SHORT), first)
        logits_of(session, LONGER)
        session.settle()
    assert len(recording.given) == 2  # each is tried once
    assert not recording.replayed
    (said,) = (record.getMessage() for record in caplog.records)
    assert "kernel by kernel" in said
    assert "OutOfMemoryError: 'no memory\\nfor graphs'" in said


def test_steps_go_on_where_no_thread_can_be_started(backend, directory, caplog, monkeypatch):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    recording = Recording()
    session = session_of(backend, model_named("llama", directory), recording)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        first = logits_of(session, SHORT)
    session.settle()
    assert np.array_equal(logits_of(session, SHORT), first)
    assert not recording.given
    assert [record.getMessage().count("can't start new thread") for record in caplog.records] == [1]
    logits_of(session, LONGER)
    session.settle()
    assert len(recording.given) == 1


def test_what_is_recorded_ends_with_the_session(backend, directory):
    """What was under way comes to its end, what waited does not begin, and nothing of the session is kept."""
    recording = Recording()
    recording.may.clear()
    session = session_of(backend, model_named("llama", directory), recording)
    for batch in (SHORT, LONGER):
        logits_of(session, batch)
    worker, gone = session._recordings._thread, [weakref.ref(session), weakref.ref(session._player("logits", Bucket.of(LONGER)))]
    del session
    gc.collect()
    assert [each() for each in gone] == [None, None]
    recording.may.set()
    worker.join(60)
    assert not worker.is_alive()
    assert len(recording.given) == 1
    gc.collect()
    assert recording.given[0]() is None


# --- that a graph may be captured at any time, while other threads play


class Allocations(TorchDispatchMode):
    """Ops whose results lie in memory that was not there before."""

    def __init__(self):
        super().__init__()
        self.new = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if any(x.untyped_storage().data_ptr() not in given for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            self.new.append(str(func))
        return result


@pytest.fixture
def launches(monkeypatch):
    """Launches are noted instead, by thread: kernel, grid, and all that is given, tensors by where and how they lie."""
    noted = threading.local()

    def run(self, *args, grid, warmup, **settings):
        given = [*args, *sorted(settings.items())]
        noted.found.append((self.fn.__name__, grid, *(told(each) for each in given)))

    def told(each):
        return (each.data_ptr(), each.dtype, tuple(each.shape), each.stride()) if isinstance(each, torch.Tensor) else each

    def of(work):
        noted.found = []
        with torch.inference_mode():
            work()
        return noted.found

    of.patch = lambda: monkeypatch.setattr(type(kernels._norm), "run", run)
    return of


PLAYED = [("llama", "int8"), ("llama", None), ("gpt_oss", None), ("deepseek_v3", "int4-g32"), ("falcon", None), ("recurrent", None)]


@pytest.mark.parametrize(("name", "weights"), PLAYED)
def test_what_is_launched_depends_on_the_bucket_alone(name, weights, backend, directory, launches):
    """Whatever was asked last, nothing is allocated, and two threads at once launch the same."""
    session = backend.session(model_named(name, directory), 64, Formats(weights))
    batches = [Batch.of([[1, 2, 3, 4, 5], [6]], [0, 30], rows="last"), Batch.of([[9, 8], [7, 6, 5, 4, 3, 2]], [17, 0], rows="last")]
    (bucket,) = {Bucket.of(batch) for batch in batches}
    player, found = session._player("logits", bucket), []
    launches.patch()
    for batch in batches:
        pages = first_pages(session.program, batch, session.page, session.pages)
        player.tape.inputs.fill(batch, pages)
        found.append(launches(player.launch))
    assert found[0] == found[1]
    assert len(found[0]) > 10
    with Allocations() as allocations:
        launches(player.launch)
        assert allocations.new == []
        launches(lambda: torch.zeros(3))
        assert allocations.new
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: [launches(player.launch) == found[0] for _ in range(5)], range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert both == [[True] * 5] * 2


# --- who measures


@pytest.fixture
def counted(monkeypatch, directory):
    """A recording, and steps that were launched kernel by kernel, none of them for a replay."""
    recording, launched = Recording(), []
    launch = _Player.launch
    monkeypatch.setattr(_Player, "launch", lambda player: (launched.append(player), launch(player))[1])
    monkeypatch.setattr(module, "recorder_for", lambda device: recording)
    if not torch.cuda.is_available():
        monkeypatch.setattr(module, "find_device", lambda: INTERPRETED)
    model_named("llama", directory)
    return lambda: (len(launched) - len(recording.replayed), len(recording.replayed))


def test_what_bench_latency_times_is_replayed(counted, directory):
    trial = Trial(open_runner(load(directory / "llama"), [Case(2, 9, 3)], backend="cuda"), Case(2, 9, 3))
    (before, some), _ = counted(), trial.time()
    assert counted() == (before, some + 4)


def test_what_bench_throughput_times_is_replayed(counted, directory):
    llm, steps = LLM(directory / "llama", backend="cuda", context=40, max_sequences=2), []
    found = run_workload(llm, Workload(4, 5, 2, 6), "continuous", False, lambda tokens: steps.append(counted()))
    assert {launched for launched, _ in steps} == {steps[0][0]}
    assert steps[-1][1] >= found.steps


# --- on a device


class Graph:
    """What a CUDA graph is asked, in order."""

    asked = []

    def capture_begin(self, *, capture_error_mode):
        self.asked.append(f"begin {capture_error_mode}")

    def capture_end(self):
        self.asked.append("end")

    def replay(self):
        self.asked.append("replay")


class Anything:
    """A stream that is made current."""

    device = None

    def __enter__(self):
        Graph.asked.append("stream")

    def __exit__(self, *_):
        Graph.asked.append("back")


def test_a_capture_that_fails_is_ended(monkeypatch):
    """One at a time, other threads unharmed; a graph that failed stays alive."""
    monkeypatch.setattr(Graph, "asked", [])
    monkeypatch.setattr(graphs, "SPOILED", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Anything())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(graphs, "_make_handles", lambda device: Graph.asked.append("handles"))
    recorder, told = DeviceRecorder(torch.device("cuda", 0)), Graph.asked

    def play():
        told.append(f"play {graphs.CAPTURING.locked()} {torch.is_inference_mode_enabled()}")

    recorder.record(play)()
    assert told == ["stream", "handles", "begin thread_local", "play True True", "end", "back", "replay"]
    told.clear()

    def failing():
        raise torch.cuda.OutOfMemoryError("injected")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        recorder.record(failing)
    assert told == ["stream", "handles", "begin thread_local", "end", "back"]
    assert len(graphs.SPOILED) == 1
    assert not graphs.CAPTURING.locked()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a device")
def test_captured_while_steps_go_on(backend, directory):
    """The same bits before, meanwhile and after."""
    session = session_of(backend, model_named("llama", directory), DeviceRecorder(backend.on.device))
    player, expected = session._player("logits", Bucket.of(SHORT)), logits_of(session, SHORT)
    until, launched = time.monotonic() + 60, 0
    while player.replay is None and time.monotonic() < until:
        assert np.array_equal(logits_of(session, SHORT), expected)
        launched += 1
    assert launched
    assert player.replay is not None
    assert np.array_equal(logits_of(session, SHORT), expected)
