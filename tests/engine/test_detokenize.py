"""Streaming: pieces join to the full decode and are a prefix of it at every step; stop strings are exact under any split."""

import random
import time
from itertools import cycle, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hasten.base.errors import ConfigError
from hasten.engine.detokenize import KEPT, WINDOW, Detokenizer, StopMatcher, byte_token_ids

CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog, isn't it? We've been there; they're not.",
    "def main():\n    return {'a': 1,  'b': [2, 3]}\n\n\n\tprint('x')\r\n",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 thumbs 🇨🇭 🤷🏿‍♂️",
    "你好,世界。今天天气很好。日本語のテキスト、カタカナ。한국어 텍스트",
    "e\u0301 n\u0303 o\u0308\u0323 Z̷̛a̴͝l̵g̶o",
    "السلام عليكم كيف حالك؟ שלום עולם",
    "አማርኛ ቋንቋ தமிழ் ภาษาไทย हिन्दी",
    "genuine \ufffd replacement \ufffd\ufffd\ufffd here\ufffd",
    "  leading spaces,   many   inside  and trailing   ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff \x00 \x7f \u200b \ufeff end",
]
SPECIAL = ["<s>", "</s>"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("added token é", normalized=False)])
    return tokenizer


def byte_fallback(strip=True):
    """As Llama 2 (``strip``) and Gemma (not) have it."""
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = ["▁", "▁▁", "▁the", "▁quick", "the", "ing", "\ufffd", "é", "你", "好", ",", ".", "▁▁▁▁", *"abcdefghijklmnopqrstuvwxyzT'?"]
    vocabulary = {name: index for index, name in enumerate([*names, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if strip else steps)
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if strip else chain)
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


def metaspace():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece(cleanup=True):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bpe_suffix():
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIAL], end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


MAKERS = {
    "byte-level": byte_level,
    "byte-fallback, strip": byte_fallback,
    "byte-fallback": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "wordpiece, clean-up": word_piece,
    "wordpiece": lambda: word_piece(cleanup=False),
    "bpe suffix": bpe_suffix,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def tokenizer(request):
    return MAKERS[request.param]()


def detokenizer_of(tokenizer, lag=0):
    vocabulary = tokenizer.get_vocab()
    skipped = {vocabulary[name] for name in ["<unk>", "[UNK]", *SPECIAL] if name in vocabulary}
    skipped |= set(range(len(vocabulary), len(vocabulary) + 8))
    return Detokenizer(tokenizer.decode, skipped_ids=skipped, byte_ids=byte_token_ids(vocabulary), lag=lag)


def portions(rng, ids):
    """A random way to cut ``ids``: mostly single ids, sometimes none, sometimes many."""
    start = 0
    while start < len(ids):
        size = rng.choice([0, 1, 1, 1, 1, 2, 3, 17, 100])
        yield ids[start : start + size]
        start += size


def stream(detokenizer, cuts, expected):
    out = ""
    for cut in cuts:
        out += detokenizer.feed(cut)
        assert expected.startswith(out), (out[-20:], expected[max(len(out) - 20, 0) : len(out) + 20])
    out += detokenizer.flush()
    assert out == expected
    return out


def texts(rng):
    """Strings whose characters mix the scripts of the corpus."""
    pieces = []
    for _ in range(rng.randint(1, 4)):
        line = rng.choice(CORPUS)
        start = rng.randrange(len(line))
        pieces.append(line[start : start + rng.choice([1, 2, 5, 30])])
    return rng.choice(["", " ", "  "]).join(pieces)


@pytest.mark.row("detokenizer", "any split")
def test_every_split_of_multilingual_text_joins_to_the_full_decode(tokenizer):
    rng = random.Random(0)
    for _ in range(1500):  # 7 tokenizers: 10,500 strings
        ids = tokenizer.encode(texts(rng), add_special_tokens=False).ids
        stream(detokenizer_of(tokenizer), portions(rng, ids), tokenizer.decode(ids))


def test_every_split_of_random_ids_joins_to_the_full_decode(tokenizer):
    rng = random.Random(1)
    vocab = len(tokenizer.get_vocab())
    for _ in range(600):
        # A few ids repeated often reach the degenerate cases: endless continuations, runs of bytes, runs of special tokens.
        pool = [rng.randrange(vocab + 8) for _ in range(rng.choice([1, 2, 4, 1000]))]
        ids = [rng.choice(pool) for _ in range(rng.choice([1, 3, 10, 4 * WINDOW]))]
        stream(detokenizer_of(tokenizer), portions(rng, ids), tokenizer.decode(ids))


def test_ids_without_text_need_not_be_told_where_no_byte_tokens_are(tokenizer):
    """Long runs of special tokens leave a window no text to show that it may be cut; it must then not be."""
    rng = random.Random(5)
    vocabulary = tokenizer.get_vocab()
    empty = [*(vocabulary[name] for name in SPECIAL), len(vocabulary)]
    words = [token for name, token in vocabulary.items() if not name.startswith("<0x") and token not in empty]
    for _ in range(400):
        ids = []
        for _ in range(rng.choice([2, 8])):
            ids += [rng.choice(empty)] * rng.choice([0, 1, 7, 8, 9, 20, 40])
            ids += [rng.choice(words) for _ in range(rng.choice([1, 2, 9, 20]))]
        detokenizer = Detokenizer(tokenizer.decode, lag=rng.choice([0, 0, 3, 200]))
        stream(detokenizer, portions(rng, ids), tokenizer.decode(ids))


@pytest.mark.row("detokenizer", "any split")
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback, strip", "byte-fallback"])
def test_every_split_of_random_bytes_joins_to_the_full_decode(kind):
    tokenizer = MAKERS[kind]()
    vocabulary = tokenizer.get_vocab()
    if kind == "byte-level":
        letters = bytes_to_letters()
        ids_of = [vocabulary[letters[byte]] for byte in range(256)]
    else:
        ids_of = [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)]
    word = tokenizer.encode("the", add_special_tokens=False).ids[-1]
    rng = random.Random(2)
    good = ["é", "你", "👍", "\ufffd", "a", "\n"]
    for _ in range(2000):
        ids = []
        for _ in range(rng.choice([2, 5, 60])):
            stray = [bytes([rng.randrange(256)]), bytes([rng.randrange(0x80, 0x100)])]
            part = rng.choice([*stray, *(rng.choice(good).encode() for _ in range(3)), b""])
            part = part[: rng.choice([1, 2, 3, 4, 4, 4])]  # often cut within a character
            ids += [ids_of[byte] for byte in part] or [word]
            ids += [vocabulary["</s>"]] * rng.choice([0, 0, 0, 1])
        stream(detokenizer_of(tokenizer), portions(rng, ids), tokenizer.decode(ids))


