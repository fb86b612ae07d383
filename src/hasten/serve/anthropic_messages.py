"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's Messages API."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.base.errors import ConfigError, UserError
from hasten.engine import Grammar, SamplingParams
from hasten.serve.anthropic_bodies import AnthropicTool, CountBody, MessagesBody, TextBlock, ToolResultBlock, ToolUseBlock, Turn
from hasten.serve.conversation import Conversation, called, converse, stops_of
from hasten.serve.errors import refused
from hasten.serve.log import Note
from hasten.serve.messages import Piece
from hasten.serve.outputs import collect
from hasten.serve.reply import Reply, Sender, encoded
from hasten.serve.service import Generation, Service
from hasten.serve.tools import Call, Offer, Voice, offered

NAMES = {"stop": "stop_sequences", "json_schema": "output_config.format.schema"}
"""What Anthropic's API calls fields of `hasten.engine.SamplingParams`."""


def messages(service: Service, body: MessagesBody, tenant: str, note: Note) -> Reply:
    """Answer it. Raises ApiError for what can be told at once."""
    service.check_model(body.model)
    with called(NAMES):
        offer = _offer(body)
        conversation = Conversation(
            messages=_plain(body), params=_params(service, body, offer), offer=offer, timeout_s=body.timeout_s,
            at_fault="tools" if offer.must else "output_config",
        )  # fmt: skip
    view = _View(service, offer, _several(body), bool(body.stop_sequences))
    return converse(service, conversation, view.stream if body.stream else view.whole, tenant, note, NAMES)


async def count_tokens(service: Service, body: CountBody) -> dict[str, int]:
    """How many tokens the prompt of such a request has."""
    service.check_model(body.model)
    with called(NAMES):
        try:
            return {"input_tokens": len(await service.texts.chat(_plain(body), None, True, _offer(body).shown))}
        except UserError as error:
            raise refused(error) from None


def _offer(body: CountBody) -> Offer:
    shown = [{"type": "function", "function": _function(tool)} for tool in body.tools or ()]
    kind, name = ("auto", None) if body.tool_choice is None else (body.tool_choice.type, body.tool_choice.name)
    if kind == "tool":
        if name is None:
            raise ConfigError("tool_choice is of type tool without a name; name one of tools")
        return offered(shown, name, None)
    return offered(shown, None, "required" if kind == "any" else "none" if kind == "none" else "auto")


def _function(tool: AnthropicTool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **described, "parameters": tool.input_schema.model_dump()}


def _several(body: CountBody) -> bool:
    return body.tool_choice is None or not body.tool_choice.disable_parallel_tool_use


def _params(service: Service, body: MessagesBody, offer: Offer) -> SamplingParams:
    grammar = offer.grammar()
    if body.output_config is not None and (form := body.output_config.format) is not None:
        if grammar is not None:
            raise ConfigError("tool_choice and output_config are both given: an output follows one of them; leave the other out")
        grammar = Grammar.json_schema(form.schema_)
    return SamplingParams(
        max_tokens=body.max_tokens, temperature=1.0 if body.temperature is None else body.temperature, top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p, stop=body.stop_sequences or stops_of(service) or (), seed=body.seed,
        grammar=grammar,
    )  # fmt: skip


def _plain(body: CountBody) -> list[dict[str, Any]]:
    """The messages as templates take them. Raises ConfigError for an answer that is to be continued."""
    if body.messages[-1].role == "assistant":
        raise ConfigError("messages ends with one of the assistant's: an answer is not continued here; end with the user's")
    plain = [{"role": "system", "content": _text(body.system)}] if body.system else []
    for turn in body.messages:
        plain += _plain_turn(turn)
    return plain


