"""Steps planned and begun before the tokens of the ones before are known: the same outputs, whatever ends or fails meanwhile."""

import numpy as np
import pytest

from hasten import LLM, SamplingParams, load
from hasten.backends.cpu import CpuBackend
from hasten.engine import llm as llm_module
from hasten.engine.batching import ByPriority, Continuous, Static
from hasten.engine.engine import Engine
from hasten.engine.grammar import Grammar
from hasten.engine.plan import Costs, Settings
from hasten.engine.sampling import BeamSearch
from hasten.program import HostLogits, StateLostError
from tests.engine.stream import LaterSession
from tests.engine.test_engine import Faulty, finish, page_bytes, request

MODEL = load("code-8m")
RANDOM = np.random.default_rng(3)
WARM = {"temperature": 1.0, "seed": 4}
PLAIN = [
    {"max_tokens": 17}, {"max_tokens": 1}, {"max_tokens": 2, **WARM}, {"max_tokens": 30, **WARM, "top_p": 0.9, "top_k": 40},
    {"max_tokens": 25, **WARM, "repetition_penalty": 1.4, "frequency_penalty": 0.6}, {"max_tokens": 20, "presence_penalty": 1.5},
    {"max_tokens": 22, "logit_bias": {5: 4.0, 300: 100.0}, **WARM}, {"max_tokens": 40, **WARM, "stop": ["e", "\n\n"]},
    {"max_tokens": 30, "stop_token_ids": list(range(0, 8000, 8)), **WARM, "min_tokens": 9}, {"max_tokens": 13, **WARM, "echo": True},
]  # fmt: skip
HOSTED = [
    {"max_tokens": 9, **WARM, "logprobs": 2}, {"max_tokens": 7, "prompt_logprobs": 1}, {"max_tokens": 12, **WARM, "n": 3},
    {"max_tokens": 8, **WARM, "best_of": 3, "n": 2}, {"max_tokens": 10, "beam": BeamSearch(width=3), "n": 2},
    {"max_tokens": 14, **WARM, "grammar": Grammar("regex", "(x[0-9]y[a-c]){3}")},
]  # fmt: skip


def prompts_of(count):
    return [RANDOM.integers(0, MODEL.spec.vocab, int(length)).tolist() for length in RANDOM.integers(1, 60, count)]


def later_llm(monkeypatch, **settings):
    """An LLM whose sessions do their work later, and those sessions."""
    made, plainly = [], llm_module.open_session

    def opened(*arguments):
        made.append(LaterSession(plainly(*arguments)))
        return made[-1]

    monkeypatch.setattr(llm_module, "open_session", opened)
    llm = LLM(MODEL, backend="cpu", context=256, **settings)
    llm.engine()
    monkeypatch.undo()
    return llm, made[0]


ROOMS = {
    "plenty": lambda: {"max_sequences": 8},
    "chunks": lambda: {"scheduling": Settings(12, Continuous(6))},
    "short of pages": lambda: {
        "scheduling": Settings(64, Continuous(12), output_share=0.0), "cache_bytes": page_bytes(MODEL, 20),
        "swap_bytes": page_bytes(MODEL, 9),
    },
    "static": lambda: {"scheduling": Settings(64, Static(6))},
}  # fmt: skip


