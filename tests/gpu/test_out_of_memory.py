"""Out of memory at every call of a step: requests of that step fail, all others have the tokens they have alone, and the engine lives."""

import dataclasses

import numpy as np
import pytest
import torch

from hasten import SamplingParams
from hasten.backends.cuda import moving
from hasten.backends.cuda.backend import INTERPRETED, CudaBackend
from hasten.backends.cuda.drawer import DeviceLogits
from hasten.backends.cuda.inputs import StepInputs
from hasten.backends.cuda.session import CudaSession, _Player
from hasten.backends.cuda.tape import Tape
from hasten.engine.batching import ByPriority, Continuous
from hasten.engine.engine import Engine
from hasten.engine.plan import Costs, Settings
from hasten.program import Batch, StateLostError
from hasten.program.pages import sequence_bytes
from hasten.spec import Attention, Mamba2, RMSNorm
from tests.engine.test_engine import request
from tests.engine.test_recurrent import VOCAB
from tests.engine.test_recurrent import model_of as recurrent_model

ATTENTION = Attention(heads=2, kv_heads=1, head_dim=16, value_dim=16, scale=0.25, position=None)
STATES = Mamba2(heads=2, head_dim=16, state=16, groups=1, conv=2, norm=RMSNorm(eps=1e-6))
MODELS = {"attention": recurrent_model(ATTENTION), "attention and states": recurrent_model(ATTENTION, STATES)}
PROMPTS = [np.random.default_rng(7).integers(0, VOCAB, length).tolist() for length in (21, 18, 5)]
SETTINGS = Settings(24, Continuous(2), order=ByPriority(1e6), costs=Costs(1.0, 0.0))
"""Two at once, of which who comes later and matters more takes a place; its pages go out, which always pays."""
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


def session_of(name):
    """Of a model whose steps move pages of every kind, launched kernel by kernel, so that each can fail."""
    backend = CudaBackend() if torch.cuda.is_available() else CudaBackend(INTERPRETED)
    session = backend.session(MODELS[name], 64, cache_bytes=6 * sequence_bytes(backend.program(MODELS[name], 64), 16))
    return CudaSession(session.program, session.weights, session.pools, session.pages, session.on, None)


class Trips:
    """Counts the calls of a step, and is out of memory at number ``at``."""

    def __init__(self):
        self.at, self.names = None, []

    def __call__(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            raise torch.cuda.OutOfMemoryError("injected")

    def around(self, name, inner):
        def called(*args, **kwargs):
            self(f"before {name}")
            result = inner(*args, **kwargs)
            self(f"after {name}")
            return result

        return called


@pytest.fixture
def trips(monkeypatch):
    found = Trips()

    def play(tape):
        for launch in tape.launches:
            found(launch.func.__name__)
            launch()

    monkeypatch.setattr(Tape, "play", play)
    monkeypatch.setattr(StepInputs, "fill", found.around("fill", StepInputs.fill))
    monkeypatch.setattr(_Player, "play", found.around("play", _Player.play))
    monkeypatch.setattr(moving, "move_pages", found.around("move", moving.move_pages))
    monkeypatch.setattr(moving.Moving, "carry_out", found.around("carry out", moving.Moving.carry_out))
    return found


@dataclasses.dataclass
class Story:
    """An engine, its requests, and what became of them."""

    engine: Engine
    requests: list
    failed: set

    def step(self):
        for chunk in self.engine.step():
            if chunk.finish_reason == "error":
                assert "injected" in chunk.error
                self.failed.add(chunk.index)


def begun(session):
    """Two requests of the same beginning under way, the second of which is to give way to a third in the next step."""
    engine = Engine(session, SETTINGS, swap_bytes=1 << 24)
    story = Story(engine, [request(index, prompt, PARAMS) for index, prompt in enumerate(PROMPTS)], set())
    for one in story.requests[:2]:
        engine.submit([one], key="all", priority=0)
    while not all(one.output for one in story.requests[:2]):
        story.step()
    engine.submit([story.requests[2]], key="all", priority=9)
    return story


def ended(story):
    while story.engine.busy:
        story.step()
    assert [pool.available for pool in story.engine.cache.pools] == [pool.pages for pool in story.engine.cache.pools]
    assert [pool.free for pool in story.engine.cache.places] == [pool.pages for pool in story.engine.cache.places]
    return {one.index: tuple(one.output) for one in story.requests if one.index not in story.failed}


def alone(session):
    """The tokens of each request in an engine of its own."""
    found = {}
    for index, prompt in enumerate(PROMPTS):
        engine, one = Engine(session, SETTINGS, prefixes=False), request(index, prompt, PARAMS)
        engine.submit([one])
        while engine.busy:
            engine.step()
        found[index] = tuple(one.output)
    return found


@pytest.mark.parametrize(("name", "steps"), [("attention", 0), ("attention and states", 0), ("attention and states", 1)])
def test_out_of_memory_at_each_call_of_a_step(name, steps, trips):
    """Of the step in which one gives way to another, or of the one behind it."""
    session = session_of(name)
    expected, story = alone(session), begun(session)
    calls = tripped(story, steps, trips, None)
    assert ended(story) == expected
    assert story.engine.counters.swapped == 1
    assert steps or "before move" in calls
    lived, fallen = 0, set()
    for at in tried(calls, ("play", "dual_scan") if steps else ()):
        story = begun(session)
        assert tripped(story, steps, trips, at)[at] == calls[at]
        rest = ended(story)
        assert rest == {index: expected[index] for index in rest}
        lived += len(rest)
        fallen |= {calls[at]} if story.failed else set()
    assert lived
    assert steps or {"before carry out", "after move"} <= fallen
    assert name == "attention" or {"before play", "after play", "dual_scan"} <= fallen
    again = request(5, PROMPTS[0], PARAMS)
    story.engine.submit([again], key="all")
    assert ended(dataclasses.replace(story, requests=[again])) == {5: expected[0]}


def tripped(story, steps, trips, at):
    """The calls of the step behind ``steps`` others, out of memory at number ``at``."""
    for _ in range(steps):
        story.step()
    trips.names.clear()
    trips.at = at
    story.step()
    trips.at = None
    return list(trips.names)


def tried(calls, only):
    """Each call, but of launches alike the first; of ``only`` these names where there are any."""
    first = {}
    for at, name in enumerate(calls):
        if not only or name.split()[-1] in only:
            first.setdefault(name, at)
    return sorted(first.values())


@pytest.mark.parametrize(("name", "raised"), [("attention", torch.cuda.OutOfMemoryError), ("attention and states", StateLostError)])
def test_hidden_states_that_do_not_come_over(name, raised, monkeypatch):
    """Of a step that has been played: it cannot be played again where states moved on."""

    def injected(*_):
        raise torch.cuda.OutOfMemoryError("injected")

    session = session_of(name)
    batch, pages = Batch.of([[5, 6, 7]]), [[[0] for _ in session.program.states]]
    expected = session.hidden(batch, pages)
    with monkeypatch.context() as patched:
        patched.setattr(DeviceLogits, "numpy", injected)
        with pytest.raises(raised, match="injected"):
            session.hidden(batch, pages)
    assert np.array_equal(session.hidden(batch, pages), expected)
