"""Values at and beyond the edge of every field of every route, read off the server's own OpenAPI description, so that a field that is new
there is asked by itself.

Which JSON types a field takes is in the description; which numbers it takes is in `RANGES`, by name. A number without a line there is an
error of `boundaries`, for somebody must say what it may be."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

MANY, FEWER = 10**6, 70_000
"""Items of a list, and of one that lies in another field."""
MOST_BYTES = 4 << 20
"""Of a body that is read at all."""
MOST_VALUES = 100_000
"""Objects, lists and names in one."""
MAX, SEED = 2**31 - 1, 2**63 - 1
CONTEXT = 2048  # tokens that the served model takes
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, MAX), "max_completion_tokens": (1, MAX), "max_output_tokens": (1, MAX), "temperature": (0, 100), "top_p": (0, 1),
    "min_p": (0, 1), "top_k": (0, MAX), "n": (1, 64), "best_of": (1, 64), "seed": (0, SEED), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100), "min_tokens": (0, MAX), "prompt_logprobs": (0, 128),
    "logprobs": (0, 128), "top_logprobs": (0, 20), "beam_width": (1, 8), "length_penalty": (-10, 10), "timeout_s": (0.001, 86400),
    "index": (0, 65535), "dimensions": (1, 0),
}  # fmt: skip
"""Least and most, where the server runs 8 outputs together. No dimensions are right."""
NEEDS: dict[str, dict[str, Any]] = {
    "max_tokens": {}, "top_logprobs": {"logprobs": True}, "min_tokens": {"max_tokens": 5}, "beam_width": {"temperature": 0},
    "best_of": {"n": 1},
}  # fmt: skip
"""What a value at the edge is asked with, so that nothing else is wrong."""
EDGES_NOT_TAKEN = {
    "min_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "beam_width", "timeout_s", "dimensions",
}  # fmt: skip
"""Their most may be refused for another field's sake, or take long."""
IDS = {"prompt", "input", "tokens", "stop_token_ids"}
"""Lists of token ids, which are refused beyond the vocabulary."""

