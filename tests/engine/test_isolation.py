"""What fails on the text of one output ends that output and no other; what fails on the cache's pages ends whose they were to be."""

import pytest

from hasten import LLM, SamplingParams
from hasten.base.errors import TokenizerError
from hasten.engine.detokenize import Detokenizer
from hasten.engine.embedder import Embedder
from hasten.engine.sampling import BeamSearch

PROMPTS = ["def f(", "class A:", "import os"]
UNDECODED, BUG = TokenizerError("cannot decode these token ids"), IndexError("a bug")
SAID = {UNDECODED: "cannot decode these token ids", BUG: "IndexError: a bug"}


class Failing(Detokenizer):
    """Decodes ``good`` times."""

    def __init__(self, inner: Detokenizer, good: int, error: Exception) -> None:
        self._inner, self._good, self._error = inner, good, error

    def feed(self, ids):
        self._good -= 1
        if self._good < 0:
            raise self._error
        return self._inner.feed(ids)

    def flush(self):
        raise self._error

    def fork(self):
        return self


@pytest.fixture(scope="module")
def llm():
    return LLM("code-8m", max_sequences=6)


def spoil(output, good, error):
    output._detokenizer = Failing(output._detokenizer, good, error)


@pytest.mark.row("one fault for all", "the offender alone")
@pytest.mark.parametrize("error", [UNDECODED, BUG])
@pytest.mark.parametrize("good", [0, 3])
def test_one_that_cannot_be_decoded_fails_alone(llm, good, error):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    wanted = llm.generate(PROMPTS, params)
    requests = [llm.prepare(prompt, params) for prompt in PROMPTS]
    spoil(requests[1].outputs[0], good, error)
    found = dict(llm.answered(requests))
    assert [found[0], found[2]] == [[wanted[0]], [wanted[2]]]
    (failed,) = found[1]
    assert (failed.finish_reason, failed.error) == ("error", SAID[error])
    assert wanted[1].text.startswith(failed.text)
    assert llm.generate(PROMPTS, params) == wanted  # nothing is left behind


@pytest.mark.row("detokenizer", "a failure is one output's")
@pytest.mark.parametrize("error", [UNDECODED, BUG])
def test_other_outputs_of_its_prompt_go_on(llm, error):
    params = SamplingParams(max_tokens=12, ignore_eos=True, n=3, temperature=1.0, seed=1)
    wanted = llm.generate(PROMPTS[0], params)
    request = llm.prepare(PROMPTS[0], params)
    spoil(request.outputs[1], 4, error)
    found = dict(llm.answered([request]))[0]
    assert [found[0], found[2]] == [wanted[0], wanted[2]]
    assert (found[1].finish_reason, found[1].error) == ("error", SAID[error])
    assert not llm.engine().busy
    assert [pool.available for pool in llm.engine().cache.pools] == [pool.pages for pool in llm.engine().cache.pools]


@pytest.mark.parametrize("error", [UNDECODED, BUG])
def test_a_search_that_cannot_be_decoded_fails_alone(llm, error):
    params = [SamplingParams(max_tokens=8, n=2, beam=BeamSearch(width=3)), SamplingParams(max_tokens=20, ignore_eos=True)]
    wanted = llm.generate(PROMPTS[:2], params)
    requests = [llm.prepare(prompt, each) for prompt, each in zip(PROMPTS[:2], params, strict=True)]
    spoil(requests[0].outputs[1], 0, error)
    found = dict(llm.answered(requests))
    assert [found[0][0], *found[1]] == [wanted[0], wanted[2]]
    assert (found[0][1].finish_reason, found[0][1].error) == ("error", SAID[error])


def test_a_request_whose_pages_were_not_moved_fails_and_the_engine_lives(monkeypatch):
    llm = LLM("code-8m", max_sequences=4)
    params = SamplingParams(max_tokens=12, ignore_eos=True, n=2, temperature=1.0, seed=3)  # the second copies the prompt's last page
    wanted = llm.generate(PROMPTS[0], params)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine(), "session", Wrapped(llm.engine().session, fails))
        failed = llm.generate(PROMPTS[0], params)
    assert {(one.finish_reason, one.error) for one in failed} == {("error", UNMOVED)}
    assert llm.generate(PROMPTS[0], params) == wanted
    assert not llm.engine().busy
    assert [pool.available for pool in llm.engine().cache.pools] == [pool.pages for pool in llm.engine().cache.pools]


def test_nor_does_a_text_to_embed_that_had_them_moved(monkeypatch):
    """A request's pages may be waiting to be copied when the embedder takes its step."""
    llm = LLM("code-8m", max_sequences=4)
    engine, params = llm.engine(), SamplingParams(max_tokens=12, ignore_eos=True, n=2, temperature=1.0)
    embedder = Embedder(engine, llm.model.spec.width)
    wanted = llm.generate(PROMPTS[1], SamplingParams(max_tokens=12))
    engine.submit(llm.prepare(PROMPTS[0], params).outputs)
    while not engine.counters.forks:
        engine.step()
    assert engine.cache.grow(next(iter(engine.scheduler.pages())), 17)  # now the page that both have is copied
    embedder.submit([5, 6, 7])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "session", Wrapped(engine.session, fails))
        (text,) = embedder.step()
    assert text.error is None
    assert text.vector is not None
    chunks = engine.step()
    assert [(chunk.finish_reason, chunk.error) for chunk in chunks] == [("error", UNMOVED)] * 2
    assert llm.generate(PROMPTS[1], SamplingParams(max_tokens=12)) == wanted
    assert [pool.available for pool in engine.cache.pools] == [pool.pages for pool in engine.cache.pools]


UNMOVED = "moving pages of the cache failed (OSError: 'no'); send the request again"


def fails(moves):
    if moves:
        raise OSError("no")


class Wrapped:
    """A session that moves otherwise."""

    def __init__(self, inner, carry_out):
        self._inner, self.carry_out = inner, carry_out

    def __getattr__(self, name):
        return getattr(self._inner, name)
