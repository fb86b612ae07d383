"""Log-probabilities in the shapes of OpenAI's two APIs."""

from collections.abc import Sequence
from typing import Any

from hasten.engine import TokenLogprob
from hasten.serve.tokens import TokenTexts

LEAST = -9999.0
"""What JSON has no word for."""


def of_completion(tokens: TokenTexts, entries: Sequence[TokenLogprob | None], ids: Sequence[int], offset: int) -> dict[str, list[Any]]:
    """For ``/v1/completions``: ``ids`` and what is known of each, from character ``offset`` of the text on."""
    made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for id, entry in zip(ids, entries):
        text = tokens.text(id)
        made["tokens"].append(text)
        made["token_logprobs"].append(None if entry is None else number(entry.logprob))
        made["top_logprobs"].append(None if entry is None else {tokens.text(top): number(value) for top, value in entry.top})
        made["text_offset"].append(offset)
        offset += len(text)
    return made


def of_chat(tokens: TokenTexts, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """For ``/v1/chat/completions``."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": tokens.text(token), "logprob": number(logprob), "bytes": tokens.data(token)}

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(top, value) for top, value in entry.top]} for entry in entries
    ]  # fmt: skip
    return {"content": content, "refusal": None}


def plain(entries: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """Of a prompt, by token ids; nothing is known of the first."""
    return [None, *({"token": one.token, "logprob": number(one.logprob), "top": dict(one.top)} for one in entries)]


def number(logprob: float) -> float:
    """One that JSON can say."""
    return max(logprob, LEAST)
