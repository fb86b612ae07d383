"""Model: Spec + weights + tokenizer + provenance."""

from hasten.model.model import LogitsBackend, Model, Provenance, Source, find_backend, load_backend
from hasten.model.tokenizer import Tokenizer, find_tokenizer

__all__ = ["LogitsBackend", "Model", "Provenance", "Source", "Tokenizer", "find_backend", "find_tokenizer", "load_backend"]