def _plain_turn(turn: Turn) -> list[dict[str, Any]]:
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    plain: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []

    def say() -> None:
        if texts or calls:
            plain.append({"role": turn.role, "content": "".join(texts), **({"tool_calls": list(calls)} if calls else {})})
        texts.clear()
        calls.clear()

    for block in turn.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolUseBlock() if turn.role == "assistant":
                calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}})
            case ToolResultBlock() if turn.role == "user":
                say()
                plain.append({"role": "tool", "content": _text(block.content), "tool_call_id": block.tool_use_id})
            case _:
                raise ConfigError(f"messages holds a {block.type} in a message of the {turn.role}; it belongs to the other's")
    say()
    return plain or [{"role": turn.role, "content": ""}]


def _text(content: str | Sequence[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content or ())


class _View:
    """One request's answer in Anthropic's words."""

    def __init__(self, service: Service, offer: Offer, several: bool, tells_stops: bool) -> None:
        self._offer, self._several, self._tells_stops = offer, several, tells_stops
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": service.name}

    async def whole(self, generation: Generation, sender: Sender) -> None:
        (output,) = await collect(generation)
        voice = Voice(self._offer, self._several)
        blocks = [_block(one, filled=True) for one in voice.says(output.text, last=True)]
        reason = self._reason(output.finish_reason, output.stop, voice.called)
        await sender.body(200, {**self._head, "content": blocks, **reason, "usage": _usage(generation, len(output.token_ids))})

    async def stream(self, generation: Generation, sender: Sender) -> None:
        voice, blocks, count = Voice(self._offer, self._several), _Blocks(), 0
        begun = False
        async for told in generation.pieces():
            frames: list[bytes] = []
            if not begun:
                begun = True
                message: dict[str, Any] = {
                    **self._head,
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": _usage(generation, 0),
                }
                frames += [_event("message_start", {"message": message}), _event("ping")]
            for _, piece in told:
                count += len(piece.token_ids)
                for one in voice.says(piece.text, piece.finish_reason is not None):
                    frames += blocks.say(one)
                if piece.finish_reason is not None:
                    frames += [*blocks.close(), *self._last(generation, piece, voice.called, count)]
            if frames:
                await sender.events(b"".join(frames))
        await sender.end(b"")

    def _last(self, generation: Generation, piece: Piece, has_called: bool, count: int) -> list[bytes]:
        delta = self._reason(piece.finish_reason, piece.stop, has_called)
        return [_event("message_delta", {"delta": delta, "usage": _usage(generation, count)}), _event("message_stop")]

    def _reason(self, reason: str | None, stop: str | None, has_called: bool) -> dict[str, Any]:
        if reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if has_called:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if stop is not None and self._tells_stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": "end_turn", "stop_sequence": None}


class _Blocks:
    """The content blocks of a stream: text goes on in one until a call comes."""

    def __init__(self) -> None:
        self._index, self._open = 0, False

    def say(self, item: str | Call) -> list[bytes]:
        """The next item's events."""
        if isinstance(item, str):
            frames = [] if self._open else [_event("content_block_start", {"index": self._index, "content_block": _block("", filled=True)})]
            self._open = True
            return [*frames, _event("content_block_delta", {"index": self._index, "delta": {"type": "text_delta", "text": item}})]
        delta = {"type": "input_json_delta", "partial_json": item.arguments}
        frames = self.close()
        frames += [
            _event("content_block_start", {"index": self._index, "content_block": _block(item, filled=False)}),
            _event("content_block_delta", {"index": self._index, "delta": delta}),
        ]
        self._open = True
        return [*frames, *self.close()]

    def close(self) -> list[bytes]:
        """Of the block that is open, if one is."""
        if not self._open:
            return []
        self._open = False
        self._index += 1
        return [_event("content_block_stop", {"index": self._index - 1})]


def _block(item: str | Call, filled: bool) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": item.name, "input": item.values if filled else {}}


def _event(kind: str, fields: Mapping[str, Any] | None = None) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encoded({"type": kind, **(fields or {})}) + b"\n\n"


def _usage(generation: Generation, output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": len(generation.prompts[0]), "output_tokens": output_tokens, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }  # fmt: skip
