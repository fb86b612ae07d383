"""Conversations: what every route that chats does with messages, tools and an answer, whatever its API calls them."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hasten.base.errors import ConfigError
from hasten.engine import SamplingParams
from hasten.serve.entries import check_entries
from hasten.serve.errors import ApiError, refused
from hasten.serve.log import Note
from hasten.serve.reply import Reply, Sender
from hasten.serve.service import Generation, Service
from hasten.serve.tools import Offer

PLAIN_STOPS = ("\nuser:", "\nsystem:")
"""What ends an answer under the plain template, where the model would go on for the user."""

Names = Mapping[str, str]
"""What an API calls fields that messages of `hasten.engine` name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """``messages`` as templates take them, what they may call, and ``at_fault``, the field that the engine may yet refuse."""

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    offer: Offer
    add_generation_prompt: bool = True
    timeout_s: float | None = None
    at_fault: str | None = None
    of_outputs: str = "logprobs"
    """The field that asks for log-probabilities of outputs."""


def stops_of(service: Service) -> list[str] | None:
    """What ends an answer where the request says nothing of it."""
    return list(PLAIN_STOPS) if service.texts.template is None and service.texts.has_text else None


def converse(
    service: Service, conversation: Conversation, answer: Callable[[Generation, Sender], Awaitable[None]], tenant: str, note: Note,
    names: Names | None = None,
) -> Reply:  # fmt: skip
    """What ``answer`` makes of the outputs."""
    params, offer = conversation.params, conversation.offer

    async def work(sender: Sender) -> None:
        async def encode() -> list[list[int]]:
            prompts = [await service.texts.chat(conversation.messages, params, conversation.add_generation_prompt, offer.shown)]
            check_entries(prompts, params, service.texts.context, of_prompts="prompt_logprobs", of_outputs=conversation.of_outputs)
            return prompts

        at_fault, timeout_s = conversation.at_fault, conversation.timeout_s
        with called(names or {}):
            async with service.generation(encode, params.sequences, params, tenant, note, timeout_s, at_fault) as generation:
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
