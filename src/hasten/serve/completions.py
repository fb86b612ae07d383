"""``POST /v1/completions``."""

import secrets
import time
from typing import Any

from hasten.engine import TokenLogprob
from hasten.serve import logprobs
from hasten.serve.asked import NAMES, grammar_field, of_completion
from hasten.serve.bodies import CompletionBody
from hasten.serve.conversation import called
from hasten.serve.entries import check_entries
from hasten.serve.log import Note
from hasten.serve.messages import Piece
from hasten.serve.outputs import Output, StreamUsage, collect, usage, written
from hasten.serve.reply import DONE, Reply, Sender, encoded
from hasten.serve.service import Generation, Service


def completion(service: Service, body: CompletionBody, tenant: str, note: Note) -> Reply:
    """Answer it. Raises ApiError for what can be told at once."""
    service.check_model(body.model)
    with called(NAMES):
        params = of_completion(body)
    view = _View(service, body)

    async def work(sender: Sender) -> None:
        async def encode() -> list[list[int]]:
            prompts = await service.texts.prompts(body.prompt, params)
            of_prompts = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"  # echo shows the prompt's too
            check_entries(prompts, params, service.texts.context, of_prompts=of_prompts, of_outputs="logprobs")
            return prompts

        outputs = len(body.prompt) * params.sequences
        at_fault = grammar_field(body)
        async with service.generation(encode, outputs, params, tenant, note, body.timeout_s, at_fault) as generation:
            await (view.stream(generation, sender) if body.stream else view.whole(generation, sender))

    return Reply(work, note)


class _View:
    """One request's answer in OpenAI's words."""

    def __init__(self, service: Service, body: CompletionBody) -> None:
        self._service, self._body = service, body
        self._tokens = service.texts.tokens
        self._with_ids = body.return_token_ids or not service.texts.has_text
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self, generation: Generation, sender: Sender) -> None:
        outputs = await collect(generation)
        counted = usage(generation, 0 if self._body.max_tokens == 0 else sum(len(output.token_ids) for output in outputs))
        if self._body.max_tokens == 0:  # the one that was drawn is not asked for
            outputs = [await self._scored(generation, index, output) for index, output in enumerate(outputs)]

        def made() -> dict[str, Any]:
            choices = [self._choice(generation, index, output) for index, output in enumerate(outputs)]
            return {**self._head, "choices": choices, "usage": counted}

        await sender.whole(200, await written(self._service, outputs, made))

    async def _scored(self, generation: Generation, index: int, output: Output) -> Output:
        """The prompt in place of the output."""
        text = await self._service.texts.decode(generation.prompts[index // generation.params.n], True)
        return Output([text], prompt_logprobs=output.prompt_logprobs, finish_reason=output.finish_reason)

    def _choice(self, generation: Generation, index: int, output: Output) -> dict[str, Any]:
        body, prompt = self._body, generation.prompts[index // generation.params.n]
        text, ids, entries = output.text, output.token_ids, output.logprobs
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": output.finish_reason, "logprobs": None}
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs(prompt if body.echo else [], output.prompt_logprobs or (), ids, entries, 0)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.plain(output.prompt_logprobs or ())
        if self._with_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        return choice

    def _logprobs(
        self, prompt: list[int], of_prompt: tuple[TokenLogprob, ...] | Any, ids: Any, entries: Any, offset: int
    ) -> dict[str, list[Any]]:  # fmt: skip
        known: list[TokenLogprob | None] = [None, *of_prompt] if prompt else []
        return logprobs.of_completion(self._tokens, [*known, *entries], [*prompt, *ids], offset)

    async def stream(self, generation: Generation, sender: Sender) -> None:
        body, n = self._body, generation.params.n
        used = StreamUsage(body.stream_options, generation)
        head = b"data: " + encoded(self._head)[:-1] + b',"choices":[{"index":'
        offsets = [0] * (len(generation.prompts) * n)
        fresh = [True] * len(offsets)
        async for told in generation.pieces():
            frames = []
            for index, piece in told:
                used.tokens += len(piece.token_ids)
                tail = used.tail()
                if piece.text or piece.logprobs or self._with_ids or piece.finish_reason is not None:
                    prompt = generation.prompts[index // n] if body.echo and fresh[index] else []
                    fresh[index] = False
                    frames.append(head + self._part(index, piece, prompt, offsets) + tail)
            if frames:
                await sender.events(b"".join(frames))
        if last := used.last(self._head):
            await sender.events(last)
        await sender.end(DONE)

    def _part(self, index: int, piece: Piece, prompt: list[int], offsets: list[int]) -> bytes:
        """One choice's news, as the inside of an object after ``"index":``."""
        reason = b"null" if piece.finish_reason is None else b'"' + piece.finish_reason.encode() + b'"'
        part = str(index).encode() + b',"text":' + encoded(piece.text) + b',"finish_reason":' + reason
        if self._body.logprobs is None:
            part += b',"logprobs":null'
        else:
            said = self._logprobs(prompt, piece.prompt_logprobs or (), piece.token_ids, piece.logprobs, offsets[index])
            part += b',"logprobs":' + encoded(said)
        if self._body.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            part += b',"prompt_logprobs":' + encoded(logprobs.plain(piece.prompt_logprobs))
        if self._with_ids:
            part += b',"token_ids":' + encoded(piece.token_ids)
        offsets[index] += len(piece.text)
        return part
