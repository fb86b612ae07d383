"""``POST /v1/chat/completions``."""

import secrets
import time
from typing import Any

from hasten.base.errors import ConfigError
from hasten.serve import logprobs
from hasten.serve.asked import grammar_field, of_chat, tools_of
from hasten.serve.bodies import ChatBody
from hasten.serve.conversation import Conversation, converse, stops_of
from hasten.serve.errors import refused
from hasten.serve.log import Note
from hasten.serve.messages import Piece
from hasten.serve.outputs import Output, collect, usage
from hasten.serve.reply import DONE, Reply, Sender, encoded
from hasten.serve.service import Generation, Service
from hasten.serve.tools import Call, Tools, Voice, fresh_id, parted


def chat(service: Service, body: ChatBody, tenant: str, note: Note) -> Reply:
    """Answer it. Raises ApiError for what can be told at once."""
    service.check_model(body.model)
    if body.stop is None and body.beam_width is None:
        body = body.model_copy(update={"stop": stops_of(service)})
    try:
        tools = tools_of(body)
        params = of_chat(body, tools)
    except ConfigError as error:
        raise refused(error) from None
    view = _View(service, body, tools)
    conversation = Conversation(
        messages=[message.plain for message in body.messages], params=params, tools=tools, timeout_s=body.timeout_s,
        add_generation_prompt=body.add_generation_prompt, at_fault=grammar_field(body),
    )  # fmt: skip
    return converse(service, conversation, view.stream if body.stream else view.whole, tenant, note)


class _View:
    """One request's answer in OpenAI's words."""

    def __init__(self, service: Service, body: ChatBody, tools: Tools | None) -> None:
        self._body, self._tools = body, tools
        self._tokens = service.texts.tokens
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created, self._model = int(time.time()), service.name

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    async def whole(self, generation: Generation, sender: Sender) -> None:
        outputs = await collect(generation)
        choices = [self._choice(generation, index, output) for index, output in enumerate(outputs)]
        counted = usage(generation, sum(len(output.token_ids) for output in outputs))
        await sender.body(200, {**self._head("chat.completion"), "choices": choices, "usage": counted})

    def _choice(self, generation: Generation, index: int, output: Output) -> dict[str, Any]:
        said = logprobs.of_chat(self._tokens, output.logprobs) if self._body.logprobs else None
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        reason = output.finish_reason
        if self._tools is not None:
            items = parted(self._tools, output.text)
            message["content"] = "".join(one for one in items if isinstance(one, str))
            if calls := [_called(one) for one in items if isinstance(one, Call)]:
                message |= {"content": message["content"] or None, "tool_calls": calls}
                reason = "tool_calls" if reason == "stop" else reason
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": reason, "logprobs": said}
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.plain(output.prompt_logprobs or ())
        if self._body.return_token_ids:
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": generation.prompts[0]}
        return choice

    async def stream(self, generation: Generation, sender: Sender) -> None:
        body = self._body
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        named = self._head("chat.completion.chunk")
        head = b"data: " + encoded(named)[:-1] + b',"choices":[{"index":'
        tail = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"
        begun = [False] * generation.params.n
        voices, numbers = [Voice(self._tools) for _ in begun], [0] * len(begun)
        count = 0
        async for told in generation.pieces():
            frames = []
            for index, piece in told:
                count += len(piece.token_ids)
                place = head + str(index).encode()
                if not begun[index]:
                    begun[index] = True
                    frames.append(place + b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' + tail)
                reason, items = piece.finish_reason, voices[index].says(piece)
                text = "".join(one for one in items if isinstance(one, str))
                if text or piece.logprobs or body.return_token_ids:
                    frames.append(place + self._delta(piece, text) + b',"finish_reason":null' + tail)
                for call in [one for one in items if isinstance(one, Call)]:
                    deltas = _call_deltas(call, numbers[index])
                    numbers[index] += 1
                    frames += [place + b',"delta":' + one + b',"logprobs":null,"finish_reason":null' + tail for one in deltas]
                if reason is not None:
                    reason = "tool_calls" if reason == "stop" and voices[index].called else reason
                    frames.append(place + b',"delta":{},"logprobs":null,"finish_reason":"' + reason.encode() + b'"' + tail)
            if frames:
                await sender.events(b"".join(frames))
        if with_usage:
            await sender.events(b"data: " + encoded({**named, "choices": [], "usage": usage(generation, count)}) + b"\n\n")
        await sender.end(DONE)

    def _delta(self, piece: Piece, text: str) -> bytes:
        delta = b',"delta":{"content":' + encoded(text) + b'},"logprobs":'
        delta += encoded(logprobs.of_chat(self._tokens, piece.logprobs)) if self._body.logprobs else b"null"
        if self._body.return_token_ids:
            delta += b',"token_ids":' + encoded(piece.token_ids)
        return delta


def _called(call: Call) -> dict[str, Any]:
    return {"id": fresh_id("call"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_deltas(call: Call, number: int) -> list[bytes]:
    """A call in two deltas, as OpenAI sends them: its name, then its arguments."""
    named = {"index": number, **_called(Call(call.name, ""))}
    return [encoded({"tool_calls": [one]}) for one in (named, {"index": number, "function": {"arguments": call.arguments}})]
