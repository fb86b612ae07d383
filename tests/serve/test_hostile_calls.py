"""Answers that look like calls: whatever a model writes, reading it raises nothing, loses nothing, and gives calls that can be sent."""

import json
import random

import msgspec
import pytest

from hasten.serve.tools import Call, Offer, Voice

OFFER = Offer((), ("f", "g"))
PIECES = [
    "<tool_call>", "</tool_call>", "<tool_", "call>", '{"name": "f", "arguments": {}}', '{"name": "g", "arguments": {"a": "é\\n"}}',
    '{"name": "h", "arguments": {}}', '{"name": "f", "arguments": {"a": "\\ud800"}}', '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "arguments": {"a": 1e999}}', '{"name": ["f"], "arguments": {}}', '{"name": {"f": 1}}', '{"name": "f", "arguments": "{"}',
    '{"name": "f", "arguments": "{}"}', '{"name": "f", "arguments": null}', '{"name": "f"', "[", "]", ",", "{", "}", " ", "\n", "text", '"',
    "\\", "\x00", "\ud800", "🙂", '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
]  # fmt: skip
WHOLE = {
    "deep": "[" * 50_000,
    "deep objects": '{"a":' * 50_000,
    "deep arguments": '{"name": "f", "arguments": ' + '{"a":' * 20_000 + "1" + "}" * 20_001,
    "many openings": "<tool_call>" * 20_000,
    "many calls": '<tool_call>{"name": "f"}</tool_call>' * 5_000,
    "openings and an end": "<tool_call>" * 20_000 + "</tool_call>",
    "spaces": " " * 100_000 + "{",
    "a pickle": """{"name": "f", "arguments": "cposix\\nsystem\\n(S'id'\\ntR."}""",
    "code": '{"name": "f", "arguments": __import__("os").system("id")}',
}


def read(portions) -> tuple[str, list[Call]]:
    voice, found = Voice(OFFER), []
    for place, portion in enumerate(portions):
        found += voice.says(portion, place == len(portions) - 1)
    calls = [one for one in found if isinstance(one, Call)]
    assert voice.called is bool(calls)
    return "".join(one for one in found if isinstance(one, str)), calls


def check(text: str, portions) -> list[Call]:
    said, calls = read(portions)
    assert (said, calls) == read([text])
    if not calls:
        assert said == text
    for call in calls:
        assert call.name in OFFER.callable
        assert isinstance(call.values, dict)
        assert json.loads(msgspec.json.encode(call.arguments)) == call.arguments
        msgspec.json.encode(call.values)
    return calls


@pytest.mark.row("eval", "hostile calls")
def test_what_is_put_together_at_random():
    chance, called = random.Random(3), 0
    for _ in range(20_000):
        text = "".join(chance.choices(PIECES, k=chance.randrange(1, 9)))
        cuts = sorted(chance.sample(range(len(text)), min(len(text), chance.randrange(4))))
        called += bool(check(text, [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]))
    assert called > 300


@pytest.mark.row("eval", "hostile calls")
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_made_to_hurt(name):
    calls = check(WHOLE[name], [WHOLE[name][at : at + 997] for at in range(0, len(WHOLE[name]), 997)])
    assert len(calls) == (5_000 if name == "many calls" else 0)
