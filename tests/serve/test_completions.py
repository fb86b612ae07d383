"""/v1/completions and /v1/chat/completions through OpenAI's own client: what LLM gives for the same request, in their words."""

import json
import re

import openai
import pytest

from hasten import SamplingParams
from hasten.engine import BeamSearch, Grammar
from hasten.engine.chat import render_chat
from tests.serve.server import events

PROMPT = "def read_config(path):\n"

# What a client asks for, and what LLM takes for it.
ASKED = {
    "greedy": ({"temperature": 0, "max_tokens": 24}, SamplingParams(max_tokens=24)),
    "seeded": ({"seed": 7, "max_tokens": 20, "top_p": 0.9}, SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=7)),
    "three": ({"seed": 7, "max_tokens": 12, "n": 3}, SamplingParams(max_tokens=12, temperature=1.0, seed=7, n=3)),
    "best": (
        {"seed": 3, "max_tokens": 8, "n": 2, "best_of": 5},
        SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=2, best_of=5),
    ),
    "echo": ({"temperature": 0, "max_tokens": 5, "echo": True}, SamplingParams(max_tokens=5, echo=True)),
    "stop": ({"temperature": 0, "max_tokens": 60, "stop": ["\n\n", "return"]}, SamplingParams(max_tokens=60, stop=["\n\n", "return"])),
    "penalties": (
        {"temperature": 0, "max_tokens": 20, "presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"198": -100}},
        SamplingParams(max_tokens=20, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={198: -100}),
    ),
    "schema": (
        {
            "temperature": 0, "max_tokens": 60,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
            },
        },
        SamplingParams(
            max_tokens=60, grammar=Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
        ),
    ),
    "own": (
        {"seed": 1, "max_tokens": 10, "extra": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 4, "ignore_eos": True}},
        SamplingParams(
            max_tokens=10, temperature=1.0, seed=1, top_k=5, min_p=0.1, repetition_penalty=1.2, min_tokens=4, ignore_eos=True
        ),
    ),
    "regex": (
        {"temperature": 0, "max_tokens": 20, "extra": {"regex": "[0-9]{3}"}},
        SamplingParams(max_tokens=20, grammar=Grammar.regex("[0-9]{3}")),
    ),
    "beams": ({"max_tokens": 8, "n": 2, "extra": {"beam_width": 4}}, SamplingParams(max_tokens=8, n=2, beam=BeamSearch(width=4))),
}  # fmt: skip


def split(asked: dict) -> dict:
    """As the client takes it: what its signature lacks goes into extra_body."""
    asked = dict(asked)
    extra = asked.pop("extra", {})
    if "response_format" in asked:
        extra["response_format"] = asked.pop("response_format")
    return {**asked, "extra_body": extra}


@pytest.mark.parametrize("name", ASKED)
def test_whole_and_streamed_are_what_llm_gives(name, client, llm):
    asked, params = ASKED[name]
    wanted = llm.generate([PROMPT], params)
    whole = client.completions.create(model="code-8m", prompt=PROMPT, **split(asked))
    assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [
        (one.choice, one.text, one.finish_reason) for one in wanted
    ]
    assert whole.usage.prompt_tokens == len(wanted[0].prompt_token_ids)
    assert whole.usage.completion_tokens == sum(len(one.token_ids) for one in wanted)
    texts, reasons = [""] * params.n, [None] * params.n
    usage = None
    for chunk in client.completions.create(
        model="code-8m", prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **split(asked)
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None  # nothing comes after the end
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert (texts, reasons) == ([one.text for one in wanted], [one.finish_reason for one in wanted])
    assert usage == whole.usage


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_comes_with_every_event_where_that_is_asked(path, server):
    asked = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    body = {**asked, "max_tokens": 9, "n": 2, "seed": 1, "return_token_ids": True, "stream": True}
    found = events(server.post(path, {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}).text)
    seen = 0
    for event in found[:-1]:
        seen += sum(len(choice.get("token_ids", ())) for choice in event["choices"])
        assert seen <= event["usage"]["completion_tokens"]
        assert event["usage"]["total_tokens"] == event["usage"]["prompt_tokens"] + event["usage"]["completion_tokens"]
    assert seen == found[-2]["usage"]["completion_tokens"] == found[-1]["usage"]["completion_tokens"] == 18
    assert found[-1]["choices"] == []
    for options in ({"continuous_usage_stats": True}, {"include_usage": False}):
        assert not any("usage" in event for event in events(server.post(path, {**body, "stream_options": options}).text))


def test_many_prompts_in_order_as_text_and_as_ids(client, llm):
    prompts = ["import os\n", "class A:\n", "x = ["]
    wanted = llm.generate(prompts, SamplingParams(max_tokens=6, n=2, seed=4, temperature=1.0))
    for given in (prompts, [llm.encode(prompt) for prompt in prompts]):
        made = client.completions.create(model="code-8m", prompt=given, max_tokens=6, n=2, seed=4)
        assert [choice.text for choice in made.choices] == [one.text for one in wanted]
    made = client.completions.create(model="code-8m", prompt=llm.encode(prompts[0]), max_tokens=6, n=2, seed=4)
    assert [choice.text for choice in made.choices] == [one.text for one in wanted[:2]]


def test_logprobs_as_completions_have_them(client, llm, server):
    (wanted,) = llm.generate([PROMPT], SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=2, echo=True))
    asked = {"model": "code-8m", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 2, "echo": True}
    found = client.completions.create(**asked).choices[0].logprobs
    ids = [*wanted.prompt_token_ids, *wanted.token_ids]
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(ids)
    assert "".join(found.tokens) == wanted.text
    assert found.token_logprobs[0] is None
    entries = [*wanted.prompt_logprobs, *wanted.logprobs]
    assert found.token_logprobs[1:] == pytest.approx([one.logprob for one in entries])
    assert [sorted(top.values(), reverse=True) for top in found.top_logprobs[1:]] == [
        pytest.approx([value for _, value in one.top]) for one in entries
    ]
    assert all(wanted.text[offset:].startswith(token) for offset, token in zip(found.text_offset, found.tokens))
    streamed = events(server.post("/v1/completions", {**asked, "stream": True}).text)
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert sum((one["choices"][0]["logprobs"][field] for one in streamed), []) == getattr(found, field)
    scored = client.completions.create(**{**asked, "max_tokens": 0})
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(wanted.prompt_token_ids)]
    assert scored.usage.completion_tokens == 0
    assert server.post("/v1/completions", {**asked, "max_tokens": 0, "stream": True}).json()["error"]["param"] == "max_tokens"


