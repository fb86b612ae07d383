"""Request bodies, checked before anything is done for them. A field that nobody knows is refused by name.

Ranges of sampling fields are `hasten.engine.SamplingParams`' business; here are types, lengths, and what OpenAI's API adds. Fields under
"accepted" mean nothing to this server; clients send them."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import models_json_schema

from hasten.engine.sampling import MAX_BIASES, MAX_STOPS
from hasten.serve.errors import ApiError

MAX_PROMPTS = 256
MAX_MESSAGES = 4096
MAX_PARTS = 4096
"""Pieces of a message."""
MAX_IDS = 1 << 18
"""Token ids to be made text of at a time."""
MAX_CHOICES = 1024
"""Texts that ``choices`` may name."""
MAX_TOOLS = 128
MAX_NAMES = 1024
"""Of an object whose names are not a schema's or a call's."""
MAX_VALUES = 100_000
"""Objects, lists and names in one body: each takes more than 64 bytes where JSON has two, and a microsecond in which nothing else runs."""
MAX_ITEMS = 300_000
"""Commas between the values of one body: each value takes some 40 bytes where JSON has two."""
_MARKS = (b"{", b"[", b":")
SCHEMAS = "#/components/schemas/"
"""Where an OpenAPI description has its types."""
FUNCTION_NAME = "^[a-zA-Z0-9_.-]{1,64}$"


Part = TypeVar("Part")
# A body may hold a million items, each of them wrong; all that is told is the first.
Listed = Annotated[list[Part], Field(fail_fast=True)]


def few(given: Any) -> Any:
    """What is no object of very many names. Raises ValueError."""
    if isinstance(given, dict) and len(given) > MAX_NAMES:
        raise ValueError(f"{len(given):,} names in one object; at most {MAX_NAMES:,} are taken")
    return given


Named = Annotated[dict[str, Part], BeforeValidator(few)]


class Strict(BaseModel):
    """No field that is not named, no type that is not meant, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        return few(given)


class StreamOptions(Strict):
    """OpenAI's, for streams."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """The usage so far with every event, of those who include it: vLLM's."""
    include_obfuscation: bool | None = None
    """Accepted."""


class JsonSchema(Strict):
    """``response_format.json_schema``."""

    name: str = Field(default="", max_length=256)
    description: str | None = Field(default=None, max_length=65536)
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None
    """The output always follows the schema."""


