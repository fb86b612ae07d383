"""Requests prepared one by one and run as a server does: the same answers, in the same chunks, as from `LLM`."""

import numpy as np
import pytest

from hasten import LLM, SamplingParams
from hasten.base.errors import ConfigError
from hasten.engine import BeamSearch, Grammar, NeverFitsError
from hasten.engine.batching import ByPriority, Continuous
from hasten.engine.plan import Settings

PROMPTS = [np.random.default_rng(seed).integers(0, 8000, 20 + 9 * seed).tolist() for seed in range(5)]
ASKED = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=4, logprobs=1),
    SamplingParams(max_tokens=12, n=2, best_of=5, temperature=1.0, seed=4),
    SamplingParams(max_tokens=9, n=2, beam=BeamSearch(width=3)),
    SamplingParams(max_tokens=12, seed=1, temperature=1.0, grammar=Grammar.regex("[a-z]{3,8}")),
]


def serve(llm, requests, gone=()):
    """Run prepared ``requests``, of which those ``gone`` go away after two chunks; completions and what was told, by place."""
    answers, places, numbers = {}, {}, {}
    engine = llm.engine(requests[0].context)
    for place, one in enumerate(requests):
        numbers[one.index] = one.submit(engine)
        answers[one.index], places[one.index] = one.answer(), place
    completions, told = {}, {place: [] for place in range(len(requests))}
    while engine.busy:
        for chunk in engine.step():
            place = places[chunk.index]
            assert place not in completions
            told[place] += answers[chunk.index].take(chunk)
            if place in gone and len(told[place]) == 2:
                for number in numbers[chunk.index]:
                    engine.abort(number)
            if answers[chunk.index].done:
                completions[place] = answers.pop(chunk.index).completions()
    return completions, told


def test_a_server_gets_what_the_llm_gives():
    llm = LLM("code-8m", max_sequences=4)  # fewer than best_of asks for
    expected = [llm.generate([prompt], params) for prompt, params in zip(PROMPTS, ASKED)]
    completions, told = serve(llm, [llm.prepare(prompt, params, tenant="a") for prompt, params in zip(PROMPTS, ASKED)])
    assert [completions[place] for place in range(5)] == expected
    for place, its in told.items():
        for one in expected[place]:
            mine = [chunk for chunk in its if chunk.choice == one.choice]
            assert "".join(chunk.text for chunk in mine) == one.text
            assert [token for chunk in mine for token in chunk.token_ids] == list(one.token_ids)
            assert [chunk.finish_reason for chunk in mine if chunk.finish_reason] == [one.finish_reason]
    assert [len(told[place]) for place in (2, 3)] == [2, 2]  # compared, or searched for: whole
    assert llm.engine().counters.shared_steps > 5


def test_who_goes_away_leaves_the_others_alone():
    llm = LLM("code-8m", max_sequences=8)
    expected = [llm.generate([prompt], ASKED[0]) for prompt in PROMPTS]
    completions, told = serve(llm, [llm.prepare(prompt, ASKED[0]) for prompt in PROMPTS], gone=(1, 3))
    assert completions == {place: expected[place] for place in (0, 2, 4)}
    assert [len(told[place]) for place in (1, 3)] == [2, 2]
    assert [pool.available for pool in llm.engine().cache.pools] == [pool.pages for pool in llm.engine().cache.pools]


def test_tenants_share_no_prefixes():
    llm, long = LLM("code-8m"), list(range(5, 69))

    def hits(tenant):
        before = llm.engine().counters.hit_tokens
        (one,) = llm.generate([long], ASKED[0], tenant=tenant)
        return one.token_ids, llm.engine().counters.hit_tokens - before

    tokens, none = hits("a")
    assert none == 0
    assert hits("b") == (tokens, 0)
    assert hits("") == (tokens, 0)
    for tenant in ("a", "b", ""):
        assert hits(tenant) == (tokens, 48)


def test_priorities_reach_the_scheduler():
    llm = LLM("code-8m", scheduling=Settings(64, Continuous(1), ByPriority()))
    requests = [llm.prepare(prompt, ASKED[0], priority=place) for place, prompt in enumerate(PROMPTS[:3])]
    completions, _ = serve(llm, requests)
    assert list(completions) == [2, 1, 0]


def test_a_search_wider_than_the_batch_is_refused_at_once():
    llm, wide = LLM("code-8m", max_sequences=3), SamplingParams(beam=BeamSearch(width=4))
    said = "the beam width is 4, and 3 sequences run together; .* use a width of at most 3, or let more run together"
    for refused in (lambda: llm.prepare([1], wide), lambda: llm.generate([[1], [2]], [ASKED[0], wide]), lambda: llm.stream([1], wide)):
        with pytest.raises(NeverFitsError, match=said):
            refused()
    assert llm.engine().counters.steps == 0
    one = LLM("code-8m", max_sequences=4).prepare([1], wide)  # prepared for another
    with pytest.raises(NeverFitsError, match="4 sequences are more than the 3 that run together"):
        one.submit(llm.engine())
    assert not llm.engine().busy
    assert llm.generate([[1]], SamplingParams(max_tokens=4, beam=BeamSearch(width=3)))[0].error is None


def test_a_request_is_refused_before_any_engine_is_there():
    llm = LLM("code-8m", context=16)
    with pytest.raises(ConfigError, match="the prompt has 16 tokens; with a context of 16 at most 15"):
        llm.prepare(list(range(16)))
    with pytest.raises(ConfigError, match="stop_token_ids holds 99999"):
        llm.prepare("def", SamplingParams(stop_token_ids=[99999]))
    with pytest.raises(ConfigError, match="number 7: token id 99999 is outside"):
        llm.prepare([99999], name="number 7")
