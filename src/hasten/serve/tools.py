"""Tools: what a model may call, how its answer is held to a call, and how calls are read out of an answer.

Models write calls in two ways that matter: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` (Hermes, Qwen), perhaps after some
text, or an answer that is nothing but such an object or a list of them (Llama, Mistral; ``parameters`` for ``arguments`` too). What is
neither, or names no tool that was offered, is text."""

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from hasten.base.errors import ConfigError, one_line
from hasten.engine import Grammar
from hasten.engine.grammar import check_schema
from hasten.serve.bodies import CalledTool, ChatBody, Message, NamedTool

OPENS, CLOSES = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """One call; ``arguments`` are JSON, as text."""

    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name."""
        values: dict[str, Any] = json.loads(self.arguments)
        return values

    def said(self) -> dict[str, Any]:
        """In OpenAI's words, under a number of the server's own."""
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


_COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""For llguidance: no space but after commas and colons, for a model can write space without end."""


def grammar_of_calls(functions: Sequence[Mapping[str, Any]]) -> Grammar:
    """Of an answer that is one call of one of these, each with a ``name`` and perhaps ``parameters``, a JSON Schema."""
    branches = []
    for place, function in enumerate(functions):
        parameters = function.get("parameters") or {"type": "object"}
        check_schema(parameters)  # its depth, before anything follows it down
        moved = _moved(parameters, f"#/anyOf/{place}/properties/arguments")
        properties = {"name": {"const": function["name"]}, "arguments": moved}
        branches.append({"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False})
    return Grammar.json_schema({"anyOf": branches, **_COMPACT})


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references are to itself, where it lies at ``place`` of another."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: place + value[1:] if name == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, place)
        for name, value in schema.items()
    }


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates take them: content as one text, arguments of calls as objects. Raises ConfigError where they are none."""
    plain = []
    for place, message in enumerate(messages):
        given, content = {"name": message.name, "tool_call_id": message.tool_call_id}, message.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        said: dict[str, Any] = {
            "role": message.role,
            "content": text,
            **{name: value for name, value in given.items() if value is not None},
        }
        if message.tool_calls:
            said["tool_calls"] = [
                _earlier(call, f"messages[{place}].tool_calls[{index}].function.arguments") for index, call in enumerate(message.tool_calls)
            ]
        plain.append(said)
    return plain


def _earlier(call: CalledTool, name: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ConfigError(f"{name} is {one_line(call.function.arguments, 60)}: give a JSON object, as text")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


@dataclass(frozen=True, slots=True)
class Offer:
    """What a chat may call. ``shown`` is for the template, ``callable`` are the names to look for, ``must`` that a call is asked for."""

    shown: tuple[dict[str, Any], ...] = ()
    callable: tuple[str, ...] = ()
    must: bool = False

    def reader(self, several: bool) -> "CallReader":
        """For one answer."""
        return CallReader(self.callable, several and not self.must)

    def grammar(self) -> Grammar | None:
        """That the answer must follow, if it must be a call."""
        if not self.must:
            return None
        try:
            return grammar_of_calls([one["function"] for one in self.shown if one["function"]["name"] in self.callable])
        except ConfigError as error:
            raise ConfigError(f"tools: {error}") from None


def offer_of(body: ChatBody) -> Offer:
    """What a body offers. Raises ConfigError for a choice of what it does not."""
    tools, choice = [tool.model_dump(exclude_none=True) for tool in body.tools or ()], body.tool_choice
    return offered(
        tools, choice.function.name if isinstance(choice, NamedTool) else None, None if isinstance(choice, NamedTool) else choice
    )


def offered(shown: Sequence[dict[str, Any]], named: str | None, choice: Literal["none", "auto", "required"] | None) -> Offer:
    """What of the tools ``shown``, in OpenAI's shape, may be called. Raises ConfigError for a choice of what they do not have."""
    names = tuple(tool["function"]["name"] for tool in shown)
    if not shown:
        if named is not None or choice == "required":
            raise ConfigError("tool_choice is given without tools; give some")
        return Offer()
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"tools names {twice} twice; give each a name of its own")
    if named is not None:
        if named not in names:
            raise ConfigError(f"tool_choice names {one_line(named, 60)}: the tools are {', '.join(names)[:200]}")
        return Offer(tuple(shown), (named,), True)
    return Offer() if choice == "none" else Offer(tuple(shown), names, choice == "required")


class CallReader:
    """Reads one answer as it comes. Text is passed on as soon as it cannot be part of a call. ``names`` may be called,
    at once only where there may be ``several`` calls."""

    def __init__(self, names: Collection[str], several: bool = True) -> None:
        self._names, self._several = frozenset(names), several
        self._held = ""
        self._state = "begin"  # then "text", and "call" from where one may have begun

    def feed(self, text: str) -> str:
        """Take the next text; what of it is no part of a call."""
        self._held += text
        if self._state == "begin" and (start := self._held.lstrip()):
            self._state = "call" if start[0] in "{[" else "text"
        if self._state != "text":
            return ""
        if (at := self._held.find(OPENS)) >= 0:
            self._state = "call"
        else:
            at = len(self._held) - next((size for size in range(len(OPENS) - 1, 0, -1) if self._held.endswith(OPENS[:size])), 0)
        told, self._held = self._held[:at], self._held[at:]
        return told

    def end(self) -> tuple[str, list[Call]]:
        """What was held: text, or calls."""
        calls = self._read(self._held) if self._state == "call" else None
        if calls is None:
            return self._held, []
        return "", calls if self._several else calls[:1]

    def _read(self, text: str) -> list[Call] | None:
        """The calls that a text is; None where it is anything else."""
        if OPENS in text:
            pieces = re.split(f"{OPENS}(.*?)(?:{CLOSES}|$)", text, flags=re.DOTALL)
            if any(between.strip() for between in pieces[::2]):
                return None
            bodies = pieces[1::2]
        else:
            bodies = [text]
        calls: list[Call] = []
        for body in bodies:
            try:
                given = json.loads(body, parse_constant=_refuse)
            except (ValueError, RecursionError):
                return None
            for one in given if isinstance(given, list) else [given]:
                if (call := self._call(one)) is None:
                    return None
                calls.append(call)
        return calls or None

    def _call(self, given: Any) -> Call | None:
        if not isinstance(given, dict) or not isinstance(name := given.get("name"), str) or name not in self._names:
            return None
        arguments = given.get("arguments", given.get("parameters", {}))
        try:
            if isinstance(arguments, str):
                arguments = json.loads(arguments, parse_constant=_refuse)
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            return None
        return Call(name, text) if isinstance(arguments, dict) else None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


class Voice:
    """One output on its way, as text and calls in their order; all text where nothing is offered."""

    def __init__(self, offer: Offer, several: bool = True) -> None:
        self._reader = offer.reader(several) if offer.callable else None
        self.called = False

    def says(self, text: str, last: bool) -> list[str | Call]:
        """What is known with the next text, perhaps the last."""
        calls = list[Call]()
        if self._reader is not None:
            text = self._reader.feed(text)
            if last:
                rest, calls = self._reader.end()
                text += rest
        self.called = self.called or bool(calls)
        return [*([text] if text else []), *calls]
