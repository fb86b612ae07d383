"""Check 25 of the robustness list: 10,000 strings of many scripts and emoji, cut at every byte, one by one and all at once.

The strings are made from a seed, of the characters of 28 scripts and of emoji in all their compositions; a few hold genuine U+FFFD."""

import functools
import random

import pytest

from hasten.engine import SamplingParams
from hasten.engine.detokenize import REPLACEMENT, Detokenizer, StopMatcher, byte_token_ids
from hasten.engine.request import Request
from tests.engine.test_detokenize import byte_fallback, byte_level, bytes_to_letters, first_stop

STRINGS = 10_000
SCRIPTS = (
    "azAZ", "àÿ", "Āſ", "αω", "АЯ", "Աֆ", "את", "ءي", "ܐܬ", "ހޱ", "अह", "অহ", "ਅਹ", "અહ", "அஹ", "అహ", "กฮ", "ກຮ", "កអ",
    "აჰ", "አጸ", "ぁん", "ァヺ", "一鿿", "가힣", "𝐀𝟿", "𐌰𐍊", "𒀀𒎙",
)  # fmt: skip
"""First and last character of a range, or of two."""
MARKS = "\u0301\u0308\u0323\u0334\u0361\u093f\u0bbe\u0e34\u064b\u05b8\u20dd"
FACES = "😀😂🥲👍👋🤷🏃👩👨👧👦🧑🐈🌈❤✈☠🏳🏴⚕⚖🚀🍎"
TONES = "🏻🏼🏽🏾🏿"
OTHERS = [" ", "  ", "\n", "\r\n", "\t", ".", "。", "،", "\u200b", "\u200e", "\ufeff", "\u00a0", "\u2028", "\x00", "\x7f", "\U0010ffff"]


def letter(rng):
    script = rng.choice(SCRIPTS)
    first, last = script[:2] if len(script) == 2 or rng.random() < 0.5 else script[2:]
    return chr(rng.randint(ord(first), ord(last)))


def emoji(rng):
    def one():
        return rng.choice(FACES) + rng.choice(["", "", "\ufe0f", rng.choice(TONES)])

    kind = rng.randrange(5)
    if kind == 0:  # a flag
        return "".join(chr(0x1F1E6 + rng.randrange(26)) for _ in range(2))
    if kind == 1:  # a keycap
        return rng.choice("0123456789#*") + "\ufe0f\u20e3"
    if kind == 2:  # a flag of tags
        return "🏴" + "".join(chr(0xE0000 + ord(letter)) for letter in rng.choice(["gbeng", "gbsct"])) + "\U000e007f"
    return "\u200d".join(one() for _ in range(rng.choice([1, 1, 2, 3, 4])))


def string(rng):
    text = ""
    while len(text) < rng.choice([1, 2, 4, 8, 12]):
        kind = rng.random()
        text += (
            letter(rng) if kind < 0.5 else letter(rng) + rng.choice(MARKS) * rng.choice([1, 1, 3]) if kind < 0.6 else emoji(rng)
            if kind < 0.85 else rng.choice(OTHERS) if kind < 0.98 else REPLACEMENT
        )  # fmt: skip
    return text


@functools.cache
def corpus():
    rng, texts = random.Random(25), {}
    while len(texts) < STRINGS:
        texts[string(rng)] = None
    return list(texts)


def stops_of(rng, text):
    """One to three strings: parts of the text, parts that then go on otherwise, and others."""
    begin = rng.randrange(len(text))
    part = text[begin : begin + rng.choice([1, 1, 2, 3, 5])]
    return [part + rng.choice(["", "", "", "x"]), *(string(rng)[:3] for _ in range(rng.randrange(3)))]


