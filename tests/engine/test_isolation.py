"""A tokenizer that fails on what one request drew ends that request, and no other."""

import pytest

from hasten import LLM, SamplingParams
from hasten.base.errors import TokenizerError
from hasten.engine.detokenize import Detokenizer


class Failing(Detokenizer):
    """Decodes ``good`` times."""

    def __init__(self, inner: Detokenizer, good: int) -> None:
        self._inner, self._good = inner, good

    def feed(self, ids):
        self._good -= 1
        if self._good < 0:
            raise TokenizerError("cannot decode these token ids")
        return self._inner.feed(ids)

    def flush(self):
        raise TokenizerError("cannot decode these token ids")


@pytest.mark.parametrize("good", [0, 3])
def test_one_that_cannot_be_decoded_fails_alone(good):
    llm = LLM("code-8m", max_sequences=4)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = ["def f(", "class A:", "import os"]
    wanted = llm.generate(prompts, params)
    requests = [llm.prepare(prompt, params) for prompt in prompts]
    spoilt = requests[1].outputs[0]
    spoilt._detokenizer = Failing(spoilt._detokenizer, good)
    found = dict(llm.answered(requests))
    assert [found[0], found[2]] == [[wanted[0]], [wanted[2]]]
    (failed,) = found[1]
    assert failed.finish_reason == "error"
    assert "cannot decode" in failed.error
    assert wanted[1].text.startswith(failed.text)
    assert llm.generate(prompts, params) == wanted  # nothing is left behind
