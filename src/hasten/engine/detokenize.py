"""Token ids into text as they come, and the search for stop strings in that text.

`Detokenizer` decodes a short window of the latest ids and emits only what no later id can change. What it relies on, and the byte-level,
byte-fallback, Metaspace and WordPiece decoders of the ``tokenizers`` library keep:

- the text of an id depends on the ids before it only through being first or not, through space stripped from the front of the whole, and
  through bytes of a character not yet complete;
- the text of an id depends on the ids after it only through those bytes. A byte-level decoder writes one U+FFFD for an incomplete character
  at the end, so one trailing U+FFFD is held, whether it turns out to be genuine or not. A byte-fallback decoder turns a whole run of byte
  tokens to U+FFFD if any of it is not UTF-8, so nothing of a run is settled until the run ends.

The window is cut from the front only where the cut is seen to be harmless: the ids after some place in it, which have text, must read the
same from the shorter window as from the longer. So the text emitted is a prefix of the decode of all ids at every step, without ever
decoding them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from hasten.base.errors import ConfigError

WINDOW = 32
"""Ids in the window before it is cut."""
KEPT = 8
"""Ids that must read the same from the shorter window, and as many again before them."""
REPLACEMENT = "\ufffd"


def byte_token_ids(vocabulary: Mapping[str, int]) -> frozenset[int]:
    """Ids of the byte-fallback tokens ``<0x00>`` … ``<0xFF>`` of a vocabulary from token to id; empty for a tokenizer without them."""
    names = (f"<0x{byte:{style}}>" for byte in range(256) for style in ("02X", "02x"))
    return frozenset(vocabulary[name] for name in names if name in vocabulary)


class Detokenizer:
    """Turns one output's ids, fed in any portions, into pieces of text that join to ``decode(all ids)``.

    ``decode`` maps ids to text and is called with short windows of them; it should skip special tokens. ``skipped_ids`` are ids that it
    turns into nothing (special tokens, padding past the vocabulary); they are dropped on arrival, so that a thousand in a row cost nothing.
    ``byte_ids`` are the byte-fallback tokens (`byte_token_ids`); a decoder that has them can revise emitted text unless both are told.
    ``lag`` holds back that many characters more, for a ``decode`` that edits its text afterwards (transformers' clean-up of spaces reaches
    back 4). To continue a prompt's text, feed the prompt's ids first and drop what comes back.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        skipped_ids: Collection[int] = frozenset(),
        byte_ids: Collection[int] = frozenset(),
        lag: int = 0,
    ) -> None:
        self._decode = decode
        self._skipped_ids = skipped_ids
        self._byte_ids = byte_ids
        self._lag = lag
        self._window: list[int] = []  # latest ids, up to the last that is not a byte token
        self._run: list[int] = []  # byte tokens since: a run that has not ended
        self._shown = ""  # the start of the window's text that is out, or is the text of ids before it

    def fork(self) -> Detokenizer:
        """Another that has seen the same ids."""
        other = Detokenizer(self._decode, skipped_ids=self._skipped_ids, byte_ids=self._byte_ids, lag=self._lag)
        other._window, other._run, other._shown = list(self._window), list(self._run), self._shown
        return other

    def feed(self, ids: Iterable[int]) -> str:
        """Take the next ids, in order; return the text that is now settled, often empty."""
        known = len(self._window)
        for token in ids:
            if token in self._skipped_ids:
                continue
            self._run.append(token)
            if token not in self._byte_ids:
                self._window += self._run
                self._run.clear()
        if len(self._window) == known:
            return ""
        text = self._decode(self._window)
        settled = text[: max(len(text) - self._lag - text.endswith(REPLACEMENT), 0)]
        if not settled.startswith(self._shown):
            return ""  # held until the text is again an extension of what is out
        piece = settled[len(self._shown) :]
        self._shown = settled
        if len(self._window) >= WINDOW:
            self._cut(text)
        return piece

    def flush(self) -> str:
        """The text still held; call it once, when no more ids will come."""
        self._window += self._run
        self._run.clear()
        text = self._decode(self._window)
        piece = text[len(self._shown) :]
        self._shown = text
        return piece

    def _cut(self, text: str) -> None:
        """Drop the front of the window, whose text is ``text``, if that is seen to change nothing; if not, a later feed tries again."""
        ids = self._window
        place = len(ids) - KEPT
        while ids[place - 1] in self._byte_ids and ids[place] in self._byte_ids:
            place += 1  # part of a run may read otherwise than the whole; the window's last id ends any run
        short = ids[place - KEPT :]
        before, short_before, short_text = self._decode(ids[:place]), self._decode(short[:KEPT]), self._decode(short)
        if not text.startswith(before) or not short_text.startswith(short_before):
            return  # a character spans the place
        rest = text[len(before) :]
        held = len(text) - len(self._shown)
        # Text after the place is needed as witness: both windows have then passed the same character boundary and any stripped space.
        if rest and held <= len(rest) and rest == short_text[len(short_before) :]:
            self._window = short
            self._shown = short_text[: len(short_text) - held]


class StopMatcher:
    """Finds stop strings in text fed in any portions, and holds back no more than could still become one.

    The output ends at the first character that completes a stop string; if it completes several, the longest counts. The text let through
    is all that stands before that string, whatever the portions. Work is at most two steps a character and stop string (Knuth, Morris and
    Pratt 1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops`` may be empty; an empty string among them raises `ConfigError`."""
        if isinstance(stops, str) or "" in stops:
            raise ConfigError(f"stop strings are {stops!r:.80}: give a list of strings of at least one character each, or an empty list")
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that the text so far ends with
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the output, once one has."""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Take the next text; return the text safe to emit and the stop string if one is complete. Text after a stop is dropped."""
        if self.stopped is not None:
            return "", self.stopped
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            for index in range(len(self._stops)):
                self._advance(index, character)
            complete = [stop for stop, matched in zip(self._stops, self._matched) if matched == len(stop)]
            if complete:
                self.stopped = max(complete, key=len)
                self._held = ""
                return text[: end - len(self.stopped)], self.stopped
        safe = len(text) - max(self._matched, default=0)
        self._held = text[safe:]
        return text[:safe], None

    def skip(self, piece: str) -> str:
        """Take text in which no stop string may end, though one may begin; return the text safe to emit."""
        text = self._held + piece
        for character in piece:
            for index, stop in enumerate(self._stops):
                self._advance(index, character)
                if self._matched[index] == len(stop):
                    self._matched[index] = self._borders[index][-1]
        safe = len(text) - max(self._matched, default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """The text still held, once no more will come; empty after a stop."""
        held, self._held = self._held, ""
        return held

    def _advance(self, index: int, character: str) -> None:
        """Read one character against one stop, which is not yet complete."""
        stop, borders, matched = self._stops[index], self._borders[index], self._matched[index]
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        self._matched[index] = matched + (stop[matched] == character)


def _borders(text: str) -> list[int]:
    """For each end, the length of the longest proper prefix of ``text`` that is also a suffix of ``text[:end + 1]``."""
    borders = [0] * len(text)
    length = 0
    for end in range(1, len(text)):
        while length and text[length] != text[end]:
            length = borders[length - 1]
        length += text[length] == text[end]
        borders[end] = length
    return borders
