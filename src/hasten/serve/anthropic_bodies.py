"""Request bodies of Anthropic's API. What it has and this server does not (images, documents, thinking, beginnings of an answer) is refused
by name; fields under "accepted" mean nothing here."""

from typing import Annotated, Any, Literal

from pydantic import Field

from hasten.serve.bodies import FUNCTION_NAME, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, Listed, Named, Strict

Cache = Named[Any] | None
"""Accepted: prefixes are found again without being told."""


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: Cache = None
    citations: list[None] | None = Field(default=None, max_length=0)


Texts = Annotated[Listed[TextBlock], Field(max_length=MAX_PARTS)]


class ToolUseBlock(Strict):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    input: dict[str, Any]
    cache_control: Cache = None
    caller: Named[Any] | None = None
    """Accepted."""


class ToolResultBlock(Strict):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: str | Texts | None = None
    is_error: bool | None = None
    cache_control: Cache = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(Strict):
    """One message."""

    role: Literal["user", "assistant"]
    content: str | Annotated[Listed[Block], Field(max_length=MAX_PARTS)]


class InputSchema(Strict):
    """JSON Schema of a tool's arguments."""

    model_config = {"extra": "allow"}
    type: Literal["object"]


class AnthropicTool(Strict):
    """A function that may be called."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = Field(default=None, max_length=65536)
    input_schema: InputSchema
    strict: bool | None = None
    """Accepted: the arguments of a call that must come always follow the schema."""
    cache_control: Cache = None


class ToolChoice(Strict):
    """Which tools may or must be called."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = Field(default=None, max_length=256)
    disable_parallel_tool_use: bool | None = None
    """True keeps the first call alone."""


class Thinking(Strict):
    """None is to be had."""

    type: Literal["disabled"]


class OutputFormat(Strict):
    """What the output must be."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How the output must be."""

    format: OutputFormat | None = None


class CountBody(Strict):
    """``POST /v1/messages/count_tokens``."""

    model: str | None = Field(default=None, max_length=1024)
    """The served model's name; may be left out."""
    messages: Listed[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | Texts | None = None
    tools: Listed[AnthropicTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Cache = None


class MessagesBody(CountBody):
    """``POST /v1/messages``."""

    max_tokens: int
    stream: bool | None = False
    temperature: float | None = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_sequences: Listed[str] | None = None
    metadata: Named[Any] | None = None
    """Accepted."""
    service_tier: Literal["auto", "standard_only"] | None = None
    """Accepted."""
    seed: int | None = None
    """hasten's own, as the next."""
    timeout_s: float | None = Field(default=None, gt=0, le=86400)
