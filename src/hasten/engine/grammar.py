"""Grammar: the text that an output must be, as a request states it. What compiles and follows it is `hasten.engine.constraint`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from hasten.base.errors import ConfigError, one_line

MAX_BYTES = 128 * 1024
"""Longest grammar, in UTF-8 bytes."""
MAX_DEPTH = 64
"""Deepest nesting of objects and lists in a schema; regexes and Lark grammars are bounded by their parsers."""

Kind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """``text`` in the language ``kind``: a JSON Schema, a regular expression that the whole output must match (Rust's syntax: no
    look-around, no backreferences), or a grammar in llguidance's Lark syntax, whose start is ``start``.

    A value of the wrong type, too long or too deep raises `ConfigError`, one line; what the compiler refuses is told when it compiles."""

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"grammar kind is {one_line(self.kind)}; accepted: {', '.join(get_args(Kind))}")
        if not isinstance(self.text, str):
            raise ConfigError(f"{self.kind} is {one_line(self.text)}: give text")
        size = len(self.text.encode("utf-8", "surrogatepass"))
        if not 0 < size <= MAX_BYTES:
            raise ConfigError(f"{self.kind} has {size} bytes; accepted: 1 to {MAX_BYTES}; split the request or simplify the grammar")
        if not self.text.isascii():
            try:
                self.text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ConfigError(f"{self.kind} holds half a surrogate pair at character {error.start}; give text in UTF-8") from None
        if self.kind == "json_schema":
            check_schema(_parsed(self.text))

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any]) -> Grammar:
        """Of a JSON Schema, as text or as what json.loads makes of it."""
        if isinstance(schema, str):
            return cls("json_schema", schema)
        check_schema(schema)
        try:
            return cls("json_schema", json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"json_schema is no JSON: {one_line(str(error))}; give what json.loads makes") from None

    @classmethod
    def json_object(cls) -> Grammar:
        """Of any JSON object (OpenAI's ``json_object`` format)."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Of texts that a regular expression matches whole."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """Of a context-free grammar."""
        return cls("lark", grammar)


def _parsed(text: str) -> object:
    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=no_constant)
    except RecursionError:
        raise ConfigError(f"json_schema is nested deeper than {MAX_DEPTH} levels; name its parts in $defs and refer to them") from None
    except ValueError as error:
        raise ConfigError(f"json_schema is no JSON: {one_line(str(error))}; give a JSON Schema") from None


def check_schema(schema: object) -> None:
    """Raises ConfigError for what is no JSON Schema at first sight, or nested deeper than MAX_DEPTH; takes any depth."""
    if not isinstance(schema, Mapping | bool):
        raise ConfigError(f"json_schema is {one_line(schema)}: give an object, true or false")
    level: list[object] = [schema]
    depth = 0
    while level := [
        child
        for value in level
        if isinstance(value, Mapping | list | tuple)
        for child in (value.values() if isinstance(value, Mapping) else value)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"json_schema is nested deeper than {MAX_DEPTH} levels; name its parts in $defs and refer to them")
