"""What a request may ask for beside tokens, on the engine: the same whatever runs beside it, and no neighbour waits for it."""

import numpy as np
import pytest

from hasten import LLM, SamplingParams, load
from hasten.backends.cpu import CpuBackend
from hasten.backends.reference import ReferenceBackend
from hasten.engine.batching import Continuous, Static
from hasten.engine.engine import Engine
from hasten.engine.grammar import Grammar
from hasten.engine.plan import Costs, Settings
from hasten.engine.request import Request
from hasten.engine.sampling import BeamSearch
from tests.engine.test_engine import HYBRID, page_bytes
from tests.families.oracles import make_checkpoint

MODEL = load("code-8m")
VOCAB = MODEL.spec.vocab
PROMPTS = [np.random.default_rng(seed).integers(0, VOCAB, length).tolist() for seed, length in enumerate((5, 70, 33, 1, 48, 90))]
BESIDE = [np.random.default_rng(90 + seed).integers(0, VOCAB, 20).tolist() for seed in range(4)]
ASKED = {
    "n": SamplingParams(max_tokens=20, n=3, temperature=1.0, seed=5, ignore_eos=True),
    "best_of": SamplingParams(max_tokens=20, n=2, best_of=4, temperature=1.0, seed=5, logprobs=2),
    "beams": SamplingParams(max_tokens=20, n=3, beam=BeamSearch(width=4, early_stopping="never")),
    "prompt": SamplingParams(max_tokens=12, prompt_logprobs=3, logprobs=0, ignore_eos=True),
    "bias": SamplingParams(max_tokens=20, temperature=0.7, seed=1, logit_bias={11: 5.0, 200: -100.0}, ignore_eos=True),
    "grammar": SamplingParams(max_tokens=20, n=2, temperature=1.0, seed=5, grammar=Grammar.regex("[a-z]{3,8}(-[0-9]{2})*")),
    "beams of a grammar": SamplingParams(max_tokens=20, n=2, beam=BeamSearch(width=3), grammar=Grammar.regex("[a-z]{3,8}-[0-9]{2}")),
}
WAYS = {
    "together": ({}, lambda c: c.shared_steps > 10 and c.forks > 20),
    "chunks": ({"scheduling": Settings(9, Continuous(9))}, lambda c: c.steps > 150),
    "pages are few": (
        {"scheduling": Settings(64, Continuous(12), output_share=0.0), "pages": 24}, lambda c: c.recomputed > 0,
    ),
    "swaps": (
        {"scheduling": Settings(64, Continuous(12), output_share=0.0, costs=Costs(1.0, 0.0)), "pages": 24, "swap": 400},
        lambda c: c.swapped > 0,
    ),
    "static": ({"scheduling": Settings(256, Static(8))}, lambda c: c.padding_tokens > 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    alone = LLM(MODEL, backend="cpu", context=256, prefixes=False)
    return {(name, place): alone.generate([prompt], ASKED[name]) for name in ASKED for place, prompt in enumerate(PROMPTS)}


@pytest.mark.parametrize("way", WAYS)
def test_all_at_once_is_as_each_alone(expected, way):
    settings, fired = WAYS[way]
    settings = dict(settings)
    if (pages := settings.pop("pages", None)) is not None:
        settings |= {"cache_bytes": page_bytes(MODEL, pages), "swap_bytes": page_bytes(MODEL, settings.pop("swap", 0))}
    llm = LLM(MODEL, backend="cpu", context=256, **settings)
    keys = list(expected)
    np.random.default_rng(len(way)).shuffle(keys)
    made = dict(llm.finished([PROMPTS[place] for _, place in keys], [ASKED[name] for name, _ in keys]))
    for index, key in enumerate(keys):
        assert made[index] == expected[key], key
        assert all(one.error is None for one in made[index]), key
    engine = llm.engine()
    assert fired(engine.counters), engine.counters
    assert not engine.busy
    assert [pool.available for pool in engine.cache.pools] == [pool.pages for pool in engine.cache.pools]
    kept = vars(engine._live)
    kept.pop("ids")
    assert len(kept) == 6
    assert not any(kept.values()), kept


def test_prompts_are_scored_from_the_first_token_on_though_the_cache_has_them(expected):
    llm = LLM(MODEL, backend="cpu", context=256)
    llm.generate([PROMPTS[5]], SamplingParams(max_tokens=12, ignore_eos=True))
    (again,) = llm.generate([PROMPTS[5]], SamplingParams(max_tokens=12, ignore_eos=True))
    assert llm.engine().counters.hit_tokens == 80
    scored = llm.generate([PROMPTS[5]], ASKED["prompt"])
    assert llm.engine().counters.hit_tokens == 80
    assert scored == expected["prompt", 5]
    assert scored[0].token_ids == again.token_ids
    assert [entry.token for entry in scored[0].prompt_logprobs] == PROMPTS[5][1:]
    rows = MODEL.logits(PROMPTS[5]).astype(np.float64)
    rows -= np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) + rows.max(1, keepdims=True)
    theirs = rows[np.arange(len(PROMPTS[5]) - 1), PROMPTS[5][1:]]
    np.testing.assert_allclose([entry.logprob for entry in scored[0].prompt_logprobs], theirs, atol=0.15)  # bf16 beside float32


def test_more_outputs_than_run_together_come_all_the_same():
    params = SamplingParams(max_tokens=9, n=7, temperature=1.0, seed=2, ignore_eos=True)
    few, many = (LLM(MODEL, backend="cpu", context=256, max_sequences=slots) for slots in (3, 8))
    assert few.generate([PROMPTS[1]], params) == many.generate([PROMPTS[1]], params)
    assert few.generate([PROMPTS[0]], params)[6].error is None


# --- grammars that are late


class Late:
    """What stands for a grammar's state: anything goes, and it says so when told to."""

    error, complete, ready = None, False, False

    def __init__(self, vocab=VOCAB):
        self.mask = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)

    def advance(self, token):
        self.ready = False

    def close(self):
        self.ready = True


