"""``POST /v1/responses``: OpenAI's Responses API. Nothing is stored."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.base.errors import ConfigError, one_line
from hasten.engine import Grammar, SamplingParams
from hasten.engine.sampling import MAX_INT
from hasten.serve.conversation import Conversation, called, converse, stops_of
from hasten.serve.errors import ApiError
from hasten.serve.log import Note
from hasten.serve.outputs import collect
from hasten.serve.reply import Reply, Sender, encoded
from hasten.serve.responses_bodies import CallItem, CallOutputItem, ContentPart, Item, MessageItem, NamedFunctionTool, ResponsesBody
from hasten.serve.service import Generation, Service
from hasten.serve.tools import Call, Offer, Voice, offered

NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text", "json_schema": "text.format.schema"}
"""What this API calls fields of `hasten.engine.SamplingParams` and of conversations."""


def respond(service: Service, body: ResponsesBody, tenant: str, note: Note) -> Reply:
    """Answer it. Raises ApiError for what can be told at once."""
    service.check_model(body.model)
    with called(NAMES):
        offer = _offer(body)
        conversation = Conversation(
            messages=_plain(body), params=_params(service, body, offer), offer=offer, timeout_s=body.timeout_s,
            at_fault="tools" if offer.must else "text",
        )  # fmt: skip
    view = _View(service, body, offer)
    return converse(service, conversation, view.stream if body.stream else view.whole, tenant, note, NAMES)


def _offer(body: ResponsesBody) -> Offer:
    shown = [
        {"type": "function", "function": tool.model_dump(exclude_none=True, include={"name", "description", "parameters"})}
        for tool in body.tools or ()
    ]
    if isinstance(choice := body.tool_choice, NamedFunctionTool):
        return offered(shown, choice.name, None)
    return offered(shown, None, choice)


def _params(service: Service, body: ResponsesBody, offer: Offer) -> SamplingParams:
    grammar, form = offer.grammar(), None if body.text is None else body.text.format
    if form is not None and form.type != "text":
        if grammar is not None:
            raise ConfigError("tool_choice and text.format are both given: an output follows one of them; leave the other out")
        if form.type == "json_schema" and form.schema_ is None:
            raise ConfigError("text.format is json_schema without a schema; give one")
        grammar = Grammar.json_object() if form.schema_ is None else Grammar.json_schema(form.schema_)
    return SamplingParams(
        max_tokens=MAX_INT if body.max_output_tokens is None else body.max_output_tokens,
        temperature=1.0 if body.temperature is None else body.temperature, top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k, seed=body.seed, stop=stops_of(service) or (), grammar=grammar,
    )  # fmt: skip


def _plain(body: ResponsesBody) -> list[dict[str, Any]]:
    """The conversation as templates take it; calls in a row are one message's. Raises ConfigError for arguments that are none."""
    plain: list[dict[str, Any]] = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    items: Sequence[Item] = [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for place, item in enumerate(items):
        match item:
            case MessageItem():
                plain.append({"role": "system" if item.role == "developer" else item.role, "content": _text(item.content)})
            case CallItem():
                call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": _arguments(item, place)}}
                if not plain or plain[-1]["role"] != "assistant":
                    plain.append({"role": "assistant", "content": ""})
                plain[-1].setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                plain.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
    return plain


def _arguments(item: CallItem, place: int) -> dict[str, Any]:
    try:
        arguments = json.loads(item.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ConfigError(f"input[{place}].arguments is {one_line(item.arguments, 60)}: give a JSON object, as text")
    return arguments


def _text(content: str | Sequence[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class _View:
    """One request's answer in this API's words."""

    def __init__(self, service: Service, body: ResponsesBody, offer: Offer) -> None:
        self._body, self._voice = body, Voice(offer, body.parallel_tool_calls is not False)
        choice = body.tool_choice
        form = None if body.text is None or body.text.format is None else body.text.format
        self._head: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(24)}", "object": "response", "created_at": int(time.time()), "model": service.name,
            "error": None, "incomplete_details": None, "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {}, "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "store": False, "temperature": 1.0 if body.temperature is None else body.temperature, "background": False,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunctionTool) else choice or "auto",
            "tools": [{"strict": True, "parameters": {}, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p, "truncation": "disabled",
        }  # fmt: skip

    def _response(self, status: str, output: Sequence[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {**self._head, "status": status, "output": list(output), "usage": usage}

    def _ended(self, reason: str | None, output: Sequence[dict[str, Any]], generation: Generation, count: int) -> dict[str, Any]:
        if reason != "length":
            return {**self._response("completed", output, _usage(generation, count)), "completed_at": int(time.time())}
        why = {"incomplete_details": {"reason": "max_output_tokens"}}
        return {**self._response("incomplete", output, _usage(generation, count)), **why}

    async def whole(self, generation: Generation, sender: Sender) -> None:
        (output,) = await collect(generation)
        status = "incomplete" if output.finish_reason == "length" else "completed"
        items = [_item(one, status) for one in self._voice.says(output.text, last=True)]
        await sender.body(200, self._ended(output.finish_reason, items, generation, len(output.token_ids)))

    async def stream(self, generation: Generation, sender: Sender) -> None:
        events, count = _Events(), 0

        def failed(error: ApiError) -> bytes:
            frames = events.close("incomplete")
            why = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": error.message}
            response = {**self._response("failed", events.output, _usage(generation, count)), "error": why}
            return b"".join([*frames, events.of("response.failed", {"response": response})])

        sender.last = failed
        async for told in generation.pieces():
            frames: list[bytes] = []
            if not events.number:
                begun = self._response("in_progress", [], None)
                frames += [events.of("response.created", {"response": begun}), events.of("response.in_progress", {"response": begun})]
            for _, piece in told:
                count += len(piece.token_ids)
                for one in self._voice.says(piece.text, piece.finish_reason is not None):
                    frames += events.say(one)
                if piece.finish_reason is not None:
                    frames += events.close("incomplete" if piece.finish_reason == "length" else "completed")
                    response = self._ended(piece.finish_reason, events.output, generation, count)
                    frames.append(events.of(f"response.{response['status']}", {"response": response}))
            if frames:
                await sender.events(b"".join(frames))
        await sender.end(b"")


class _Events:
    """The events of one stream, numbered: text goes on in one message until a call comes, or the end."""

    def __init__(self) -> None:
        self.number = 0
        self.output: list[dict[str, Any]] = []
        """Items that are done."""
        self._message: dict[str, Any] | None = None
        self._texts: list[str] = []

    def of(self, kind: str, fields: Mapping[str, Any]) -> bytes:
        """One event."""
        data = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return b"event: " + kind.encode() + b"\ndata: " + encoded(data) + b"\n\n"

    def say(self, item: str | Call) -> list[bytes]:
        """The next item's events."""
        if isinstance(item, Call):
            return [*self.close("completed"), *self._call(item)]
        frames = []
        if self._message is None:
            self._message = {**_item("", "in_progress"), "content": []}
            place = {"item_id": self._message["id"], "output_index": len(self.output)}
            frames = [
                self.of("response.output_item.added", {"output_index": len(self.output), "item": self._message}),
                self.of("response.content_part.added", {**place, "content_index": 0, "part": _part("")}),
            ]
        place = {"item_id": self._message["id"], "output_index": len(self.output), "content_index": 0}
        self._texts.append(item)
        return [*frames, self.of("response.output_text.delta", {**place, "delta": item, "logprobs": []})]

    def close(self, status: str) -> list[bytes]:
        """Of the message that is open, if one is."""
        if self._message is None:
            return []
        text, index = "".join(self._texts), len(self.output)
        done = {**self._message, "status": status, "content": [_part(text)]}
        place = {"item_id": done["id"], "output_index": index, "content_index": 0}
        self.output.append(done)
        self._message, self._texts = None, []
        return [
            self.of("response.output_text.done", {**place, "text": text, "logprobs": []}),
            self.of("response.content_part.done", {**place, "part": _part(text)}),
            self.of("response.output_item.done", {"output_index": index, "item": done}),
        ]

    def _call(self, call: Call) -> list[bytes]:
        item, index = _item(call, "completed"), len(self.output)
        self.output.append(item)
        place = {"item_id": item["id"], "output_index": index}
        return [
            self.of("response.output_item.added", {"output_index": index, "item": {**item, "arguments": "", "status": "in_progress"}}),
            self.of("response.function_call_arguments.delta", {**place, "delta": call.arguments}),
            self.of("response.function_call_arguments.done", {**place, "name": call.name, "arguments": call.arguments}),
            self.of("response.output_item.done", {"output_index": index, "item": item}),
        ]


def _item(item: str | Call, status: str) -> dict[str, Any]:
    id = secrets.token_hex(24)
    if isinstance(item, str):
        return {"id": f"msg_{id}", "type": "message", "role": "assistant", "status": status, "content": [_part(item)]}
    return {
        "id": f"fc_{id}", "type": "function_call", "call_id": f"call_{secrets.token_hex(12)}", "name": item.name,
        "arguments": item.arguments, "status": "completed",
    }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(generation: Generation, output_tokens: int) -> dict[str, Any]:
    prompt = len(generation.prompts[0])
    return {
        "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + output_tokens,
    }  # fmt: skip
