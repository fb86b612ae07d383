"""The tokenizer inside a GGUF file, as the `tokenizer.json` that it was made from, kept in the user's cache.

Source: https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp, for what each name of a pre-tokenizer splits by."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hasten.base import settings
from hasten.base.errors import one_line
from hasten.formats.gguf import GgufFile
from hasten.model import Tokenizer, find_tokenizer

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": None, "default": None,
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST, "llama3": _WORDS + r"\p{N}{1,3}" + _REST, "llama-v3": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}  # fmt: skip
"""By the name of a pre-tokenizer, what texts are split by before bytes are joined; None for GPT-2's own expression."""
CONTROL, USER_DEFINED = 3, 4


def gguf_tokenizer(file: GgufFile) -> tuple[Tokenizer | None, str]:
    """The tokenizer of ``file``: its own where it is a byte-level BPE whose splitting is known, else the one beside it; or the reason why
    there is none."""
    made, cache = _tokenizer_json(file.metadata), settings.cache_directory()
    if isinstance(made, str):
        why = made
    elif cache is None:
        why = "there is no cache directory to keep its tokenizer in"
    else:
        try:
            return find_tokenizer(_kept(cache / "tokenizers", made))
        except OSError as error:
            why = f"its tokenizer cannot be kept in {cache} ({error.strerror or error})"
    beside, _ = find_tokenizer(file.path.parent)
    return beside, "" if beside else f"{file.path}: {why}; put the tokenizer.json of this model beside it"


def _kept(cache: Path, made: dict[str, str]) -> Path:
    """A directory with these files, by name, made unless it is there."""
    directory = cache / hashlib.blake2b(json.dumps(made, sort_keys=True).encode(), digest_size=16).hexdigest()
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as staging:
            whole = Path(staging) / "whole"
            whole.mkdir()
            for name, text in made.items():
                (whole / name).write_text(text, "utf-8")
            try:
                os.replace(whole, directory)
            except OSError:  # somebody else made it meanwhile
                if not directory.is_dir():
                    raise
    return directory


def _tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, str] | str:
    """The files of the tokenizer, or why it cannot be made."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in SPLITS:
        return f"its tokenizer is {one_line(kind, 40)}, split as {one_line(pre, 40)}, which is not read from GGUF"
    if not isinstance(tokens, list) or not isinstance(merges, list) or len(set(tokens)) != len(tokens):
        return "its tokenizer has no list of tokens, each once, with their merges"
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs) or any(_is_no_text(text) for text in (*tokens, *merges)):
        return "its tokenizer has tokens that are no text, or merges that are no pairs"
    if types is not None and not (isinstance(types, np.ndarray) and len(types) == len(tokens)):
        return "its tokenizer has not as many token types as tokens"
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": its == CONTROL,
        }
        for index, its in enumerate([] if types is None else types.tolist())
        if its in {CONTROL, USER_DEFINED}
    ]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": SPLITS[pre] is None}
    split = {"type": "Split", "pattern": {"Regex": SPLITS[pre]}, "behavior": "Isolated", "invert": False}
    ends = {name: tokens[index] for name in ("bos", "eos") if (index := _id(metadata, name, len(tokens))) is not None}
    starts = "bos" in ends and metadata.get("tokenizer.ggml.add_bos_token", pre.startswith("llama")) is True
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": bytes_only if SPLITS[pre] is None else {"type": "Sequence", "pretokenizers": [split, bytes_only]},
        "post_processor": _with_start(ends["bos"], tokens.index(ends["bos"])) if starts else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)}, "merges": pairs,
            "ignore_merges": pre.startswith("llama"),
        },
    }  # fmt: skip
    template = metadata.get("tokenizer.chat_template")
    about = {f"{name}_token": token for name, token in ends.items()} | ({"chat_template": template} if isinstance(template, str) else {})
    return {"tokenizer.json": json.dumps(whole), "tokenizer_config.json": json.dumps(about)}


def _is_no_text(text: str) -> bool:
    """Whether it has bytes that were no UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count else None


def _with_start(token: str, index: int) -> dict[str, Any]:
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
