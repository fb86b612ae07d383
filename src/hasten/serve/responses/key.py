"""What decides an answer, and the name it is kept under.

MessagePack writes every value with its type, and with its length where that may vary, and dataclasses with the names of all their fields:
two different requests cannot be written alike, and a field that SamplingParams gains is part of the key by itself."""

import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np

from hasten.engine import SamplingParams

VERSION = 1
"""Counts up whenever equal keys come to mean something else."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: whose it is, the token ids of its prompt, and how it is answered. Tenants share nothing."""

    tenant: str
    prompt: tuple[int, ...]
    params: SamplingParams


def must_repeat(params: SamplingParams) -> bool:
    """Whether the request gives the same answer each time: it takes the likeliest tokens, searches, or has a seed of its own."""
    return params.temperature == 0.0 or params.seed is not None or params.beam is not None


def key_of(model: bytes, asked: Asked) -> bytes:
    """SHA-256 of the model's digest and everything that was asked, 32 bytes."""
    prompt = np.array(asked.prompt, "<i8").tobytes()  # token by token takes a millisecond for a long one
    return _sha256("answer", model, asked.tenant, prompt, asked.params)


def group_of(model: bytes, asked: Asked) -> bytes:
    """The same of all but the prompt: what two requests must have in common for one to be answered like the other."""
    return _sha256("group", model, asked.tenant, asked.params)


def _sha256(*fields: object) -> bytes:
    # "deterministic" orders what has no order of its own
    return hashlib.sha256(msgspec.msgpack.encode((VERSION, *fields), order="deterministic")).digest()
