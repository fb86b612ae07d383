"""Text ↔ token ids, through the `tokenizers` library."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hasten.base.errors import TokenizerError, UserError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

TEXT_LIMIT = 16 << 20
"""Longest settings file or chat template that is read, in bytes."""

TOKENIZER_LIMIT = 256 << 20
"""Longest `tokenizer.json` that is read, in bytes; one of 262,144 tokens has about a seventh of it."""


class Tokenizer:
    """A `tokenizer.json`, with the settings of `tokenizer_config.json` that matter to hasten: chat template and special tokens.

    One instance serves one thread at a time. Reading the file waits for the first use. Whatever goes wrong inside is a TokenizerError."""

    def __init__(self, path: Path, settings: Mapping[str, Any], chat_template: str | None) -> None:
        self.path, self.settings, self.chat_template = path, settings, chat_template
        self._tokenizer: RustTokenizer | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens are added as the model's own tokenizer would.

        Raises UserError where the text holds half a surrogate pair, as text decoded from bytes that are no UTF-8 may."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = one_line(text[error.start])
            raise UserError(f"not valid UTF-8 text at character {error.start}, which is {found}; give text in UTF-8") from None
        with self._guarded("encode this text"):
            return list(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``. Bytes that are no UTF-8 come out as U+FFFD."""
        with self._guarded("decode these token ids"):
            return self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None."""
        with self._guarded("look a token up"):
            return self._rust.token_to_id(token)

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token, added tokens included."""
        with self._guarded("list its vocabulary"):
            return dict(self._rust.get_vocab(with_added_tokens=True))

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decode to nothing: special tokens."""
        with self._guarded("list its special tokens"):
            added = self._rust.get_added_tokens_decoder()
            return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def start_id(self) -> int | None:
        """The id of the document-start token, None where the model has none."""
        token = self.special_tokens.get("bos_token")
        return None if token is None else self.id_of(token)

    @property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and the like, as chat templates want them."""
        found = {}
        for key, value in self.settings.items():
            if key.endswith("_token") and isinstance(value, dict):
                value = value.get("content")
            if key.endswith("_token") and isinstance(value, str):
                found[key] = value
        return found

    @property
    def _rust(self) -> "RustTokenizer":
        if self._tokenizer is None:
            from tokenizers import Tokenizer as RustTokenizer

            _check_size(self.path, TOKENIZER_LIMIT)
            with self._guarded(""):
                tokenizer = RustTokenizer.from_file(str(self.path))
                tokenizer.no_truncation()
                tokenizer.no_padding()
            self._tokenizer = tokenizer
        return self._tokenizer

    def _guarded(self, task: str) -> "_Guard":
        return _Guard(self.path, task)


class _Guard:
    """What the library raises, as one line; Ctrl-C and an exit pass. A class, for every token comes through here."""

    __slots__ = ("_path", "_task")

    def __init__(self, path: Path, task: str) -> None:
        self._path, self._task = path, task

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, UserError):
            return
        # The library raises bare Exception, and a panic in it is a BaseException without a public type.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            return
        # A panic has been printed to file descriptor 2 by then. Only swapping the descriptor for the whole process, under every
        # other thread, would silence it; our line comes last instead.
        what = f"cannot {self._task}" if self._task else "not a usable tokenizer.json"
        raise TokenizerError(f"{self._path}: {what}: {one_line(str(error))}; take the one that came with the model") from None


def find_tokenizer(directory: Path) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a model directory, or None and the reason, fit for a user."""
    path = directory / "tokenizer.json"
    if path.is_file():
        settings = _read_settings(directory / "tokenizer_config.json")
        return Tokenizer(path, settings, _find_template(directory, settings)), ""
    convert = "convert it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    for pattern, kind in (
        ("*.model", "a sentencepiece model"),
        ("*.tiktoken", "a tiktoken file"),
        ("vocab.json", "vocab.json and merges.txt"),
    ):
        if any(directory.glob(pattern)):
            return None, f"{directory} has {kind} but no tokenizer.json, which text needs; {convert}"
    return None, f"{directory} has no tokenizer.json, so it takes token ids but no text; add the tokenizer.json of this model"


def _read_settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(_read_text(path))
    except TokenizerError:
        raise
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {one_line(str(error))}") from None
    if not isinstance(settings, dict):
        raise TokenizerError(f"{path}: an object is needed, not {one_line(settings)}")
    return settings


def _read_text(path: Path) -> str:
    """A text file of bounded size."""
    try:
        _check_size(path, TEXT_LIMIT)
        return path.read_text("utf-8")
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text (byte {error.start}); download it again") from None


def _check_size(path: Path, limit: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror or error}") from None
    if size > limit:
        raise TokenizerError(f"{path}: {size:,} bytes are too many; at most {limit:,} are read")


def _find_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates; the default one chats
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