def request(index, prompt, params, constraint=None, choice=0):
    return Request(
        index, prompt, params, limit=256, end_ids=frozenset(), detokenizer=None, program_context=256, choice=choice, seed=3,
        constraint=constraint,
    )  # fmt: skip


def test_neighbours_do_not_wait_for_a_late_mask():
    params = SamplingParams(max_tokens=12, temperature=1.0)

    def engine():
        return Engine(CpuBackend().session(MODEL, 256), Settings(32, Continuous(8)))

    free, plain = engine(), [request(0, PROMPTS[1], params), request(0, PROMPTS[1], params, None, 1), request(1, PROMPTS[2], params)]
    free.submit(plain[:2])
    free.submit(plain[2:])
    while free.busy:
        free.step()
    late = [Late(), Late()]
    held, outputs = (
        engine(),
        [request(0, PROMPTS[1], params, late[0]), request(0, PROMPTS[1], params, late[1], 1), request(1, PROMPTS[2], params)],
    )
    held.submit(outputs[:2])
    held.submit(outputs[2:])
    for _ in range(6):
        held.step()
    assert len(outputs[2].output) >= 3  # the neighbour has gone on
    assert not outputs[0].output
    late[0].ready = True
    held.step()
    assert not outputs[0].output  # its sibling's is not there
    steps = 0
    while held.busy:
        late[0].ready = late[1].ready = steps % 3 == 0  # every third step
        held.step()
        steps += 1
    assert steps >= 3 * 11
    assert [one.output for one in outputs] == [one.output for one in plain]


def test_a_grammar_that_fails_ends_its_output_and_no_other():
    params = SamplingParams(max_tokens=12, temperature=1.0)
    engine, states = Engine(CpuBackend().session(MODEL, 256), Settings(64, Continuous(8))), [Late(), Late(), Late()]
    for state in states:
        state.ready = True
        state.advance = lambda token: None
    outputs = [request(0, PROMPTS[1], params, state, choice) for choice, state in enumerate(states)]
    engine.submit([*outputs])
    while len(outputs[0].output) < 4:
        engine.step()
    states[0].error, states[1].complete = "its grammar broke", True
    chunks = engine.step()
    assert {(chunk.choice, chunk.finish_reason, chunk.error) for chunk in chunks} == {
        (0, "error", "its grammar broke"), (1, "stop", None), (2, None, None),
    }  # fmt: skip
    while engine.busy:
        engine.step()
    assert [len(one.output) for one in outputs] == [4, 4, 12]
    assert [pool.available for pool in engine.cache.pools] == [pool.pages for pool in engine.cache.pools]


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend], ids=lambda backend: backend.name)
def test_what_is_adopted_while_a_mask_is_late_is_there_when_it_comes(backend, tmp_path):
    """A recurrent state is copied in a step that computes nothing."""
    make_checkpoint(HYBRID, tmp_path)
    session = backend().session(load(tmp_path), 256)
    engine, params = Engine(session, Settings(40, Continuous(4))), SamplingParams(max_tokens=8)
    prompt = [*range(64), 70]
    first, again = request(0, prompt, params), request(1, prompt, params, late := Late(97))
    engine.submit([first], key="all")
    while engine.busy:
        engine.step()
    engine.submit([again], key="all")
    computed = engine.counters.computed_tokens
    for _ in range(4):
        assert engine.step() == []
    assert engine.counters.computed_tokens == computed  # all but the last token was found
    late.ready, late.advance = True, lambda token: None
    while engine.busy:
        engine.step()
    assert engine.counters.hit_tokens == 64
    assert first.output == again.output


def test_a_grammar_without_an_end_leaves_its_neighbours_alone():
    """A hostile grammar beside streams: they end before it has failed, with what they have alone."""
    crossed = " & ".join(f"/(.{{{count}}})*/" for count in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41))
    hostile = SamplingParams(max_tokens=5, grammar=Grammar.lark(f"start: X\nX: {crossed}"))
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    llm = LLM(MODEL, backend="cpu", context=256)
    alone = [one.token_ids for one in llm.generate(BESIDE, params)]
    ended, outputs = [], {}
    for index, (one,) in llm.finished([[3, 4, 5], *BESIDE], [hostile, *[params] * len(BESIDE)]):
        ended.append(index)
        outputs[index] = one
    assert ended[-1] == 0
    assert outputs[0].finish_reason == "error"
    assert [outputs[index + 1].token_ids for index in range(len(BESIDE))] == alone