@pytest.mark.parametrize("room", list(ROOMS))
@pytest.mark.parametrize("asked", [PLAIN, [*PLAIN, *HOSTED]], ids=["plain", "hosted"])
def test_outputs_are_those_of_one_step_after_the_other(room, asked, monkeypatch):
    params = [SamplingParams(**each) for each in asked]
    prompts = prompts_of(len(params))
    expected = LLM(MODEL, backend="cpu", context=256, **ROOMS[room]()).generate(prompts, params)
    llm, session = later_llm(monkeypatch, **ROOMS[room]())
    assert llm.generate(prompts, params) == expected
    assert all(one.error is None for one in expected)
    engine = llm.engine()
    assert [pool.available for pool in engine.cache.pools] == [pool.pages for pool in engine.cache.pools]
    assert session.drawer.draws > 100
    assert session.overlapped > (session.steps // 2 if asked is PLAIN else 5), (session.overlapped, session.steps)
    if asked is PLAIN:
        assert not session.fetched
    if room == "short of pages":
        assert engine.counters.recomputed + engine.counters.swapped > 0


@pytest.mark.parametrize("asked", HOSTED, ids=lambda asked: [*asked][-1])
def test_what_the_host_follows_is_waited_for(asked, monkeypatch):
    """Each alone beside one that hangs on nothing, which is waited for no longer than the other is there."""
    params = [SamplingParams(**asked), SamplingParams(max_tokens=30, **WARM)]
    prompts = prompts_of(2)
    expected = LLM(MODEL, backend="cpu", context=256).generate(prompts, params)
    llm, session = later_llm(monkeypatch, max_sequences=8)
    assert llm.generate(prompts, params) == expected
    assert session.overlapped >= 30 - 14 - 2


def test_only_rows_that_the_device_leaves_are_fetched(monkeypatch):
    """Beside others, of which nothing is."""
    llm, session = later_llm(monkeypatch, max_sequences=8)
    params = [SamplingParams(max_tokens=9, **WARM), SamplingParams(max_tokens=6, logprobs=1), SamplingParams(max_tokens=9)]
    prompts = prompts_of(3)
    done = llm.generate(prompts, params)
    assert session.fetched == [1] * 6
    assert done == LLM(MODEL, backend="cpu", context=256).generate(prompts, params)


def test_what_is_drawn_for_one_that_ended_counts_for_nobody(monkeypatch):
    """An output ends by its text one step after its last token was fed; the row that was computed meanwhile is thrown away."""
    llm, session = later_llm(monkeypatch, max_sequences=4)
    params = SamplingParams(max_tokens=60, **WARM, stop=["e"])
    prompt = prompts_of(1)
    expected = LLM(MODEL, backend="cpu", context=256).generate(prompt, params)
    assert expected[0].finish_reason == "stop"
    assert llm.generate(prompt, params) == expected
    tokens = len(expected[0].token_ids)
    assert session.steps == tokens + 1
    counters = llm.engine().counters
    assert counters.computed_tokens == len(prompt[0]) + tokens - 1


def test_an_output_of_known_length_computes_nothing_more(monkeypatch):
    llm, session = later_llm(monkeypatch, max_sequences=4)
    llm.generate(prompts_of(1), SamplingParams(max_tokens=20))
    assert session.steps == 20
    assert session.overlapped == 19


def test_abandoned_streams_leave_nothing(monkeypatch):
    llm, session = later_llm(monkeypatch, max_sequences=4)
    prompts, params = prompts_of(4), SamplingParams(max_tokens=30, **WARM)
    stream = llm.stream(prompts, params)
    for _ in range(11):
        next(stream)
    stream.close()
    engine = llm.engine()
    assert not engine.busy
    assert [pool.available for pool in engine.cache.pools] == [pool.pages for pool in engine.cache.pools]
    assert llm.generate(prompts, params) == LLM(MODEL, backend="cpu", context=256).generate(prompts, params)


# --- failures


class Failing:
    """A session that cannot begin its steps of these numbers, as often as there are ``errors`` for one, nor carry out moves while it
    ``sticks``. What was begun before goes on."""

    def __init__(self, session, errors):
        self._session, self._errors = session, {step: list(each) for step, each in errors.items()}
        self.begun, self.failures, self.sticks = 0, 0, False

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run(self, batch, pages):
        if self._errors.get(self.begun + 1):
            self.failures += 1
            raise self._errors[self.begun + 1].pop(0)
        self.begun += 1
        return self._session.run(batch, pages)

    def carry_out(self, moves):
        if self.sticks and moves:
            self.failures += 1
            raise OSError("no")
        self._session.carry_out(moves)


def outputs_of(session, prompts, params):
    engine = Engine(session, Settings(32, Continuous(4)))
    requests = [request(i, prompt, params) for i, prompt in enumerate(prompts)]
    for one in requests:
        engine.submit([one], key="all")
    chunks = finish(engine)
    assert [pool.available for pool in engine.cache.pools] == [pool.pages for pool in engine.cache.pools]
    return [one.output for one in requests], {chunk.index: chunk.error for chunk in chunks if chunk.error}


def test_a_step_that_cannot_begin_is_tried_again_with_tokens_that_are_known():
    params, prompts = SamplingParams(max_tokens=14, **WARM), prompts_of(5)
    expected, _ = outputs_of(CpuBackend().session(MODEL, 256), prompts, params)
    failing = Failing(LaterSession(CpuBackend().session(MODEL, 256)), {step: [MemoryError("no room for this step")] for step in (4, 5, 11)})
    assert outputs_of(failing, prompts, params) == (expected, {})
    assert failing.failures == 3
    assert failing.overlapped > 5


def test_a_step_that_lost_its_states_ends_whose_it_was_with_the_tokens_of_the_one_before():
    """As where steps are done one after the other, and tried once: a state that moved on is no place to begin from again."""
    params, prompts, errors = SamplingParams(max_tokens=14, **WARM), prompts_of(6), {6: [StateLostError("states moved on")]}
    whole, _ = outputs_of(CpuBackend().session(MODEL, 256), prompts, params)
    at_once = Failing(CpuBackend().session(MODEL, 256), errors)
    later = Failing(LaterSession(CpuBackend().session(MODEL, 256)), errors)
    expected = outputs_of(at_once, prompts, params)
    assert outputs_of(later, prompts, params) == expected
    assert (at_once.failures, later.failures) == (1, 1)
    outputs, ended = expected
    assert set(ended.values()) == {"states moved on"}
    assert any(outputs[index] for index in ended)
    assert 0 < len(ended) < len(prompts)
    assert all(output == whole[index][: len(output) if index in ended else None] for index, output in enumerate(outputs))
    assert later.overlapped > 5


def test_nor_is_it_tried_again_where_it_was_for_another_failure():
    """What was due is known by then, and stays."""
    params, prompts, lost = SamplingParams(max_tokens=14, **WARM), prompts_of(4), StateLostError("states moved on")
    expected = outputs_of(Failing(CpuBackend().session(MODEL, 256), {9: [lost]}), prompts, params)
    session = LaterSession(CpuBackend().session(MODEL, 256))
    failing = Failing(session, {9: [MemoryError("no room"), lost, AssertionError("a third time")]})
    assert outputs_of(failing, prompts, params) == expected
    assert set(expected[1].values()) == {"states moved on"}
    assert failing.failures == 2
    assert session.events.count(("known", 8)) == 1


def giving_way(session, prompts, most):
    """An engine of one place, and a request under way in it that is to give way to another in the next step; its pages go out."""
    engine = Engine(session, Settings(64, Continuous(1), order=ByPriority(1e6), costs=Costs(1.0, 0.0)), swap_bytes=1 << 24)
    first, second = (request(i, prompt, SamplingParams(max_tokens=count, **WARM)) for i, (prompt, count) in enumerate(zip(prompts, most)))
    engine.submit([first], priority=0)
    while len(first.output) < 3:
        engine.step()
    engine.submit([second], priority=9)
    return engine, first, second


UNMOVED = "moving pages of the cache failed (OSError: 'no'); send the request again"


def test_pages_that_do_not_go_out_while_a_token_is_due_end_their_request_without_it():
    """The step goes on with the others."""
    prompts, most = prompts_of(2), (30, 8)
    whole = [outputs_of(CpuBackend().session(MODEL, 256), [prompt], SamplingParams(max_tokens=9, **WARM))[0][0] for prompt in prompts]
    failing = Failing(LaterSession(CpuBackend().session(MODEL, 256)), {})
    engine, first, second = giving_way(failing, prompts, most)
    assert first.due == 1
    failing.sticks = True
    (chunk,) = engine.step()
    failing.sticks = False
    assert (chunk.index, chunk.finish_reason, chunk.error, chunk.token_ids) == (0, "error", UNMOVED, ())
    assert (failing.failures, engine.counters.swapped) == (1, 1)
    assert first.output == whole[0][:3]
    known, begun = failing.events.index(("known", failing.steps - 1)), failing.events.index(("run", failing.steps))
    assert begun < known  # the token was waited for, behind the step that was begun without it
    chunks = finish(engine)
    assert {chunk.index for chunk in chunks} == {1}
    assert second.output == whole[1][:8]
    nothing_is_left(engine)


def test_pages_that_do_not_come_back_end_nobody_whose_last_token_is_due():
    """All that the step was to compute has failed: what the one before draws is waited for nonetheless."""
    prompts, most = prompts_of(2), (30, 5)
    whole = [outputs_of(CpuBackend().session(MODEL, 256), [prompt], SamplingParams(max_tokens=9, **WARM))[0][0] for prompt in prompts]
    failing = Failing(LaterSession(CpuBackend().session(MODEL, 256)), {})
    engine, first, second = giving_way(failing, prompts, most)
    while second.left:
        engine.step()
    assert (len(second.output), second.due, second.finish_reason) == (4, 1, None)
    failing.sticks = True
    steps = failing.steps
    chunks = engine.step()
    assert failing.failures == 1
    assert [(chunk.index, chunk.finish_reason, chunk.error) for chunk in chunks] == [(0, "error", UNMOVED), (1, "length", None)]
    assert (first.output, second.output) == (whole[0][:4], whole[1][:5])
    assert failing.steps == steps
    nothing_is_left(engine)


def nothing_is_left(engine):
    assert not engine.busy
    assert [pool.available for pool in engine.cache.pools] == [pool.pages for pool in engine.cache.pools]
    assert [pool.free for pool in engine.cache.places] == [pool.pages for pool in engine.cache.places]


@pytest.mark.parametrize("fails", ["raises", "NaN"])
def test_a_failure_is_its_own_requests(fails):
    poison, params = 4321, SamplingParams(max_tokens=12, **WARM)
    prompts = prompts_of(5)
    spoilt = [[*prompt, poison, 7] if index in {1, 4} else prompt for index, prompt in enumerate(prompts)]
    expected, _ = outputs_of(CpuBackend().session(MODEL, 256), prompts, params)
    plainly = CpuBackend().session(MODEL, 256)
    if fails == "raises":  # as the step is begun
        later = LaterSession(plainly)
        faulty = session = Faulty(later, poison, fails)
        faulty.run = begun_faultily(later, faulty)
    else:  # in what it computes
        faulty = Faulty(plainly, poison, fails)
        later = session = LaterSession(faulty)
    found, errors = outputs_of(session, spoilt, params)
    assert faulty.failures > 1
    assert errors.keys() == {1, 4}
    assert all(("poison" if fails == "raises" else "NaN") in error for error in errors.values())
    assert [found[index] for index in (0, 2, 3)] == [expected[index] for index in (0, 2, 3)]
    assert later.overlapped > 5


def begun_faultily(later, faulty):
    def run(batch, pages):
        if (batch.tokens == faulty._poison).any():
            faulty.failures += 1
            raise RuntimeError("the poison token came")
        return later.run(batch, pages)

    return run


def test_a_draw_that_cannot_begin_is_tried_alone(monkeypatch):
    """For all of a step, then for one of its outputs, which is the only one that fails."""
    params, prompts = SamplingParams(max_tokens=10, **WARM, frequency_penalty=0.5), prompts_of(3)
    expected, _ = outputs_of(CpuBackend().session(MODEL, 256), prompts, params)
    session, failed = LaterSession(CpuBackend().session(MODEL, 256)), []
    draw = session.drawer.draw

    def drawn(logits, rows, wanted):
        if any(each.key == (1, 0) and each.position == len(prompts[1]) + 4 for each in wanted):
            session.drawer.rows = {}
            failed.append(len(wanted))
            raise MemoryError("no room for these draws")
        return draw(logits, rows, wanted)

    monkeypatch.setattr(session.drawer, "draw", drawn)
    found, errors = outputs_of(session, prompts, params)
    assert sorted(set(failed)) == [1, 3]
    assert errors.keys() == {1}
    assert "no room" in errors[1]
    assert (found[0], found[1], found[2]) == (expected[0], expected[1][:4], expected[2])


def test_logits_of_the_host_are_rows_of_an_array():
    values = RANDOM.normal(size=(5, 3)).astype(np.float32)
    logits = HostLogits(values)
    assert logits.shape == (5, 3)
    assert logits.numpy() is values
    for rows in ([0, 1, 2, 3, 4], [2, 3], [3, 1, 1], [], range(1, 4)):
        assert np.array_equal(logits.numpy(rows), values[list(rows)])
    assert np.shares_memory(logits.numpy([2, 3]), values)


def test_requests_know_what_is_due():
    one = request(0, [1, 2], SamplingParams(max_tokens=3, min_tokens=2, stop_token_ids=(9,)))
    assert (one.left, one.forbidden) == (3, {9})
    one.take(4)
    assert (one.left, one.forbidden) == (2, {9})
    one.due = 1
    assert (one.left, one.forbidden) == (1, frozenset())
    one.take(5)
    assert (one.left, one.due, one.output) == (1, 0, [4, 5])
