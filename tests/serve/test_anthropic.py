"""/v1/messages through Anthropic's own client: what LLM gives for the same prompt, in their words, and errors in their shape."""

import asyncio
import json

import anthropic
import httpx
import pytest

from hasten import SamplingParams
from hasten.engine import Grammar
from hasten.engine.chat import render_chat

SYSTEM = "Write Python."
TURNS = [{"role": "user", "content": "A loop."}]
GREEDY = {"temperature": 0}
STOPS = ["\nuser:", "\nsystem:"]
LINE = {"type": "object", "properties": {"line": {"enum": [1, 23]}}, "required": ["line"], "additionalProperties": False}
TOOLS = [
    {"name": "read_file", "description": "Reads.", "input_schema": LINE},
    {"name": "done", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
]
SCHEMA = {"enum": ["ab", "cd"]}


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def prompt(llm, messages) -> str:
    return render_chat(None, messages, add_generation_prompt=True, special_tokens=llm.model.text_tokenizer().special_tokens)


@pytest.mark.parametrize(
    ("asked", "params", "reason"),
    [
        ({"extra_body": GREEDY}, SamplingParams(max_tokens=24, stop=STOPS), "max_tokens"),
        ({"extra_body": GREEDY, "stop_sequences": ["return"]}, SamplingParams(max_tokens=24, stop=["return"]), None),
        (
            {"extra_body": {"top_k": 3, "top_p": 0.9, "seed": 5}},
            SamplingParams(max_tokens=24, temperature=1.0, top_k=3, top_p=0.9, seed=5, stop=STOPS),
            None,
        ),
        (
            {"extra_body": GREEDY, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            SamplingParams(max_tokens=24, grammar=Grammar.json_schema(SCHEMA), stop=STOPS),
            "end_turn",
        ),
    ],
)  # fmt: skip
def test_whole_and_streamed_are_what_llm_gives(asked, params, reason, claude, llm, server):
    (wanted,) = llm.generate([prompt(llm, [{"role": "system", "content": SYSTEM}, *TURNS])], params)
    asked = {"model": "code-8m", "max_tokens": 24, "system": SYSTEM, "messages": TURNS, **asked}
    whole = claude.messages.create(**asked)
    assert "".join(block.text for block in whole.content) == wanted.text
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (len(wanted.prompt_token_ids), len(wanted.token_ids))
    ends = {"length": "max_tokens", "stop": "stop_sequence" if "stop_sequences" in asked else "end_turn"}
    assert whole.stop_reason == ends[wanted.finish_reason] == (reason or whole.stop_reason)
    assert whole.stop_sequence == ("return" if whole.stop_reason == "stop_sequence" else None)
    with claude.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert (final.usage, final.stop_reason, final.stop_sequence) == (whole.usage, whole.stop_reason, whole.stop_sequence)
    parts = [{"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "loop."}]}]
    asked = {**asked, "messages": parts, "system": [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]}
    assert claude.messages.create(**asked).content == whole.content
    del asked["max_tokens"]
    counted = {name: value for name, value in asked.items() if name in {"model", "messages", "system"}}
    assert claude.messages.count_tokens(**counted).input_tokens == whole.usage.input_tokens


def test_a_stream_has_anthropics_events_in_their_order(server):
    body = {"model": "code-8m", "max_tokens": 8, "messages": TURNS, "stream": True, "temperature": 0}
    answer = server.post("/v1/messages", body, headers={"x-api-key": "any", "anthropic-version": "2023-06-01"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [frame.split("\n") for frame in answer.text.split("\n\n")[:-1]]
    found = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [one["type"] for one in found]
    kinds = [kind for place, kind in enumerate(one["type"] for one in found) if place == 0 or kind != found[place - 1]["type"]]
    assert kinds == [
        "message_start", "ping", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert found[-2]["usage"]["output_tokens"] == 8


def test_calls(claude):
    asked = {"model": "code-8m", "max_tokens": 200, "messages": TURNS, "tools": TOOLS, "extra_body": GREEDY}
    for choice, names in (({"type": "any"}, {"read_file", "done"}), ({"type": "tool", "name": "read_file"}, {"read_file"})):
        whole = claude.messages.create(**asked, tool_choice=choice)
        (block,) = whole.content
        assert (whole.stop_reason, block.type) == ("tool_use", "tool_use")
        assert block.name in names
        assert block.name != "read_file" or block.input["line"] in {1, 23}
        with claude.messages.stream(**asked, tool_choice=choice) as stream:
            (streamed,) = stream.get_final_message().content
        assert (streamed.name, streamed.input) == (block.name, block.input)
        more = [
            *TURNS, {"role": "assistant", "content": [{"type": "text", "text": "I look."}, block.model_dump(exclude_none=True)]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "42"}, {"type": "text", "text": "So?"}],
            },
        ]  # fmt: skip
        assert claude.messages.create(**{**asked, "messages": more, "max_tokens": 4}).usage.input_tokens > whole.usage.input_tokens
    assert claude.messages.create(**{**asked, "max_tokens": 4}, tool_choice={"type": "none"}).content[0].type == "text"


def test_many_at_once(server):
    async def all_of_them():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as claude:
            asked = {"model": "code-8m", "max_tokens": 12, "messages": TURNS, "extra_body": GREEDY}

            async def streamed():
                async with claude.messages.stream(**asked) as stream:
                    return "".join([text async for text in stream.text_stream])

            return await asyncio.gather(*(streamed() for _ in range(6)), *(claude.messages.create(**asked) for _ in range(6)))

    found = asyncio.run(all_of_them())
    assert len({one if isinstance(one, str) else one.content[0].text for one in found}) == 1


WRONG = {
    "max_tokens": [None, 0, -1, 1.5, "1", 2**63],
    "messages": [
        [], "x", [1], [{"role": "system", "content": "x"}], [{"role": "user"}], [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": [{"type": "image", "source": {}}]}], [{"role": "user", "content": "x", "what": 1}],
        [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}],
    ],
    "system": [1, [1], [{"type": "image"}]], "temperature": [-1, "1", 1e9], "top_k": [-1, 1.5], "top_p": [2, -1],
    "stop_sequences": ["x", [1], [""], ["x"] * 65],
    "tools": [
        1, [1], [{"name": "f"}], [{"name": "f g", "input_schema": {"type": "object"}}], [TOOLS[0], TOOLS[0]],
        [{"type": "web_search_20250305", "name": "w"}],
    ],
    "tool_choice": ["auto", {"type": "any"}, {"type": "tool", "name": "f"}, {"type": "what"}],
    "thinking": [{"type": "enabled", "budget_tokens": 9}], "stream": ["x", 1], "mcp_servers": [[]], "model": ["other", 1],
    "output_config": [1, {"format": {"type": "json_schema"}}],
}  # fmt: skip
COUNTED = {"messages", "system", "tools", "tool_choice", "mcp_servers", "model"}


@pytest.mark.row("numbers and lists", "boundary table")
def test_every_field_is_bounded_and_named_in_anthropics_shape(server):
    good = {"model": "code-8m", "max_tokens": 1, "messages": TURNS}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for field, values in WRONG.items():
            for value in values:
                for path in ("/v1/messages", "/v1/messages/count_tokens"):
                    if path == "/v1/messages/count_tokens" and field not in {
                        "messages",
                        "system",
                        "tools",
                        "tool_choice",
                        "mcp_servers",
                        "model",
                    }:
                        continue  # fmt: skip
                    body = {**good, field: value}
                    if path != "/v1/messages":
                        del body["max_tokens"]
                    answer = client.post(path, json=body)
                    assert 400 <= answer.status_code < 500, (path, field, value, answer.text)
                    told = answer.json()
                    assert told["type"] == "error"
                    assert told["error"]["type"] in {"invalid_request_error", "not_found_error"}
                    assert field in told["error"]["message"], (field, value, told)
        for path, method, status in (("/v1/messages", "GET", 405), ("/v1/messages/x", "POST", 404)):
            answer = client.request(method, path, json=good)
            assert (answer.status_code, answer.json()["type"]) == (status, "error")
        for raw in (b"{", b"[]", b"[" * 100_000):
            assert client.post("/v1/messages", content=raw, headers={"content-type": "application/json"}).json()["type"] == "error"
        assert client.post("/v1/messages", content=b"{}", headers={"content-type": "text/plain"}).json()["type"] == "error"
        assert client.post("/v1/messages", json=good).status_code == 200


def test_the_client_raises_its_own_errors(claude):
    with pytest.raises(anthropic.NotFoundError, match="other"):
        claude.messages.create(model="other", max_tokens=1, messages=TURNS)
    with pytest.raises(anthropic.BadRequestError, match="stop_sequences"):
        claude.messages.create(model="code-8m", max_tokens=1, messages=TURNS, stop_sequences=[""])
