"""A whole answer as it is kept: plain structs, and the bytes they become.

The bytes are a version, a digest of what follows under the key they belong to, and MessagePack. Whatever is not exactly that, of another
version, damaged, or another request's, is no answer."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec

from hasten.engine import Completion, TokenLogprob

VERSION = b"\x02"
"""Counts up whenever stored bytes change their meaning."""

_DIGEST = 16  # bytes


class Output(msgspec.Struct, frozen=True, array_like=True):
    """One output that ended of itself."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    stop: str | None = None


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """All outputs of a request, in the order of their choices. ``generated_tokens`` are all that were drawn for it, those of outputs that
    ``best_of`` left out included."""

    outputs: tuple[Output, ...]
    prompt_tokens: int
    generated_tokens: int

    @classmethod
    def of(cls, completions: Sequence[Completion], generated_tokens: int | None = None) -> "Answer | None":
        """Of what the engine returned for one prompt; None where an output failed, for errors are not kept. ``generated_tokens`` are those
        of the outputs unless given."""
        outputs = []
        for one in completions:
            if one.finish_reason == "error" or one.error is not None:
                return None
            outputs.append(Output(one.text, one.token_ids, one.finish_reason, one.logprobs, one.prompt_logprobs))
        if not outputs:
            return None
        drawn = sum(len(one.token_ids) for one in outputs) if generated_tokens is None else generated_tokens
        return cls(tuple(outputs), len(completions[0].prompt_token_ids), drawn)

    def completions(self, prompt: tuple[int, ...]) -> list[Completion]:
        """As the engine would return them."""
        return [
            Completion(prompt, one.token_ids, one.text, one.finish_reason, choice, one.logprobs, one.prompt_logprobs)
            for choice, one in enumerate(self.outputs)
        ]


_DECODER = msgspec.msgpack.Decoder(Answer)


def encode_answer(key: bytes, answer: Answer) -> bytes:
    """The bytes of an answer to the request of that key."""
    packed = msgspec.msgpack.encode(answer)
    return VERSION + _digest(key, packed) + packed


def decode_answer(key: bytes, value: bytes) -> Answer | None:
    """The answer, or None for bytes that are none of this key."""
    packed = value[len(VERSION) + _DIGEST :]
    if value[: len(VERSION)] != VERSION or value[len(VERSION) : len(VERSION) + _DIGEST] != _digest(key, packed):
        return None
    try:
        return _DECODER.decode(packed)
    except (msgspec.DecodeError, RecursionError):  # ValidationError is one
        return None


def _digest(key: bytes, packed: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=_DIGEST, key=key).digest()
