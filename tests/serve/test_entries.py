"""Log-probabilities in numbers that a server cannot hold: refused by name before anything is computed; what is accepted comes whole."""

import math

import pytest

from hasten import SamplingParams
from hasten.base.errors import ConfigError
from hasten.serve.entries import MOST, check_entries
from hasten.serve.outputs import QUICK

CHAT = {"messages": [{"role": "user", "content": "x " * 500}]}
TOO_MANY = [
    ("/v1/completions", "prompt_logprobs", {"prompt": [[5] * 2000] * 8, "max_tokens": 1, "prompt_logprobs": 128}),
    ("/v1/completions", "prompt_logprobs", {"prompt": [5] * 1000, "max_tokens": 1, "prompt_logprobs": 128, "n": 16}),
    ("/v1/completions", "logprobs", {"prompt": [[5] * 2000] * 8, "max_tokens": 0, "echo": True, "logprobs": 128}),
    ("/v1/completions", "logprobs", {"prompt": [[5]] * 9, "max_tokens": 1900, "logprobs": 128}),
    ("/v1/completions", "logprobs", {"prompt": [5], "max_tokens": 1900, "logprobs": 128, "n": 1, "best_of": 9}),
    ("/v1/chat/completions", "prompt_logprobs", {**CHAT, "n": 64, "prompt_logprobs": 128}),
    ("/v1/chat/completions", "top_logprobs", {**CHAT, "n": 64, "logprobs": True, "top_logprobs": 20, "stream": True}),
]


@pytest.mark.row("numbers and lists", "answers too large to hold")
@pytest.mark.parametrize(("path", "field", "body"), TOO_MANY)
def test_more_than_the_server_holds_is_refused_by_name(path, field, body, server):
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text[:200]
    assert answer.json()["error"]["param"] == field
    assert f"at most {MOST:,} are accepted" in answer.json()["error"]["message"]


@pytest.mark.parametrize("of", ["prompts", "outputs"])
def test_the_bound_is_exact(of):
    names = {"of_prompts": "prompts", "of_outputs": "outputs"}

    def check(tokens: int) -> None:
        if of == "prompts":
            check_entries([[1] * tokens], SamplingParams(max_tokens=1, prompt_logprobs=9), tokens + 1, **names)
        else:  # which end at the context
            check_entries([[1] * 7], SamplingParams(max_tokens=10**9, logprobs=9), tokens + 7, **names)

    check(MOST // 10)
    with pytest.raises(ConfigError, match=f"^{of} asks for"):
        check(MOST // 10 + 1)


def test_a_long_answer_is_the_one_that_a_stream_is(server):
    body = {
        "prompt": list(range(40, 40 + QUICK)),
        "max_tokens": 9,
        "logprobs": 3,
        "prompt_logprobs": 3,
        "temperature": 0,
        "ignore_eos": True,
    }
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    assert len(choice["prompt_logprobs"]) == QUICK
    assert all(len(one["top"]) == 3 and math.exp(one["logprob"]) <= 1 for one in choice["prompt_logprobs"][1:])
    short = server.post("/v1/completions", {**body, "prompt_logprobs": None}).json()["choices"][0]  # written at once
    assert choice["logprobs"] == short["logprobs"]
    assert choice["text"] == short["text"]