SAMPLES: dict[str, Any] = {
    "null": None, "boolean": True, "integer": 7, "number": 0.5, "string": "x", "array": [], "object": {},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One bad value of one field, in a whole body, as bytes or to be written; ``top`` is the outermost field that an answer must name."""

    path: str
    top: str
    place: str
    what: str
    body: Any

    @property
    def raw(self) -> bytes:
        """As it is sent."""
        if isinstance(self.body, bytes):
            return self.body
        try:
            return msgspec.json.encode(self.body)  # quicker, where lists are long
        except OverflowError:
            return json.dumps(self.body).encode()


class Description:
    """What ``/openapi.json`` says."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self.bodies = {
            path: self.whole(ways["post"]["requestBody"]["content"]["application/json"]["schema"])
            for path, ways in document["paths"].items()
            if "post" in ways
        }

    def whole(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema that is no reference."""
        while "$ref" in schema:
            found: Any = self._document
            for name in schema["$ref"].removeprefix("#/").split("/"):
                found = found[name]
            schema = found
        return schema

    def branches(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The sides of a union, of one if it is none."""
        schema = self.whole(schema)
        sides = schema.get("anyOf") or schema.get("oneOf")
        if sides:
            return [branch for side in sides for branch in self.branches(side)]
        if isinstance(schema.get("type"), list):
            return [{**schema, "type": kind} for kind in schema["type"]]
        return [schema]

    def types(self, schema: dict[str, Any]) -> set[str]:
        """JSON types that a schema takes."""
        found = set()
        for branch in self.branches(schema):
            if "const" in branch or "enum" in branch:
                found |= {_type(value) for value in branch.get("enum", [branch.get("const")])}
            elif "type" in branch:
                found.add(branch["type"])
            else:
                found |= set(SAMPLES)
        return found | ({"integer"} if "number" in found else set())

    def example(self, schema: dict[str, Any]) -> Any:
        """Something that it takes, as little as there is."""
        branch = self.branches(schema)[0]
        if "const" in branch or "enum" in branch:
            return branch["const"] if "const" in branch else branch["enum"][0]
        kind = branch.get("type", "string")
        if kind == "object":
            return {name: self.example(branch["properties"][name]) for name in branch.get("required", ())}
        if kind == "array":
            return [self.example(branch["items"])] if branch.get("minItems") else []
        return "user" if "pattern" in branch and kind == "string" else SAMPLES[kind]


def _type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
    return names[type(value)]


def places(description: Description, schema: dict[str, Any], around: Any, depth: int = 0) -> Iterator[tuple[str, str, Any, Any]]:
    """Every field below a body's schema: its dotted place, its own name, its schema, and what makes a body of its value.

    ``around(value)`` is the body with ``value`` where ``schema`` is."""
    for branch in description.branches(schema):
        if branch.get("type") == "object":
            for name, inner in branch.get("properties", {}).items():
                rest = description.example(branch)

                def within(value: Any, name: str = name, rest: Any = rest) -> Any:
                    return around({**rest, name: value})

                yield name, name, inner, within
                if depth < 8:
                    for place, leaf, deeper, made in places(description, inner, within, depth + 1):
                        yield f"{name}.{place}", leaf, deeper, made
        elif branch.get("type") == "array" and "items" in branch and depth < 8:
            yield from places(description, branch["items"], lambda value: around([value]), depth + 1)


def bad_values(description: Description, name: str, schema: dict[str, Any], many: int) -> Iterator[tuple[str, Any]]:
    """What a field must refuse, with a word for each."""
    types, branches = description.types(schema), description.branches(schema)
    for kind, sample in SAMPLES.items():
        if kind not in types:
            yield ("null" if kind == "null" else f"a {kind}"), sample
    if "number" in types and "integer" not in types or "integer" in types and "number" not in types:
        yield "a fraction", 1.5
    if "string" in types and all(
        {"enum", "const", "pattern"} & set(branch) for branch in branches if "string" in description.types(branch)
    ):
        yield "another word", "no such word, and spaces"
    if {"integer", "number"} & types and types != set(SAMPLES):
        least, most = RANGES[name]
        for what, value in (("below the least", least - 1), ("above the most", most + 1), ("2⁶³", 2**63), ("−2⁶³ − 1", -(2**63) - 1)):
            if not least <= value <= most:
                yield what, value
        yield "10³⁰", 10**30
    for branch in branches:
        if branch.get("type") == "array":
            item = description.example(branch["items"]) if branch.get("items") else 0
            said = json.dumps(item)
            count = min(many, (MOST_BYTES - 4096) // (len(said) + 2))
            if marks := sum(map(said.count, "{[:")):  # of more in one body no field is told
                count = min(count, (MOST_VALUES - 1000) // marks)
            yield f"{count:,} items", [item] * count
            if branch.get("minItems"):
                yield "an empty list", []
            if name in IDS and description.types(branch.get("items", {})) & {"integer"}:
                for what, token in (("below 0", -1), ("2³¹", 2**31), ("2⁶³", 2**63), ("not in the vocabulary", 8192)):
                    yield f"an id {what}", [token]
        if branch.get("type") == "string" and "maxLength" in branch:
            yield "a longer text", "x" * (branch["maxLength"] + 1)


def cases(document: dict[str, Any], good: dict[str, dict[str, Any]]) -> Iterator[Case]:
    """Every bad value of every field of the routes of ``good``, which has, by path, a body that is answered."""
    description = Description(document)
    for path, base in good.items():
        schema = description.bodies[path]

        def top(value: Any, base: dict[str, Any] = base) -> Any:
            return {**base, **value}

        plain = {**schema, "required": []}
        for place, name, field, made in places(description, plain, top):
            for what, value in bad_values(description, name, field, FEWER if "." in place else MANY):
                yield Case(path, place.partition(".")[0], place, what, made(value))
        for word in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
            for name, field in schema["properties"].items():
                if {"number", "integer"} & description.types(field):
                    body = json.dumps({**base, name: 0}).encode().replace(f'"{name}": 0'.encode(), f'"{name}": {word}'.encode())
                    yield Case(path, "" if word[-1] != "9" else "", name, word, body)
        yield Case(path, "no_such_field", "no_such_field", "unknown", {**base, "no_such_field": 1})


def edges(document: dict[str, Any], good: dict[str, dict[str, Any]]) -> Iterator[Case]:
    """Every number at the least and at the most that it may be; these must be answered."""
    description = Description(document)
    for path, schema in description.bodies.items():
        for name, field in schema["properties"].items():
            if name in RANGES and {"integer", "number"} & description.types(field) and name not in EDGES_NOT_TAKEN:
                for value in RANGES[name]:
                    yield Case(path, name, name, f"{value}", {**good[path], **NEEDS.get(name, {}), name: value})
