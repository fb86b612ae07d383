"""What the engine's process does with requests, without a process: outputs, aborts at every point, tenants, and what is refused."""

import random

import pytest

from hasten import LLM, SamplingParams
from hasten.engine import BeamSearch, Grammar
from hasten.serve.messages import Piece, Submit
from hasten.serve.work import Work

PROMPTS = [[5, 6, 7], list(range(40, 140)), [9] * 17]
PARAMS = [
    SamplingParams(max_tokens=9, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=2),
    SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=2, best_of=5),
    SamplingParams(max_tokens=5, n=2, beam=BeamSearch(width=3)),
    SamplingParams(max_tokens=10, grammar=Grammar.regex("[a-c]{4}"), temperature=1.0, seed=1),
    SamplingParams(max_tokens=3, logprobs=1, prompt_logprobs=0),
]


@pytest.fixture(scope="module")
def llm():
    return LLM("code-8m", max_sequences=8)


def outputs(pieces: list[Piece]) -> dict[tuple[int, int], tuple]:
    """By request and choice: text, ids, why it ended, log-probabilities."""
    found: dict = {}
    for piece in pieces:
        text, ids, reason, logprobs = found.get((piece.id, piece.choice), ("", (), None, ()))
        assert reason is None  # nothing comes after the end
        found[piece.id, piece.choice] = text + piece.text, ids + piece.token_ids, piece.finish_reason, logprobs + piece.logprobs
    return found


def run(work: Work) -> list[Piece]:
    pieces = []
    while work.busy:
        pieces += work.step()
    return pieces


def nothing_is_held(work: Work) -> bool:
    stats = work.stats()
    return (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0.0)


def test_outputs_are_those_of_llm(llm):
    work, asked = Work(llm), [(prompt, params) for prompt in PROMPTS for params in PARAMS]
    wanted = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    pieces = [piece for id, (prompt, params) in enumerate(asked) for piece in work.submit(Submit(id, prompt, params, ""))]
    found = outputs(pieces + run(work))
    told = iter(wanted)
    for id, (_, params) in enumerate(asked):
        for choice in range(params.n):
            one = next(told)
            assert found.pop((id, choice)) == (one.text, one.token_ids, one.finish_reason, one.logprobs or ())
    assert not found
    assert nothing_is_held(work)


@pytest.mark.row("request ids and state", "canaries beside")
@pytest.mark.row("disconnects", "at every point")
@pytest.mark.row("leaked pages", "after aborts")
@pytest.mark.row("payloads and cancels", "cancelled at each stage")
def test_aborts_at_any_point_free_everything_and_change_nothing_beside_them(llm):
    work, rng = Work(llm), random.Random(5)
    canary = Submit(10**6, PROMPTS[0], SamplingParams(max_tokens=120, ignore_eos=True), "")
    (wanted,) = llm.generate([canary.prompt], canary.params)
    pieces, live, aborted = work.submit(canary), set(), 0
    for id in range(150):
        pieces += work.submit(Submit(id, rng.choice(PROMPTS), rng.choice(PARAMS), rng.choice("ab")))
        live.add(id)
        for _ in range(rng.choice([0, 0, 1, 3])):
            pieces += work.step()
        if rng.random() < 0.7:
            work.abort(gone := rng.choice(sorted(live)))
            live.discard(gone)
            aborted += 1
        work.abort(10**9)  # nobody's
    pieces += run(work)
    assert aborted > 90
    assert outputs([piece for piece in pieces if piece.id == canary.id]) == {(canary.id, 0): (wanted.text, wanted.token_ids, "length", ())}
    assert nothing_is_held(work)
    assert all(piece.error is None for piece in pieces)


@pytest.mark.row("prefix cache", "no hit across tenants")
def test_tenants_share_nothing(llm):
    work, prompt = Work(LLM("code-8m", max_sequences=2)), list(range(200, 328))
    hits = []
    for id, tenant in enumerate(["a", "b", "a", "", "b"]):
        work.submit(Submit(id, prompt, SamplingParams(max_tokens=1), tenant))
        run(work)
        hits.append(work.stats().counters["hit_tokens"])
    assert hits[:2] == [0, 0]
    assert hits[2] > 100
    assert hits[3] == hits[2]
    assert hits[4] == 2 * hits[2]


@pytest.mark.row("one fault for all", "the offender alone")
@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([10**6], SamplingParams(), "outside the vocabulary"),
        ([1] * 3000, SamplingParams(), "leave room to answer"),
        ([1], SamplingParams(logit_bias={8192: 1.0}), "logit_bias holds"),
        ([1], SamplingParams(stop_token_ids=[10**6]), "stop_token_ids holds"),
        ([1], SamplingParams(beam=BeamSearch(width=64)), "beam width"),
        ([1], SamplingParams(grammar=Grammar.regex("(((")), "is refused"),
        ([1], SamplingParams(grammar=Grammar.lark("start: %what")), "is refused"),
    ],
)
def test_what_is_refused_is_the_requests_own_fault(prompt, params, said, llm):
    work = Work(llm)
    beside = Submit(1, PROMPTS[0], PARAMS[0], "")
    (wanted,) = llm.generate([beside.prompt], beside.params)
    pieces = work.submit(beside) + work.submit(Submit(2, prompt, params, "")) + run(work)
    (refused,) = [piece for piece in pieces if piece.id == 2]
    assert (refused.finish_reason, refused.fault) == ("error", "request")
    assert said in refused.error
    assert outputs([piece for piece in pieces if piece.id == 1])[1, 0][0] == wanted.text
    assert nothing_is_held(work)


@pytest.mark.row("one fault for all", "the offender alone")
def test_what_fails_inside_is_the_engines(llm, monkeypatch):
    work = Work(llm)

    def fails(*arguments, **named):
        raise RuntimeError("planted")

    monkeypatch.setattr(llm.preparer, "prepare", fails)
    (told,) = work.submit(Submit(1, [1], SamplingParams(), ""))
    assert (told.fault, told.error) == ("engine", "RuntimeError: 'planted'")
    monkeypatch.undo()
    session = llm.engine().session
    monkeypatch.setattr(session, "run", fails, raising=False)
    for params in (SamplingParams(), SamplingParams(grammar=Grammar.regex("[ab]+"))):
        work.submit(Submit(2, [1], params, ""))
        (told,) = run(work)
        assert (told.fault, told.finish_reason) == ("engine", "error")
        assert "planted" in told.error
    monkeypatch.undo()
    assert work.submit(Submit(3, [1], PARAMS[0], "")) == []
    assert outputs(run(work))[3, 0][2] == "length"
