"""``POST /v1/chat/completions``."""

import secrets
import time
from typing import Any

from hasten.serve import logprobs
from hasten.serve.asked import NAMES, grammar_field, of_chat
from hasten.serve.bodies import ChatBody
from hasten.serve.conversation import Conversation, called, converse, stops_of
from hasten.serve.log import Note
from hasten.serve.messages import Piece
from hasten.serve.outputs import Output, StreamUsage, collect, usage, written
from hasten.serve.reply import DONE, Reply, Sender, encoded
from hasten.serve.service import Generation, Service
from hasten.serve.tools import Call, Offer, Voice, offer_of, plain_messages


def chat(service: Service, body: ChatBody, tenant: str, note: Note) -> Reply:
    """Answer it. Raises ApiError for what can be told at once."""
    service.check_model(body.model)
    if body.stop is None and body.beam_width is None:
        body = body.model_copy(update={"stop": stops_of(service)})
    with called(NAMES):
        offer = offer_of(body)
        params = of_chat(body, offer.grammar())
        messages = plain_messages(body.messages)
    view = _View(service, body, offer)
    conversation = Conversation(
        messages=messages, params=params, offer=offer, timeout_s=body.timeout_s, add_generation_prompt=body.add_generation_prompt,
        at_fault=grammar_field(body), of_outputs="top_logprobs" if body.top_logprobs else "logprobs",
    )  # fmt: skip
    return converse(service, conversation, view.stream if body.stream else view.whole, tenant, note)


class _View:
    """One request's answer in OpenAI's words."""

    def __init__(self, service: Service, body: ChatBody, offer: Offer) -> None:
        self._service, self._body, self._offer = service, body, offer
        self._tokens = service.texts.tokens
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created, self._model = int(time.time()), service.name

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    async def whole(self, generation: Generation, sender: Sender) -> None:
        outputs = await collect(generation)
        counted = usage(generation, sum(len(output.token_ids) for output in outputs))

        def made() -> dict[str, Any]:
            choices = [self._choice(generation, index, output) for index, output in enumerate(outputs)]
            return {**self._head("chat.completion"), "choices": choices, "usage": counted}

        await sender.whole(200, await written(self._service, outputs, made))

    def _voice(self) -> Voice:
        return Voice(self._offer, self._body.parallel_tool_calls is not False)

    def _choice(self, generation: Generation, index: int, output: Output) -> dict[str, Any]:
        said = logprobs.of_chat(self._tokens, output.logprobs) if self._body.logprobs else None
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        reason = output.finish_reason
        items = self._voice().says(output.text, last=True)
        if calls := [one for one in items if isinstance(one, Call)]:
            text = "".join(one for one in items if isinstance(one, str))
            message |= {"content": text.strip() or None, "tool_calls": [call.said() for call in calls]}
            reason = "tool_calls"
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": reason, "logprobs": said}
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.plain(output.prompt_logprobs or ())
        if self._body.return_token_ids:
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": generation.prompts[0]}
        return choice

    async def stream(self, generation: Generation, sender: Sender) -> None:
        body = self._body
        used = StreamUsage(body.stream_options, generation)
        named = self._head("chat.completion.chunk")
        head = b"data: " + encoded(named)[:-1] + b',"choices":[{"index":'
        begun = [False] * generation.params.n
        voices = [self._voice() for _ in begun]
        async for told in generation.pieces():
            frames = []
            for index, piece in told:
                used.tokens += len(piece.token_ids)
                tail = used.tail()
                place = head + str(index).encode()
                if not begun[index]:
                    begun[index] = True
                    frames.append(place + b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' + tail)
                reason: str | None = piece.finish_reason
                items = voices[index].says(piece.text, reason is not None)
                text, calls = "".join(one for one in items if isinstance(one, str)), [one for one in items if isinstance(one, Call)]
                reason = "tool_calls" if calls else reason
                if text or piece.logprobs or body.return_token_ids:
                    frames.append(place + self._delta(text, piece) + b',"finish_reason":null' + tail)
                for number, call in enumerate(calls):
                    delta = b',"delta":{"tool_calls":[' + encoded({"index": number, **call.said()}) + b"]}"
                    frames.append(place + delta + b',"logprobs":null,"finish_reason":null' + tail)
                if reason is not None:
                    frames.append(place + b',"delta":{},"logprobs":null,"finish_reason":"' + reason.encode() + b'"' + tail)
            if frames:
                await sender.events(b"".join(frames))
        if last := used.last(named):
            await sender.events(last)
        await sender.end(DONE)

    def _delta(self, text: str, piece: Piece) -> bytes:
        delta = b',"delta":{"content":' + encoded(text) + b'},"logprobs":'
        delta += encoded(logprobs.of_chat(self._tokens, piece.logprobs)) if self._body.logprobs else b"null"
        if self._body.return_token_ids:
            delta += b',"token_ids":' + encoded(piece.token_ids)
        return delta
