"""Tools: what an answer's calls are, in any portions; answers that must be calls; and what goes back to the model."""

import json

import jsonschema
import openai
import pytest

from hasten.engine.chat import render_chat
from hasten.serve.tools import Call, CallReader

ADD = {
    "type": "function",
    "function": {
        "name": "add", "description": "Adds.",
        "parameters": {
            "type": "object", "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}}, "required": ["a", "b"],
            "additionalProperties": False, "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}  # fmt: skip
LOOK = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"enum": ["x", "y"]}}, "required": ["word"]}},
}


def called(name: str, arguments: str) -> dict:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES = [{"role": "user", "content": "2 + 3?"}]
ONE = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
TWO = '{"name": "look_up", "arguments": {"word": "é"}}'
CALLED = {"add": Call("add", '{"a": 1, "b": 2}'), "look_up": Call("look_up", '{"word": "é"}')}

ANSWERS = {
    "text": ("No call. <tool", "No call. <tool", []),
    "nothing": ("", "", []),
    "Hermes": (f"<tool_call>\n{ONE}\n</tool_call>", "", ["add"]),
    "Hermes, two after text": (f"I will. <tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>", "I will. ", ["add", "look_up"]),
    "Hermes, not closed": (f"<tool_call>{ONE}", "", ["add"]),
    "bare": (f" {ONE} ", "", ["add"]),
    "a list": (f"[{ONE}, {TWO}]", "", ["add", "look_up"]),
    "parameters": (ONE.replace("arguments", "parameters"), "", ["add"]),
    "arguments as text": (json.dumps({"name": "add", "arguments": '{"a": 1, "b": 2}'}), "", ["add"]),
    "another's name": (ONE.replace("add", "rm"), None, []),
    "no object": ('["add"]', None, []),
    "cut off": (ONE[:-1], None, []),
    "text between": (f"<tool_call>{ONE}</tool_call> and <tool_call>{TWO}</tool_call>", None, []),
    "arguments that are none": ('{"name": "add", "arguments": [1]}', None, []),
    "deep": ("[" * 100_000, None, []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_in_any_portions(name):
    answer, content, names = ANSWERS[name]
    for size in {1, 2, 5, 11, max(1, len(answer))} if len(answer) < 1000 else {len(answer)}:
        reader = CallReader(["add", "look_up"])
        told = "".join(reader.feed(answer[at : at + size]) for at in range(0, len(answer), size))
        rest, calls = reader.end()
        assert told + rest == (answer if content is None else content)
        assert calls == [CALLED[one] for one in names]
    if len(names) > 1:
        reader = CallReader(["add", "look_up"], several=False)
        reader.feed(answer)
        assert len(reader.end()[1]) == 1


DEEP_ROUTES = {
    "/v1/chat/completions": lambda schema: {
        "messages": MESSAGES, "tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
    },
    "/v1/responses": lambda schema: {
        "input": "x", "tool_choice": "required", "tools": [{"type": "function", "name": "f", "parameters": schema}],
    },
    "/v1/messages": lambda schema: {
        "max_tokens": 4, "messages": MESSAGES, "tool_choice": {"type": "any"}, "tools": [{"name": "f", "input_schema": schema}],
    },
}  # fmt: skip


@pytest.mark.row("regex and grammars", "depth and size")
@pytest.mark.parametrize("path", DEEP_ROUTES)
@pytest.mark.parametrize("depth", [70, 500, 600, 800])
def test_parameters_nested_too_deep_are_refused_by_name(path, depth, server):
    schema = {}
    for _ in range(depth):
        schema = {"a": schema}
    answer = server.post(path, DEEP_ROUTES[path]({"type": "object", "properties": schema}))
    assert answer.status_code == 400, answer.text
    assert "tools: json_schema is nested deeper than" in answer.json()["error"]["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=["required", "named"])
def test_an_answer_that_must_be_a_call(choice, client):
    asked = {"model": "code-8m", "messages": MESSAGES, "tools": [ADD, LOOK], "tool_choice": choice, "max_tokens": 200, "n": 3}
    whole = client.chat.completions.create(**asked, seed=11)
    streamed = [{} for _ in range(3)]
    for chunk in client.chat.completions.create(**asked, seed=11, stream=True):
        for one in chunk.choices:
            assert not one.delta.content
            streamed[one.index]["reason"] = one.finish_reason
            for call in one.delta.tool_calls or ():
                streamed[one.index]["call"] = (call.function.name, call.function.arguments)
    called = 0
    for one, also in zip(whole.choices, streamed):
        if one.finish_reason == "length":  # a small model may write white space without end
            continue
        (call,) = one.message.tool_calls
        assert one.finish_reason == also["reason"] == "tool_calls"
        assert one.message.content is None
        assert also["call"] == (call.function.name, call.function.arguments)
        tool = {"add": ADD, "look_up": LOOK}[call.function.name]
        assert choice == "required" or call.function.name == "add"
        jsonschema.validate(json.loads(call.function.arguments), tool["function"]["parameters"])
        called += 1
    assert called


def test_an_answer_that_may_be_a_call(client):
    forced = {"regex": r'Yes\. <tool_call>\{"name": "add", "arguments": \{"a": [0-9], "b": 4\}\}</tool_call>'}
    asked = {"model": "code-8m", "messages": MESSAGES, "max_tokens": 80, "seed": 2, "extra_body": forced}
    (choice,) = client.chat.completions.create(**asked, tools=[ADD]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Yes."
    assert json.loads(choice.message.tool_calls[0].function.arguments)["b"] == 4
    content, calls, reasons = "", [], []
    for chunk in client.chat.completions.create(**asked, tools=[ADD], stream=True):
        content += chunk.choices[0].delta.content or ""
        calls += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert content == "Yes. "
    assert [call.function.arguments for call in calls] == [choice.message.tool_calls[0].function.arguments]
    assert [reason for reason in reasons if reason] == ["tool_calls"]
    (choice,) = client.chat.completions.create(**asked, tools=[ADD], tool_choice="none").choices
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("Yes. <tool_call>")


def test_tools_and_calls_reach_the_template(client, server):
    answered = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [called("add", '{"a":2,"b":3}')]},
        {"role": "tool", "tool_call_id": "call_1", "content": "5"},
    ]  # fmt: skip
    assert client.chat.completions.create(model="code-8m", messages=answered, tools=[ADD], max_tokens=1, seed=1).usage.prompt_tokens > 50
    template = (
        "{% for t in tools %}{{ t.function.name }};{% endfor %}{% for m in messages %}{{ m.role }}{{ m.tool_call_id }}{{ m.content }}"
        + ("{% for c in m.tool_calls %}{{ c.function.arguments.a }}{% endfor %}|{% endfor %}")
    )
    seen = [
        {**answered[0]},
        {**answered[1], "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
        answered[2],
    ]
    text = render_chat(template, seen, add_generation_prompt=True, special_tokens={}, tools=[ADD, LOOK])
    assert text == "add;look_up;user2 + 3?|assistant2|toolcall_15|"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [ADD] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "required", "extra_body": {"regex": "x"}}, "tool_choice"),
        ({"messages": [{"role": "assistant"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [called("a", "{")]}]}, "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(wrong, field, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "code-8m", "messages": MESSAGES, **wrong})
    assert field in caught.value.body["message"]
    assert (caught.value.body["param"] or "").startswith(field.split("[")[0])