class ResponseFormat(Strict):
    """What the output must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def _biases(given: Any) -> Any:
    """Names in JSON are texts; whether they are ids is checked where ids are."""
    if isinstance(given, dict):
        if len(given) > MAX_BIASES:
            raise ValueError(f"{len(given):,} token ids; at most {MAX_BIASES:,} are taken")
        return {int(token) if isinstance(token, str) and token.isdecimal() and len(token) < 12 else token: v for token, v in given.items()}
    return given


class Sampled(Strict):
    """What every generating route has in common."""

    model: str | None = Field(default=None, max_length=1024)
    """The served model's name; may be left out."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    n: int | None = 1
    stop: str | Annotated[Listed[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_biases)] = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    """Accepted, as are the next: they mean nothing here."""
    metadata: Named[str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # hasten's own, under the names that other servers gave them where there are any
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: Listed[int] | None = Field(default=None, max_length=1024)
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    regex: str | None = None
    """The output matches this regular expression whole."""
    grammar: str | None = None
    """The output is of this grammar, in Lark's syntax."""
    choices: Listed[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    """The output is one of these texts."""
    beam_width: int | None = None
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    early_stopping: bool | Literal["never"] = False
    return_token_ids: bool = False
    """Choices have ``token_ids``, and the answer the prompt's. A model without a tokenizer always gives them."""
    timeout_s: float | None = Field(default=None, gt=0, le=86400)
    """Answer within so many seconds, or with an error."""


def prompts_of(given: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as the list it stands for."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise ValueError("give a text, a list of token ids, or a list of these, none of them an empty list")
    if type(given[0]) is int:
        return [_ids(given)]
    if len(given) > MAX_PROMPTS:
        raise ValueError(f"{len(given)} prompts; at most {MAX_PROMPTS} are taken in one request")
    return [one if isinstance(one, str) else _ids(one) for one in given]


def _ids(given: Any) -> list[int]:
    if not isinstance(given, list) or not given or not all(type(token) is int and 0 <= token < 2**31 for token in given):
        raise ValueError("a prompt is a text or a list of token ids, whole numbers from 0 on, with at least one of them")
    return given


class CompletionBody(Sampled):
    """``POST /v1/completions``."""

    prompt: Annotated[Any, BeforeValidator(prompts_of), Field(json_schema_extra={"type": ["string", "array"]})]
    max_tokens: int | None = 16
    echo: bool | None = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: None = None


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """Of a call in an earlier answer."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    arguments: str
    """JSON."""


class CalledTool(Strict):
    """A call in an earlier answer."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(default=None, ge=0, le=65535)
    """Accepted."""


class Message(Strict):
    """One message of a chat."""

    role: Annotated[str, Field(pattern="^[a-z_]{1,32}$")]
    content: str | Annotated[Listed[TextPart], Field(max_length=MAX_PARTS)] | None = None
    """May be left out where there are ``tool_calls``."""
    tool_calls: Listed[CalledTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(default=None, max_length=256)
    name: str | None = Field(default=None, max_length=256)
    refusal: None = None
    annotations: list[None] | None = Field(default=None, max_length=0)
    function_call: None = None
    audio: None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("content: field required, where there are no tool_calls")
        return self


class FunctionSpec(Strict):
    """A function that the model may call; ``parameters`` is a JSON Schema."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = Field(default=None, max_length=65536)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Accepted: the arguments of a call that must come always follow the schema."""


class Tool(Strict):
    """A tool, which is a function."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Strict):
    """Of a choice."""

    name: str = Field(max_length=256)


class NamedTool(Strict):
    """The choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Sampled):
    """``POST /v1/chat/completions``."""

    messages: Listed[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool = True
    tools: Listed[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """False keeps the first call alone."""
    reasoning_effort: str | None = None
    """Accepted."""
    verbosity: str | None = None
    """Accepted."""
    modalities: Listed[Literal["text"]] | None = Field(default=None, max_length=16)


class TokenizeBody(Strict):
    """``POST /tokenize``: a text, or a chat."""

    model: str | None = Field(default=None, max_length=1024)
    prompt: str | None = None
    messages: Listed[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(Strict):
    """``POST /detokenize``."""

    model: str | None = Field(default=None, max_length=1024)
    tokens: Annotated[list[int], BeforeValidator(lambda given: _ids(given) if given != [] else given), Field(max_length=MAX_IDS)]
    skip_special_tokens: bool = False


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: bytes) -> Body:
    """A body of that kind. Raises ApiError 400 that names the field."""
    _refuse_much(raw)
    try:
        given = msgspec.json.decode(raw)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        first = max((one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]), key=lambda one: len(one["loc"]))  # of a union
        raise _wrong(kind, first["loc"], first["type"], first["msg"]) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None


def _refuse_much(raw: bytes) -> None:
    """Raises ApiError 400 for JSON that would take very much more room than it has bytes, naming the longest field."""
    marks, commas = _counts(raw)
    if marks <= MAX_VALUES and commas <= MAX_ITEMS:
        return
    name = ""
    if marks <= MAX_VALUES:  # so there are not too many names either
        with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            name = max(fields, key=lambda field: len(fields[field]))[:200]
    said = f"{marks:,} objects, lists and names, and {commas + 1:,} values"
    raise ApiError(
        400, f"{name or 'the body'} is too much: {said} are in one body, and at most {MAX_VALUES:,} and {MAX_ITEMS:,} are read",
        param=name or None,
    )  # fmt: skip


def _counts(raw: bytes) -> tuple[int, int]:
    """How many objects, lists and names JSON holds, and how many commas; where these are few, what looks like them in its texts too."""
    marks, commas = sum(map(raw.count, _MARKS)), raw.count(b",")
    if marks <= MAX_VALUES and commas <= MAX_ITEMS:
        return marks, commas
    plain = np.frombuffer(raw.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    outside = plain[~np.logical_xor.accumulate(plain == ord('"'))]
    return sum(int(np.count_nonzero(outside == ord(mark))) for mark in _MARKS), int(np.count_nonzero(outside == ord(",")))


def _wrong(kind: type[BaseModel], place: Sequence[str | int], type_: str, message: str) -> ApiError:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in _named(kind, place)).lstrip(".")[:200] or "the body"
    if type_ == "extra_forbidden":
        return ApiError(400, f"{name} is no field of this request; leave it out", param=name, code="unknown_field")
    text = message.removeprefix("Value error, ")
    return ApiError(400, f"{name}: {text[:1].lower()}{text[1:]}", param=name, code="missing" if type_ == "missing" else None)


def _named(kind: type[BaseModel], place: Sequence[str | int]) -> list[str | int]:
    """A place without the names pydantic gives to the sides of a union."""
    kept: list[str | int] = []
    for part in place:
        if (
            isinstance(part, str)
            and kept
            and (part in {"str", "int", "bool", "float"} or part[:1].isupper() or part.startswith(("list[", "dict[", "literal[")))
        ):
            continue
        kept.append(part)
    return kept


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """Of a route that takes such a body, for OpenAPI; what it refers to is in `schemas_of`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"{SCHEMAS}{kind.__name__}"}}}}}


def schemas_of(kinds: Sequence[type[BaseModel]]) -> Mapping[str, Any]:
    """Of these bodies and all that they are made of, by name."""
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template=SCHEMAS + "{model}")
    schemas: Mapping[str, Any] = found["$defs"]
    return schemas
