"""The application: which path does what."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from hasten import __version__
from hasten.base.errors import UserError
from hasten.serve.anthropic_bodies import CountBody, MessagesBody
from hasten.serve.anthropic_messages import count_tokens, messages
from hasten.serve.bodies import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse, schema_of, schemas_of
from hasten.serve.chat import chat
from hasten.serve.completions import completion
from hasten.serve.embeddings import EmbeddingsBody, embeddings
from hasten.serve.errors import ApiError, refused
from hasten.serve.log import Note
from hasten.serve.metrics import CONTENT_TYPE, Metrics
from hasten.serve.openai_responses import respond
from hasten.serve.reply import encoded
from hasten.serve.responses_bodies import ResponsesBody
from hasten.serve.service import Service
from hasten.serve.shapes import error_body
from hasten.serve.tools import plain_messages

QUICK = 64 << 10
"""Bytes of a body that is read at once; what is longer is read beside the event loop."""


BODIES = (CompletionBody, ChatBody, MessagesBody, CountBody, EmbeddingsBody, ResponsesBody, TokenizeBody, DetokenizeBody)


class Api(FastAPI):
    """FastAPI that describes bodies, which it does not read by itself."""

    def openapi(self) -> dict[str, Any]:
        """The description under ``/openapi.json``."""
        if self.openapi_schema is None:
            super().openapi().setdefault("components", {}).setdefault("schemas", {}).update(schemas_of(BODIES))
        return super().openapi()


def make_app(service: Service, metrics: Metrics) -> FastAPI:
    """Of the API, without what guards it. Requests come with what `hasten.serve.guard` found: body, tenant and note."""
    app = Api(title="hasten", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def parsed(kind: type[Body], request: Request) -> Body:
        raw: bytes = request.state.body
        return parse(kind, raw) if len(raw) <= QUICK else await service.texts.aside(lambda: parse(kind, raw))

    @app.exception_handler(ApiError)
    async def _known(request: Request, error: ApiError) -> Response:
        note_of(request).said = error.message
        return answer(error_body(request.scope["path"], error), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        words = {404: "there is nothing under this path", 405: "this path is not asked with this method"}
        found = ApiError(error.status_code, words.get(error.status_code, str(error.detail)))
        note_of(request).said = found.message
        return answer(error_body(request.scope["path"], found), found.status, dict(error.headers or {}))

    @app.post("/v1/completions", openapi_extra=schema_of(CompletionBody))
    async def completions(request: Request) -> Response:
        return completion(service, await parsed(CompletionBody, request), request.state.tenant, note_of(request))

    @app.post("/v1/chat/completions", openapi_extra=schema_of(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return chat(service, await parsed(ChatBody, request), request.state.tenant, note_of(request))

    @app.post("/v1/messages", openapi_extra=schema_of(MessagesBody))
    async def anthropic_messages(request: Request) -> Response:
        return messages(service, await parsed(MessagesBody, request), request.state.tenant, note_of(request))

    @app.post("/v1/messages/count_tokens", openapi_extra=schema_of(CountBody))
    async def anthropic_count(request: Request) -> Response:
        return answer(await count_tokens(service, await parsed(CountBody, request)))

    @app.post("/v1/embeddings", openapi_extra=schema_of(EmbeddingsBody))
    async def embed(request: Request) -> Response:
        return embeddings(service, await parsed(EmbeddingsBody, request), note_of(request))

    @app.post("/v1/responses", openapi_extra=schema_of(ResponsesBody))
    async def responses(request: Request) -> Response:
        return respond(service, await parsed(ResponsesBody, request), request.state.tenant, note_of(request))

    @app.get("/v1/models")
    async def models() -> Response:
        return answer({"object": "list", "data": [_card(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return answer(_card(service))

    @app.post("/tokenize", openapi_extra=schema_of(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await parsed(TokenizeBody, request)
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give a prompt or messages, one of them", param="prompt")

        async def tokens() -> list[int]:
            if body.prompt is not None:
                return await service.texts.encode(body.prompt, body.add_special_tokens)
            return await service.texts.chat(plain_messages(body.messages or ()), None, body.add_generation_prompt)

        ids = await mended(tokens)
        return answer({"tokens": ids, "count": len(ids), "max_model_len": service.texts.context})

    @app.post("/detokenize", openapi_extra=schema_of(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await parsed(DetokenizeBody, request)
        service.check_model(body.model)
        return answer({"prompt": await mended(lambda: service.texts.decode(body.tokens, body.skip_special_tokens))})

    @app.get("/health")
    async def health() -> Response:
        """Does the server run? Whether it can answer is `/ready`'s to say."""
        failed = service.supervisor.state == "failed"
        return answer({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/ready")
    async def ready() -> Response:
        try:
            service.check_able()
        except ApiError as error:
            return answer({"status": "not ready", "reason": error.message}, error.status, error.headers)
        return answer({"status": "ready"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    return app


def note_of(request: Request) -> Note:
    """Where to note what becomes of a request."""
    note: Note = request.state.note
    return note


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON."""
    return Response(encoded(value), status, dict(headers or {}), "application/json")


async def mended(task: Callable[[], Awaitable[Any]]) -> Any:
    """What a task gives; its complaint to the user as an ApiError."""
    try:
        return await task()
    except UserError as error:
        raise refused(error) from None


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name, "object": "model", "created": service.created, "owned_by": "hasten", "max_model_len": service.texts.context,
    }  # fmt: skip
