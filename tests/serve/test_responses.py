"""/v1/responses through OpenAI's own client: what LLM gives for the same prompt, whole and as events in their order."""

import asyncio
import json

import httpx
import openai
import pytest

from hasten import SamplingParams
from hasten.engine import Grammar
from hasten.engine.chat import render_chat

STOPS = ["\nuser:", "\nsystem:"]
WORD = {"type": "object", "properties": {"word": {"enum": ["x", "y"]}}, "required": ["word"], "additionalProperties": False}
LONG = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2000}
TOOL = {"type": "function", "name": "look_up", "parameters": WORD}
SCHEMA = {"enum": ["ab", "cd"]}
ASKED = {"model": "code-8m", "input": "A loop.", "instructions": "Write Python.", "max_output_tokens": 16, "temperature": 0}
TEXT_EVENTS = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added", "response.output_text.delta",
    "response.output_text.done", "response.content_part.done", "response.output_item.done",
]  # fmt: skip


def wanted(llm, params):
    messages = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "A loop."}]
    text = render_chat(None, messages, add_generation_prompt=True, special_tokens=llm.model.text_tokenizer().special_tokens)
    return llm.generate([text], params)[0]


def once(kinds):
    """Without what repeats."""
    return [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]]


@pytest.mark.parametrize(
    ("more", "params"),
    [
        ({}, SamplingParams(max_tokens=16, stop=STOPS)),
        (
            {"temperature": 0.8, "top_p": 0.9, "extra_body": {"seed": 3}},
            SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, seed=3, stop=STOPS),
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
            SamplingParams(max_tokens=16, stop=STOPS, grammar=Grammar.json_schema(SCHEMA)),
        ),
    ],
)
def test_whole_and_streamed_are_what_llm_gives(more, params, client, llm):
    one = wanted(llm, params)
    status = {"length": "incomplete", "stop": "completed"}[one.finish_reason]
    whole = client.responses.create(**{**ASKED, **more})
    assert (whole.output_text, whole.status) == (one.text, status)
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (len(one.prompt_token_ids), len(one.token_ids))
    assert (whole.incomplete_details.reason if whole.incomplete_details else None) == (
        "max_output_tokens" if status == "incomplete" else None
    )
    events = list(client.responses.create(**{**ASKED, **more}, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert once([event.type for event in events]) == [*TEXT_EVENTS, f"response.{status}"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == one.text
    last = events[-1].response
    assert (last.output_text, last.usage) == (one.text, whole.usage)
    assert last.store is False
    assert last.id == events[0].response.id
    with client.responses.stream(**{**ASKED, **more}) as stream:  # the client puts it together by itself, where it ends well
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
    assert snapshots[-1] == one.text


def test_items_are_a_conversation(client, llm):
    parts = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A "}, {"type": "input_text", "text": "loop."}]}
    ]
    plain = client.responses.create(**ASKED)
    assert client.responses.create(**{**ASKED, "input": parts}).output_text == plain.output_text
    told = [{"role": "developer", "content": "Write Python."}, *parts]
    assert client.responses.create(**{**ASKED, "input": told, "instructions": None}).output_text == plain.output_text
    longer = [*parts, *[item.model_dump(exclude_none=True) for item in plain.output], {"role": "user", "content": "Go on."}]
    assert client.responses.create(**{**ASKED, "input": longer}).usage.input_tokens > plain.usage.input_tokens + plain.usage.output_tokens


def test_calls(client):
    asked = {**ASKED, "max_output_tokens": 100, "tools": [TOOL]}
    for choice in ("required", {"type": "function", "name": "look_up"}):
        whole = client.responses.create(**asked, tool_choice=choice)
        (call,) = whole.output
        assert (whole.status, call.type, call.name) == ("completed", "function_call", "look_up")
        assert json.loads(call.arguments)["word"] in {"x", "y"}
        events = list(client.responses.create(**asked, tool_choice=choice, stream=True))
        assert [event.type for event in events] == [
            "response.created", "response.in_progress", "response.output_item.added", "response.function_call_arguments.delta",
            "response.function_call_arguments.done", "response.output_item.done", "response.completed",
        ]  # fmt: skip
        assert events[-1].response.output[0].arguments == call.arguments == events[3].delta
        answered = [
            {"role": "user", "content": "A loop."}, call.model_dump(exclude_none=True),
            {"type": "function_call_output", "call_id": call.call_id, "output": "42"},
        ]  # fmt: skip
        assert client.responses.create(**{**asked, "input": answered}).usage.input_tokens > whole.usage.input_tokens


def test_a_stream_that_fails_says_so_in_its_last_event(client):
    text = {"format": {"type": "json_schema", "name": "x", "schema": LONG}}
    client.responses.create(**{**ASKED, "max_output_tokens": 1, "text": text})  # the grammar is known then
    long = {**ASKED, "max_output_tokens": 1900, "extra_body": {"timeout_s": 1.0}, "stream": True, "text": text}
    events = list(client.responses.create(**long))
    assert events[-1].type == "response.failed"
    assert "1 s" in events[-1].response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_async(server):
    async def ask() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return {one.output_text for one in await asyncio.gather(*(client.responses.create(**ASKED) for _ in range(6)))}

    assert len(asyncio.run(ask())) == 1


WRONG = {
    "input": [
        None, 1, [], [1], [{"role": "user"}], [{"role": "king", "content": "x"}], [{"type": "reasoning"}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "http://169.254.169.254/"}]}],
        [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}],
    ],
    "instructions": [1, []], "max_output_tokens": [0, -1, 1.5, "1", 2**63], "temperature": [-1, "1", 1e9], "top_p": [2, "x"], "top_k": [-1],
    "text": [
        1, {"format": {"type": "xml"}}, {"format": {"type": "json_schema"}}, {"format": {"type": "json_schema", "schema": {"type": 1}}},
    ],
    "tools": [1, [1], [{"type": "web_search"}], [{"type": "function", "name": "a b"}], [TOOL, TOOL]],
    "tool_choice": ["any", "required", {"type": "function", "name": "f"}], "stream": ["x", 1], "background": [True],
    "truncation": ["auto"], "previous_response_id": ["resp_1"], "conversation": ["conv_1"], "model": ["other", 1], "what": [1],
}  # fmt: skip


@pytest.mark.row("numbers and lists", "boundary table")
def test_every_field_is_bounded_and_named(server):
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for field, values in WRONG.items():
            for value in values:
                answer = http.post("/v1/responses", json={**ASKED, field: value})
                assert 400 <= answer.status_code < 500, (field, value, answer.text)
                told = answer.json()["error"]
                assert (told["param"] or "").startswith(field), (field, value, told)
                assert field in told["message"] or told["code"] == "output_failed", (field, value, told)
        assert http.post("/v1/responses", json=ASKED).status_code == 200
