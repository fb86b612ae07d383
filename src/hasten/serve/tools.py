"""Tools: functions that a chat's answer may call. How they are told to the model, what grammar a call that must come has, and the calls
in what the model says."""

import json
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from hasten.base.errors import ConfigError
from hasten.engine import Grammar
from hasten.serve.messages import Piece

MAX_HELD = 1 << 16
"""Characters that may be held back because they could become a call; what is longer is text."""
OPEN, CLOSE = "<tool_call>", "</tool_call>"
"""Around a call, in the templates of Hermes, Qwen and their kin. Others say bare JSON."""
_KEYS = tuple(f'"{key}"' for key in ("name", "type", "function", "arguments", "parameters", "id"))
"""What the object of a bare call may begin with."""

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call: ``arguments`` is a JSON object, as text."""

    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name."""
        values: dict[str, Any] = json.loads(self.arguments)
        return values


@dataclass(frozen=True, slots=True)
class Tool:
    """A function and the JSON Schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def told(self) -> dict[str, Any]:
        """As templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request may call. With ``choice`` 'required' it must call one of ``tools``; of one that must be called there is no other.
    Raises ConfigError for names that come twice."""

    tools: tuple[Tool, ...]
    choice: Choice = "auto"

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"tools names {twice} twice; give each a name of its own")

    @classmethod
    def of(cls, tools: Iterable[Tool], choice: Choice, named: str | None = None) -> "Tools | None":
        """What is to be called, None if nothing may be. Raises ConfigError for a name that is none of the tools'."""
        all_of_them = cls(tuple(tools), choice)
        if named is not None:
            chosen = tuple(tool for tool in all_of_them.tools if tool.name == named)
            if not chosen:
                raise ConfigError(f"tool_choice names {named}, which is none of tools; name one of them")
            return cls(chosen, "required")
        if not all_of_them.tools and choice == "required":
            raise ConfigError("tool_choice asks for a call, and there are no tools; give some")
        return None if choice == "none" or not all_of_them.tools else all_of_them

    @property
    def must(self) -> bool:
        """Is a call all that may come?"""
        return self.choice == "required"

    @property
    def told(self) -> list[dict[str, Any]]:
        """As templates take them."""
        return [tool.told for tool in self.tools]

    @property
    def grammar(self) -> Grammar | None:
        """Of the call that must come: ``{"name": …, "arguments": …}``. None where none must."""
        if not self.must:
            return None
        if len(self.tools) == 1:
            return Grammar.json_schema({**_call_schema(self.tools[0], "#"), **_COMPACT})
        return Grammar.json_schema({"anyOf": [_call_schema(tool, f"#/anyOf/{place}") for place, tool in enumerate(self.tools)], **_COMPACT})

    def sieve(self) -> "Sieve":
        """For one output."""
        return Sieve([tool.name for tool in self.tools])


_COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""For llguidance: no space but between items, of which a model can write without end."""


def _call_schema(tool: Tool, place: str) -> dict[str, Any]:
    arguments = _moved({"type": "object", **tool.parameters}, f"{place}/properties/arguments")
    return {
        "type": "object", "properties": {"name": {"const": tool.name}, "arguments": arguments}, "required": ["name", "arguments"],
        "additionalProperties": False,
    }  # fmt: skip


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself are right where it lies at ``place``."""
    if isinstance(schema, dict):
        return {
            name: place + value[1:] if name == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, place)
            for name, value in schema.items()
            if name not in {"$schema", "$id"}
        }
    return [_moved(one, place) for one in schema] if isinstance(schema, list) else schema