class Bytes:
    """A tokenizer of the `tokenizers` library, whose every byte is a token."""

    def __init__(self, kind):
        tokenizer = {"byte-level": byte_level, "byte-fallback": lambda: byte_fallback(strip=False)}[kind]()
        vocabulary, letters = tokenizer.get_vocab(), bytes_to_letters()
        self.ids = [vocabulary[letters[byte] if kind == "byte-level" else f"<0x{byte:02X}>"] for byte in range(256)]
        self.decode, self.byte_ids = tokenizer.decode, byte_token_ids(vocabulary)

    def encode(self, text):
        return [self.ids[byte] for byte in text.encode()]

    def detokenizer(self):
        return Detokenizer(self.decode, byte_ids=self.byte_ids)


def test_the_corpus_is_what_it_says():
    texts = corpus()
    assert len(set(texts)) == len(texts) == STRINGS
    everything = "".join(texts)
    assert {len(character.encode()) for character in set(everything)} == {1, 2, 3, 4}
    assert len(set(everything)) > 3000
    for part in ("\u200d", "\U000e007f", "\u20e3", "🏽", "\u0301", REPLACEMENT, "\r\n"):
        assert sum(part in text for text in texts) > STRINGS / 200, part
    for script in SCRIPTS:
        assert any(script[0] <= character <= script[1] for character in everything)


@pytest.mark.row("detokenizer", "any split")
@pytest.mark.parametrize(("kind", "strings"), [("byte-level", STRINGS), ("byte-fallback", STRINGS // 4)])  # which holds all to the end
def test_every_byte_split_joins_to_the_full_decode_and_stops_where_the_text_does(kind, strings):
    tokens, rng, splits, within, stopped = Bytes(kind), random.Random(1), 0, 0, 0
    for text in corpus()[:strings]:
        ids, stops = tokens.encode(text), stops_of(rng, text)
        assert tokens.decode(ids) == text
        ends = first_stop(text, stops)
        stopped += ends[1] is not None
        ahead = tokens.detokenizer()  # fed byte by byte; each split goes on from where it is
        out = ""
        for place, token in enumerate(ids):
            fork = ahead.fork() if place else tokens.detokenizer()
            rest = fork.feed(ids[place:]) + fork.flush()
            assert out + rest == text, (text, place)  # so no U+FFFD but the text's own
            matcher = StopMatcher(stops)
            first, found = matcher.feed(out)
            second, found = ("", found) if found else matcher.feed(rest)
            assert (first + second + matcher.flush(), found) == ends, (text, stops, place)
            piece = ahead.feed([token])
            out += piece
            assert text.startswith(out), (text, place)
            splits += 1
            within += piece == ""
        assert out + ahead.flush() == text
    assert splits > 12 * strings
    assert within > splits / 2  # most places are within a character
    assert strings / 3 < stopped < strings


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_every_stream_ends_once_with_all_text_before_its_stop(kind):
    tokens, rng, reasons = Bytes(kind), random.Random(2), {"stop": 0, "length": 0, "error": 0}
    for text in corpus():
        ids, stops, chunks = tokens.encode(text), stops_of(rng, text), []
        params = SamplingParams(max_tokens=len(ids), stop=stops)
        one = Request(0, [], params, limit=1 << 20, end_ids=frozenset(), detokenizer=tokens.detokenizer(), program_context=1 << 20)
        fails_at = rng.randrange(len(ids)) if rng.random() < 0.1 else len(ids)
        for place, token in enumerate(ids):
            if place == fails_at:
                chunks.append(one.end("error", "planted"))
                break
            chunks.append(one.take(token))
            if one.finish_reason is not None:
                break
        assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        said, last = "".join(chunk.text for chunk in chunks), chunks[-1]
        reasons[last.finish_reason] += 1
        before, found = first_stop(text, stops)
        if last.finish_reason == "error":
            whole = tokens.decode(ids[:fails_at])  # a character that was cut off is one U+FFFD or more
            assert said == first_stop(whole, stops)[0]
            continue
        assert (said, last.finish_reason) == (before, "length" if found is None else "stop"), (text, stops)
    assert min(reasons.values()) > STRINGS / 20, reasons
