"""Request bodies of OpenAI's Responses API. Nothing is stored here, so what goes on from a stored answer is refused by name; fields under
"accepted" mean nothing to this server."""

from typing import Annotated, Any, Literal

from pydantic import Field

from hasten.serve.bodies import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, FunctionSpec, Listed, Named, NamedFunction, Strict


class ContentPart(Strict):
    """A piece of a message's text: of what was asked, or of an earlier answer."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(default=None, max_length=256)
    """Accepted."""
    logprobs: list[Any] | None = Field(default=None, max_length=65536)
    """Accepted."""


Parts = Annotated[Listed[ContentPart], Field(max_length=MAX_PARTS)]


class MessageItem(Strict):
    """One message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: str | None = Field(default=None, max_length=256)
    """Accepted, as is the next."""
    status: str | None = Field(default=None, max_length=64)


class CallItem(Strict):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    arguments: str
    """JSON."""
    id: str | None = Field(default=None, max_length=256)
    status: str | None = Field(default=None, max_length=64)


class CallOutputItem(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: str | Parts
    id: str | None = Field(default=None, max_length=256)
    status: str | None = Field(default=None, max_length=64)


Item = MessageItem | CallItem | CallOutputItem


class FunctionTool(FunctionSpec):
    """The same with its kind beside its fields, where chats have it around them."""

    type: Literal["function"]


class NamedFunctionTool(NamedFunction):
    """The function that must be called."""

    type: Literal["function"]


class TextFormat(Strict):
    """What the output must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, max_length=256)
    description: str | None = Field(default=None, max_length=65536)
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None
    """Accepted: the output always follows the schema."""


class TextConfig(Strict):
    """How the output must be."""

    format: TextFormat | None = None
    verbosity: str | None = Field(default=None, max_length=64)
    """Accepted."""


class ResponseStreamOptions(Strict):
    """Accepted."""

    include_obfuscation: bool | None = None


class ResponsesBody(Strict):
    """``POST /v1/responses``."""

    model: str | None = Field(default=None, max_length=1024)
    """The served model's name; may be left out."""
    input: str | Annotated[Listed[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    text: TextConfig | None = None
    tools: Listed[FunctionTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    """False keeps the first call alone."""
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    """Nothing is stored; the answer says so."""
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    """What does not fit is refused."""
    previous_response_id: None = None
    conversation: None = None
    metadata: Named[str] | None = None
    """Given back."""
    include: Listed[str] | None = Field(default=None, max_length=64)
    """Accepted, as are the next."""
    reasoning: Named[Any] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    top_k: int = 0
    """hasten's own, as the next."""
    seed: int | None = None
    timeout_s: float | None = Field(default=None, gt=0, le=86400)
