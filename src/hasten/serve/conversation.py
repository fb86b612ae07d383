"""Conversations: what every route that chats does with messages, tools and an answer, whatever its API calls them."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hasten.base.errors import ConfigError
from hasten.engine import SamplingParams
from hasten.serve.errors import ApiError, refused
from hasten.serve.log import Note
from hasten.serve.reply import Reply, Sender
from hasten.serve.service import Generation, Service
from hasten.serve.tools import Tools, in_words, told_in_words

PLAIN_STOPS = ("\nuser:", "\nsystem:")
"""What ends an answer under the plain template, where the model would go on for the user."""

Names = Mapping[str, str]
"""What an API calls fields that messages of `hasten.engine` name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """``messages`` as templates take them; ``at_fault`` is the field that the engine may yet refuse, where it is none of ``tools``."""

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Tools | None = None
    add_generation_prompt: bool = True
    timeout_s: float | None = None
    at_fault: str | None = None


def stops_of(service: Service) -> list[str] | None:
    """What ends an answer where the request says nothing of it."""
    return list(PLAIN_STOPS) if service.texts.template is None and service.texts.has_text else None


async def prompt_ids(
    service: Service, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None, tools: Tools | None, answered: bool = True
) -> list[int]:  # fmt: skip
    """Token ids of a conversation. Raises UserError for what the model or its template does not take."""
    told = None
    if service.texts.template is not None and "tools" in service.texts.template:
        told = None if tools is None else tools.told
    else:
        messages = in_words(messages) if tools is None else told_in_words(tools, messages)
    return await service.texts.chat(messages, params, answered, told)


def converse(
    service: Service, conversation: Conversation, answer: Callable[[Generation, Sender], Awaitable[None]], tenant: str, note: Note,
    names: Names | None = None,
) -> Reply:  # fmt: skip
    """What ``answer`` makes of the outputs."""
    params, tools = conversation.params, conversation.tools

    async def work(sender: Sender) -> None:
        async def encode() -> list[list[int]]:
            return [await prompt_ids(service, conversation.messages, params, tools, conversation.add_generation_prompt)]

        at_fault = conversation.at_fault or ("tools" if tools is not None else None)
        with called(names or {}):
            async with service.generation(encode, params.sequences, params, tenant, note, conversation.timeout_s, at_fault) as generation:
                await answer(generation, sender)

    return Reply(work, note)


@contextmanager
def called(names: Names) -> Iterator[None]:
    """Errors name fields as another API calls them."""
    try:
        yield
    except ConfigError as error:
        raise _renamed(refused(error), names) from None
    except ApiError as error:
        raise _renamed(error, names) from None


def _renamed(error: ApiError, names: Names) -> ApiError:
    for ours, theirs in names.items():
        if error.param is not None and error.param.partition("[")[0] == ours:
            rest = error.param[len(ours) :]
            message = theirs + error.message[len(ours) :] if error.message.startswith(ours) else error.message
            return ApiError(error.status, message, param=theirs + rest, code=error.code, retry_s=error.retry_s)
    return error
