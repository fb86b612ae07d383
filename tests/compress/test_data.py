"""Text to calibrate on: where it comes from, how it is cut, and that none of it is in the held-out set."""

import json

import pytest

from hasten.base.errors import ConfigError, UserError
from hasten.checkpoint import load
from hasten.compress.data import FROM_ONE, cut_text, read_documents
from hasten.measure import held_out


@pytest.fixture(scope="module")
def model():
    return load("code-8m")


def test_the_standard_library_is_read_without_the_held_out_set():
    corpus, kept_out = read_documents(None), held_out()
    assert len(corpus.documents) > 10 * len(kept_out.documents)
    assert not set(corpus.documents) & set(kept_out.documents)


def test_held_out_documents_are_left_out_wherever_they_lie(tmp_path):
    kept_out = held_out().documents
    (tmp_path / "a.py").write_text(kept_out[0], "utf-8", newline="")
    (tmp_path / "b.py").write_text("print('mine')\n")
    corpus = read_documents(tmp_path)
    assert corpus.documents == ("print('mine')\n",)
    assert corpus.skipped == 1
    with pytest.raises(UserError, match="held-out"):
        read_documents(tmp_path / "a.py")


def test_lines_of_json_are_documents(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": 3}) + "\n" for text in ("one", "zwei ü")) + "\n", "utf-8")
    assert read_documents(file).documents == ("one", "zwei ü")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "line 1 is not JSON"),
        (b'{"text": "a"}\n["b"]', "line 2"),
        (b'{"txt": "a"}', "line 1"),
        (b"", "no lines"),
        (b"\xff", "line 1 is not JSON"),
        (b'{"text": "a"}\n"' + b"a" * (17 << 20), "line 2 has"),
    ],
    ids=["cut", "list", "other", "empty", "bytes", "long"],
)
def test_bad_lines_are_named(content, said, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_documents(file)


def test_windows_are_cut_as_asked_and_always_the_same(model):
    corpus = read_documents(None)
    text = cut_text(model, corpus, samples=20, sequence=64, seed=1)
    assert len(text.windows) == 20
    assert all(16 <= len(window) <= 64 for window in text.windows)
    assert len(set(text.windows)) == 20
    assert text == cut_text(model, corpus, samples=20, sequence=64, seed=1)
    assert text.sha256 != cut_text(model, corpus, samples=20, sequence=64, seed=2).sha256
    joined = "\n".join(corpus.documents)
    pieces = [model.text_tokenizer().decode(window) for window in text.windows]
    found = [
        next((i for i, document in enumerate(corpus.documents) if piece in document), None) for piece in pieces if "\ufffd" not in piece
    ]
    assert found
    assert None not in found
    assert max(found.count(each) for each in found) <= FROM_ONE
    assert all(piece in joined for piece in pieces if "\ufffd" not in piece)


def test_short_text_is_used_whole(model, tmp_path):
    (tmp_path / "a.txt").write_text("x = 1\n")
    text = cut_text(model, read_documents(tmp_path / "a.txt"), samples=5, sequence=64)
    assert len(text.windows) == 1
    assert text.windows[0][0] == model.text_tokenizer().start_id


@pytest.mark.parametrize(("samples", "sequence"), [(0, 64), (4, 1), (4, 4096)])
def test_what_cannot_be_cut_is_refused(model, samples, sequence):
    with pytest.raises(ConfigError, match="sample|sequence"):
        cut_text(model, read_documents(None), samples=samples, sequence=sequence)
