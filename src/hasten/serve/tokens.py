"""The text and bytes of single tokens, for log-probabilities."""

import functools
import threading
from collections.abc import Sequence

from hasten.model.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte (Radford et al. 2019, GPT-2): itself where it is visible, else one
    from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


class TokenTexts:
    """Of the tokens of one tokenizer; of none, tokens are called by their numbers. Of any thread."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}
        self._reading = threading.Lock()  # a tokenizer serves one thread at a time

    def text(self, token: int) -> str:
        """As OpenAI's API writes a token: its text, or ``bytes:\\xe2\\x80`` where its bytes are none by themselves."""
        text, data = self._both(token)
        return text if REPLACEMENT not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def data(self, token: int) -> Sequence[int]:
        """Its bytes."""
        return list(self._both(token)[1])

    def _both(self, token: int) -> tuple[str, bytes]:
        if (known := self._known.get(token)) is None:
            with self._reading:
                known = self._known[token] = self._read(token)
        return known

    def _read(self, token: int) -> tuple[str, bytes]:
        text = f"token_id:{token}" if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)
        return text, self._raw(token) if REPLACEMENT in text else text.encode()

    def _raw(self, token: int) -> bytes:
        """The bytes of a token that is no text: a byte-fallback token, or part of a character in a byte-level vocabulary."""
        piece = self._pieces.get(token, "")
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        alphabet = self._alphabet
        if piece and all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        return REPLACEMENT.encode()

    @functools.cached_property
    def _alphabet(self) -> dict[str, int]:
        return _byte_alphabet()

    @functools.cached_property
    def _pieces(self) -> dict[int, str]:
        return {} if self._tokenizer is None else {token: piece for piece, token in self._tokenizer.vocabulary.items()}
