"""``POST /v1/embeddings``: texts as the mean of their hidden states after the last norm; not scaled to length 1."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from hasten.engine import SamplingParams
from hasten.serve.bodies import Strict, prompts_of
from hasten.serve.errors import ApiError
from hasten.serve.log import Note
from hasten.serve.mailbox import Mailbox
from hasten.serve.messages import Vector
from hasten.serve.reply import Reply, Sender
from hasten.serve.service import Service
from hasten.serve.supervisor import Supervisor

NOTHING = SamplingParams(max_tokens=1)
"""What is checked beside the prompts."""


def _whole(given: Any) -> Any:
    if given is not None:
        raise ValueError("vectors come whole, as wide as the model; leave it out")
    return given


class EmbeddingsBody(Strict):
    """``POST /v1/embeddings``."""

    model: str | None = Field(default=None, max_length=1024)
    """The served model's name; may be left out."""
    input: Annotated[Any, BeforeValidator(prompts_of), Field(json_schema_extra={"type": ["string", "array"]})]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, BeforeValidator(_whole)] = None
    """Refused."""
    user: str | None = None
    """Accepted."""
    timeout_s: float | None = Field(default=None, gt=0, le=86400)


class _Job:
    """The vectors of one HTTP request. Read them, or leave them: what is not done then is aborted."""

    def __init__(self, supervisor: Supervisor, prompts: list[list[int]], note: Note) -> None:
        self.prompts, self._supervisor, self._mailbox = prompts, supervisor, Mailbox[Vector]()
        note.prompt_tokens = sum(map(len, prompts))
        self._id = supervisor.embed(prompts, self._mailbox)

    async def vectors(self) -> list[bytes]:
        """One a prompt, in order, as float32 in little-endian order. Raises ApiError where one fails."""
        found: dict[int, bytes] = {}
        while len(found) < len(self.prompts):
            for one in await self._mailbox.take():
                if one.error is not None:
                    raise ApiError(400 if one.fault == "request" else 500, one.error, param="input", code="output_failed")
                found[one.place] = one.data
        self._supervisor.ended(self._id)
        return [found[place] for place in range(len(self.prompts))]

    def close(self) -> None:
        """Abort what is not done."""
        self._supervisor.abort(self._id)


def embeddings(service: Service, body: EmbeddingsBody, note: Note) -> Reply:
    """Answer it. Raises ApiError for what can be told at once."""
    service.check_model(body.model)

    async def work(sender: Sender) -> None:
        async def encode() -> list[list[int]]:
            return await service.texts.prompts(body.input, NOTHING, "input")

        def begin(prompts: list[list[int]]) -> _Job:
            return _Job(service.supervisor, prompts, note)

        async with service.computed(encode, len(body.input), body.timeout_s, begin) as job:
            vectors = await job.vectors()
        data = [{"object": "embedding", "index": place, "embedding": _said(one, body)} for place, one in enumerate(vectors)]
        count = sum(map(len, job.prompts))
        await sender.body(
            200, {"object": "list", "data": data, "model": service.name, "usage": {"prompt_tokens": count, "total_tokens": count}}
        )

    return Reply(work, note)


def _said(vector: bytes, body: EmbeddingsBody) -> str | list[float]:
    if body.encoding_format == "base64":
        return base64.b64encode(vector).decode()
    numbers: list[float] = np.frombuffer(vector, "<f4").tolist()
    return numbers
