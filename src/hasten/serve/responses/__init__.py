"""The response cache: a request that must give the same answer is answered with the one it gave before.

A `ResponseCache` stands over a store, in memory or in Redis, and is closed until the model's digest is known. A `SemanticCache` is another
thing, and off unless asked for: it answers with what a prompt *like* this one got."""

from hasten.serve.responses.answer import Answer, Output, decode_answer, encode_answer
from hasten.serve.responses.cache import HEADER, Hit, ResponseCache
from hasten.serve.responses.digest import Played, digest_in_thread, model_digest
from hasten.serve.responses.key import Asked, key_of, must_repeat
from hasten.serve.responses.semantic import SemanticCache
from hasten.serve.responses.store import Limits, MemoryStore, Store, open_store
from hasten.serve.responses.warm import Warmed, read_requests, warm

__all__ = [
    "HEADER", "Answer", "Asked", "Hit", "Limits", "MemoryStore", "Output", "Played", "ResponseCache", "SemanticCache", "Store", "Warmed",
    "decode_answer", "digest_in_thread", "encode_answer", "key_of", "model_digest", "must_repeat", "open_store", "read_requests", "warm",
]  # fmt: skip
