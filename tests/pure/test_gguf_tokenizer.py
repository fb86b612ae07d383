"""The tokenizer inside a GGUF file against the one it was made from."""

import json

import numpy as np
import pytest

from hasten import load, save
from hasten.checkpoint import bundled_directory
from tests.pure.test_gguf import MODEL, SIZES, gguf, model_tensors

WHOLE = json.loads((bundled_directory("code-8m") / "tokenizer.json").read_text())
TOKENS = [token for token, _ in sorted(WHOLE["model"]["vocab"].items(), key=lambda entry: entry[1])]
SPECIAL = {entry["id"] for entry in WHOLE["added_tokens"]}
METADATA = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.merges": [" ".join(pair) for pair in WHOLE["model"]["merges"]],
    "tokenizer.ggml.token_type": np.array([3 if index in SPECIAL else 1 for index in range(len(TOKENS))]),
    "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}  # fmt: skip
TEXTS = [
    "import json\n\n\ndef read_config(path):\n    return json.loads(path)  # don't 12345",
    "", " ", "naïve — 中文 🙂\t\r\n", "<|endoftext|>a<|fim_middle|>", "I'LL we're  x   \n\n y", "1234567 89",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


def model_with(tmp_path, **changes):
    metadata = {**SIZES, **METADATA, **{key: value for key, value in changes.items() if value is not None}}
    for key, value in changes.items():
        if value is None:
            del metadata[key]
    (tmp_path / "m.gguf").write_bytes(gguf(metadata, model_tensors(["BF16"])[0]))
    return load(tmp_path / "m.gguf")


def test_it_is_the_tokenizer_it_was_made_from(tmp_path):
    model, theirs = model_with(tmp_path), MODEL.tokenizer
    for text in TEXTS:
        ids = model.tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        assert model.tokenizer.decode(ids, False) == theirs.decode(ids, False) == text
        assert model.tokenizer.decode(ids) == theirs.decode(ids)
    assert model.tokenizer.special_ids == theirs.special_ids
    assert model.tokenizer.vocabulary == theirs.vocabulary
    assert model.tokenizer.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    assert model.tokenizer.chat_template == "{{ messages[0].content }}"
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").tokenizer.encode(TEXTS[0]) == theirs.encode(TEXTS[0])
    assert model_with(tmp_path).tokenizer.path == model.tokenizer.path  # made once


def test_a_start_is_added_where_the_file_says_so(tmp_path):
    model = model_with(tmp_path, **{"tokenizer.ggml.add_bos_token": True})
    assert model.tokenizer.encode("import") == [0, *MODEL.tokenizer.encode("import")]
    assert model.tokenizer.encode("import", add_special_tokens=False) == MODEL.tokenizer.encode("import")


@pytest.mark.parametrize("pre", ["qwen2", "gpt-2"])
def test_other_ways_to_split(pre, tmp_path):
    tokenizer = model_with(tmp_path, **{"tokenizer.ggml.pre": pre}).tokenizer
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), False) == text
    digits = [tokenizer.decode([index]) for index in tokenizer.encode("12345")]
    assert all(len(each) == 1 for each in digits) == (pre == "qwen2")


def test_a_cache_that_cannot_be_written_costs_the_tokenizer_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    model = model_with(tmp_path)
    assert model.tokenizer is None
    assert "cannot be kept" in model.tokenizer_error


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokenizer.ggml.model": "llama"}, "'llama'"), ({"tokenizer.ggml.pre": "tekken"}, "'tekken'"),
        ({"tokenizer.ggml.merges": None}, "merges"), ({"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[0]]}, "each once"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "no pairs"), ({"tokenizer.ggml.tokens": [*TOKENS[:-1], b"\xff"]}, "no text"),
        ({"tokenizer.ggml.token_type": np.ones(3)}, "token types"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_is_missing_with_the_reason(changes, why, tmp_path):
    model = model_with(tmp_path, **changes)
    assert model.tokenizer is None
    assert why in model.tokenizer_error
    assert "\n" not in model.tokenizer_error
    (tmp_path / "tokenizer.json").write_text(json.dumps(WHOLE))
    assert load(tmp_path / "m.gguf").tokenizer.encode("import") == MODEL.tokenizer.encode("import")