def told_in_words(tools: Tools, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` for a template that knows no tools: they are told in the system message, and calls and results are text."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools.told)
    form = f'{OPEN}\n{{"name": NAME, "arguments": {{…}}}}\n{CLOSE}'
    words = f"You may call these functions:\n{lines}\nTo call one, answer with its name and arguments as JSON:\n{form}"
    plain = in_words(messages)
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{words}"}, *plain[1:]]
    return [{"role": "system", "content": words}, *plain]


def in_words(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` with calls and results as text."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            content += f"\n{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
        if message["role"] == "tool":
            plain.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            plain.append({"role": message["role"], "content": content.strip("\n") if "tool_calls" in message else content})
    return plain


class Sieve:
    """Parts what a model says into text and calls of the functions ``names``, whatever it says and however it is portioned. What only
    looks like a call is text. It never raises. Text around calls that is nothing but space is dropped."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._space = ""
        self._bare: bool | None = None  # is the whole output a bare call? None while that is open
        self.called = False

    def feed(self, text: str) -> list[str | Call]:
        """What is known with the next text."""
        self._held += text
        if self._bare is None and self._held.strip():
            self._bare = True
        if self._bare and (len(self._held) > MAX_HELD or not _could_be_bare(self._held[:256])):
            self._bare = False
        return [] if self._bare is not False else self._parted(last=False)

    def end(self) -> list[str | Call]:
        """What was held until the end."""
        if self._bare and (calls := parsed_calls(self._held, self._names)):
            self._held = ""
            self.called = True
            return list(calls)
        return self._parted(last=True)

    def _parted(self, last: bool) -> list[str | Call]:
        found: list[str | Call] = []
        held, at = self._held, 0
        while (begin := held.find(OPEN, at)) >= 0:
            end = held.find(CLOSE, begin)
            if end < 0 and not last and len(held) - begin <= MAX_HELD:
                break
            stop = len(held) if end < 0 else end + len(CLOSE)
            calls = parsed_calls(held[begin + len(OPEN) : end if end >= 0 else stop], self._names)
            self._say(held[at : begin if calls else stop], found)
            if calls:
                found += calls
                self.called, self._space = True, ""
            at = stop
        if begin < 0:
            begin = len(held) - (0 if last else _overlap(held[at:], OPEN))
        self._say(held[at:begin], found)
        self._held = held[begin:]
        if last and not self.called:
            self._say("", found, whole=True)
        return found

    def _say(self, text: str, found: list[str | Call], whole: bool = False) -> None:
        """Text, of which space at the end waits for more unless this is the ``whole``."""
        text = self._space + text
        kept = text if whole else text.rstrip()
        self._space = text[len(kept) :]
        if kept and found and isinstance(last := found[-1], str):
            found[-1] = last + kept
        elif kept:
            found.append(kept)


def _could_be_bare(text: str) -> bool:
    """Could this be the beginning of a call that stands for itself, or of a list of them?"""
    rest = text.lstrip()
    if rest.startswith("["):
        rest = rest[1:].lstrip()
    if rest.startswith("{"):
        rest = rest[1:].lstrip()
        return any(rest.startswith(key) or key.startswith(rest) for key in _KEYS)
    return not rest


def _overlap(text: str, marker: str) -> int:
    """How many of the last characters could begin ``marker``."""
    return next((size for size in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-size:])), 0)


def parsed_calls(text: str, names: Collection[str]) -> list[Call] | None:
    """The calls that ``text`` is, one or a list of them in JSON; None for anything else. Never raises."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        calls = [_call(one, names) for one in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError, TypeError):
        return None
    return calls or None


def _call(value: Any, names: Collection[str]) -> Call:
    """One call. Raises ValueError for what is none."""
    if isinstance(value, dict) and isinstance(inner := value.get("function"), dict):
        value = inner
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or name not in names:
        raise ValueError
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse)
    if not isinstance(arguments, dict):
        raise ValueError
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # half a surrogate pair is no text
    return Call(name, text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


class Voice:
    """One output on its way, as text and calls; all text where there are no ``tools``."""

    def __init__(self, tools: Tools | None) -> None:
        self._sieve = None if tools is None else tools.sieve()

    def says(self, piece: Piece) -> list[str | Call]:
        """What is known with the next piece."""
        if self._sieve is None:
            return [piece.text] if piece.text else []
        found = self._sieve.feed(piece.text)
        return found if piece.finish_reason is None else joined([*found, *self._sieve.end()])

    @property
    def called(self) -> bool:
        """Was there a call?"""
        return self._sieve is not None and self._sieve.called


def joined(items: Iterable[str | Call]) -> list[str | Call]:
    """Text that follows text, in one."""
    found: list[str | Call] = []
    for one in items:
        if isinstance(one, str) and found and isinstance(before := found[-1], str):
            found[-1] = before + one
        else:
            found.append(one)
    return found


def fresh_id(stem: str) -> str:
    """Of a call."""
    return f"{stem}_{secrets.token_hex(12)}"


def parted(tools: Tools | None, text: str) -> list[str | Call]:
    """What a whole output holds."""
    if tools is None:
        return [text] if text else []
    sieve = tools.sieve()
    return joined([*sieve.feed(text), *sieve.end()])