def bytes_to_letters():
    """The byte-level alphabet: printable Latin-1 stands for itself, the rest count up from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + index) for index, byte in enumerate(rest)}


def test_nothing_is_held_longer_than_it_must(tokenizer):
    """One character at most stays back in plain text, and a genuine U+FFFD goes out with its successor."""
    for line in CORPUS[:2]:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        detokenizer, out = detokenizer_of(tokenizer), ""
        for end, token in enumerate(ids, start=1):
            out += detokenizer.feed([token])
            if token not in byte_token_ids(tokenizer.get_vocab()):
                assert out == tokenizer.decode(ids[:end])
    level = byte_level()
    ids = level.encode("\ufffd" * 20, add_special_tokens=False).ids
    detokenizer = detokenizer_of(level)
    assert len("".join(detokenizer.feed([token]) for token in ids)) == 19


def test_clean_up_of_spaces_is_followed_with_a_lag():
    plain = word_piece(cleanup=False)

    def decode(ids):
        text = plain.decode(ids)
        for spaced in [" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're"]:
            text = text.replace(spaced, spaced[1:])
        return text

    rng = random.Random(3)
    for _ in range(500):
        ids = plain.encode(" ".join(texts(rng) for _ in range(4)), add_special_tokens=False).ids
        stream(Detokenizer(decode, lag=4), portions(rng, ids), decode(ids))


@pytest.mark.parametrize("kind", ["text", "one id", "random"])
def test_cost_a_token_does_not_grow(tokenizer, kind):
    """20,000 ids, one at a time; what is counted is ids decoded, which no busy machine can disturb."""
    rng = random.Random(4)
    vocab = len(tokenizer.get_vocab())
    if kind == "text":
        ids = tokenizer.encode(" ".join(CORPUS), add_special_tokens=False).ids
    else:
        ids = [vocab // 2] if kind == "one id" else [rng.randrange(vocab + 8) for _ in range(20_000)]
    ids = list(islice(cycle(ids), 20_000))
    decoded = 0

    def decode(window):
        nonlocal decoded
        decoded += len(window)
        return tokenizer.decode(window)

    counted = detokenizer_of(tokenizer)
    counted._decode = decode
    out = [counted.feed([token]) for token in ids]
    assert "".join(out) + counted.flush() == tokenizer.decode(ids)
    assert decoded < len(ids) * 2 * WINDOW


@pytest.mark.timed
def test_long_runs_cost_linear_time():
    tokenizer = byte_fallback()
    vocabulary = tokenizer.get_vocab()
    broken = [vocabulary["<0x61>"]] * 8 + [vocabulary["<0xFF>"], vocabulary["the"]]  # each run begins well and ends badly
    for ids in [broken * 2000, [vocabulary["<0xFF>"]] * 20_000, [vocabulary["</s>"]] * 20_000, [vocabulary["▁"]] * 20_000]:
        started = time.process_time()
        detokenizer = detokenizer_of(tokenizer)
        out = [detokenizer.feed([token]) for token in ids]
        assert "".join(out) + detokenizer.flush() == tokenizer.decode(ids)
        assert time.process_time() - started < 2


def test_the_constants_fit():
    assert WINDOW >= 3 * KEPT


def first_stop(text, stops):
    """The plain reading: scan for the first character that completes a stop."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run_matcher(stops, pieces):
    matcher, out, found = StopMatcher(stops), "", None
    for piece in pieces:
        safe, found = matcher.feed(piece)
        out += safe
    return out + matcher.flush(), found


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(st.text("ab\n👍", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("ab\n👍", max_size=6), max_size=12),
)
def test_stop_strings_are_exact_under_any_split(stops, pieces):
    full = "".join(pieces)
    expected = first_stop(full, stops)
    assert run_matcher(stops, pieces) == expected
    assert run_matcher(stops, list(full)) == expected
    assert run_matcher(stops, [full]) == expected


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3), st.text("ab", max_size=20))
def test_only_what_could_become_a_stop_is_held(stops, text):
    matcher, out = StopMatcher(stops), ""
    for end, character in enumerate(text, start=1):
        safe, found = matcher.feed(character)
        out += safe
        if found is not None:
            return
        could = [k for stop in stops for k in range(len(stop)) if text[:end].endswith(stop[:k])]
        assert end - len(out) == max(could)


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("ab\n", max_size=5), max_size=5),
    st.lists(st.text("ab\n", max_size=5), max_size=8),
)
def test_a_stop_string_may_begin_in_skipped_text_but_not_end_in_it(stops, skipped, pieces):
    matcher, out, found = StopMatcher(stops), "", None
    for piece in skipped:
        out += matcher.skip(piece)
    for piece in pieces:
        safe, found = matcher.feed(piece)
        out += safe
    before, full = len("".join(skipped)), "".join([*skipped, *pieces])
    expected = full, None
    for end in range(before + 1, len(full) + 1):
        if complete := [stop for stop in stops if full[:end].endswith(stop)]:
            stop = max(complete, key=len)
            expected = full[: end - len(stop)], stop
            break
    assert (out + matcher.flush(), found) == expected


def test_stop_matcher_in_words():
    assert run_matcher(["STOP"], ["abc S", "T", "O", "P tail"]) == ("abc ", "STOP")
    assert run_matcher(["bc", "abcd"], ["xabcd"]) == ("xa", "bc")
    assert run_matcher(["c", "abc"], ["xab", "c"]) == ("x", "abc")
    assert run_matcher(["aab"], ["aaab"]) == ("a", "aab")
    assert run_matcher([], ["anything"]) == ("anything", None)
    assert run_matcher(["zz"], ["z"]) == ("z", None)
    matcher = StopMatcher(["x"])
    assert matcher.feed("axb") == ("a", "x")
    assert matcher.feed("more") == ("", "x")
    assert matcher.flush() == ""
    assert matcher.stopped == "x"
    for bad in (["a", ""], "ab"):
        with pytest.raises(ConfigError, match="at least one character"):
            StopMatcher(bad)


@pytest.mark.timed
def test_hostile_stops_cost_linear_time():
    stops = ["a" * 1023 + letter for letter in "bcdefgh"]
    matcher = StopMatcher(stops)
    started = time.process_time()
    for _ in range(10_000):
        matcher.feed("aaa")
    assert matcher.flush() == "a" * 1023
    assert time.process_time() - started < 5