MESSAGES = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "A loop."}]


def test_chat_whole_and_streamed(client, llm):
    text = render_chat(None, MESSAGES, add_generation_prompt=True, special_tokens=llm.model.text_tokenizer().special_tokens)
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=5, n=2, logprobs=1, stop=["\nuser:", "\nsystem:"])
    wanted = llm.generate([text], params)
    asked = {"model": "code-8m", "max_tokens": 30, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(messages=MESSAGES, **asked)
    assert [(one.message.role, one.message.content, one.finish_reason) for one in whole.choices] == [
        ("assistant", one.text, one.finish_reason) for one in wanted
    ]
    for choice, one in zip(whole.choices, wanted):
        assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx([entry.logprob for entry in one.logprobs])
        assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode().startswith(one.text[:10])
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in MESSAGES]
    texts, roles, reasons = ["", ""], [None, None], [None, None]
    for chunk in client.chat.completions.create(messages=parts, stream=True, **asked):
        for choice in chunk.choices:
            roles[choice.index] = roles[choice.index] or choice.delta.role
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [one.text for one in wanted]
    assert (roles, reasons) == (["assistant"] * 2, [one.finish_reason for one in wanted])


def test_json_object_and_choices(client):
    made = client.chat.completions.create(
        model="code-8m", messages=MESSAGES, max_tokens=40, seed=1, response_format={"type": "json_object"},
        extra_body={"logit_bias": {"92": 5}},
    )  # fmt: skip
    text = made.choices[0].message.content
    assert text.lstrip().startswith("{")
    if made.choices[0].finish_reason == "stop":
        json.loads(text)
    chosen = client.completions.create(model="code-8m", prompt="x", max_tokens=30, extra_body={"choices": ["yes (a+b)", "no\n", "$^"]})
    assert chosen.choices[0].text in {"yes (a+b)", "no\n", "$^"}
    assert chosen.choices[0].finish_reason == "stop"


def test_the_other_routes(client, server, llm):
    assert [model.id for model in client.models.list()] == ["code-8m"]
    assert client.models.retrieve("code-8m").id == "code-8m"
    tokens = server.post("/tokenize", {"prompt": PROMPT}).json()
    assert tokens["tokens"] == llm.model.text_tokenizer().encode(PROMPT)
    assert tokens["count"] == len(tokens["tokens"])
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": PROMPT}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    text = render_chat(None, MESSAGES, add_generation_prompt=True, special_tokens=llm.model.text_tokenizer().special_tokens)
    assert chat["tokens"] == llm.encode(text)


def test_what_is_wrong_is_an_error_of_the_client(client):
    with pytest.raises(openai.NotFoundError, match="model 'gpt-5' is not served"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature is 1000"):
        client.completions.create(model="code-8m", prompt="x", temperature=1000)
    with pytest.raises(openai.BadRequestError, match="is refused"):  # told by the engine, before the stream begins
        list(client.completions.create(model="code-8m", prompt="x", stream=True, extra_body={"regex": "(((["}))


def test_a_line_in_the_log(server):
    made = server.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True})
    id = made.headers["x-request-id"]
    line = server.until(lambda: next((line for line in server.lines if id in line), None), 5)
    assert re.search(r"POST  /v1/completions  200  3 → 4 tokens  queued 0\.\d+ s  first 0\.\d+ s  total 0\.\d+ s", line)
