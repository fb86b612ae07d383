"""Text to calibrate on: what documents come from, and the windows cut of them. None of it is in the held-out set."""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.engine.jsonl import LONGEST_LINE, parse_line
from hasten.measure.text import Corpus, held_out, read_corpus, standard_library
from hasten.model import Model
from hasten.spec import Attention, Block, SlidingWindow, Spec, Visibility

FROM_ONE = 4
"""Most windows of one document while others have some left."""


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Windows of token ids to calibrate on. ``name`` says where they come from, ``sha256`` is over the ids."""

    name: str
    windows: tuple[tuple[int, ...], ...]
    sha256: str

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max(map(len, self.windows))

    @property
    def tokens(self) -> int:
        """Tokens over all windows."""
        return sum(map(len, self.windows))


def read_documents(path: Path | None) -> Corpus:
    """The documents of a text file, a folder, or a JSONL file whose objects have a ``text``; without a path, the interpreter's standard
    library less the held-out set. Documents that are in the held-out set are left out, and counted as skipped.

    Raises UserError for what cannot be read, or where nothing is left."""
    corpus = standard_library() if path is None else _jsonl(path) if path.suffix == ".jsonl" and path.is_file() else read_corpus(path)
    forbidden = set(_held_out_documents())
    kept = tuple(document for document in corpus.documents if document and document not in forbidden)
    if not kept:
        raise UserError(f"{corpus.name} has no document that is not of the held-out set; name other text")
    return dataclasses.replace(corpus, documents=kept, skipped=corpus.skipped + len(corpus.documents) - len(kept))


def cut_text(model: Model, corpus: Corpus, *, samples: int, sequence: int, seed: int = 0) -> Text:
    """``samples`` windows of up to ``sequence`` tokens, from documents in a seeded order, at most FROM_ONE of each until all were asked.

    A document begins with the model's start token; windows do not overlap, and one shorter than a quarter of ``sequence`` is used only
    where there is no other. Raises ConfigError for a sequence the model's context cannot hold, or fewer than one sample."""
    if not 2 <= sequence <= model.spec.context:
        raise ConfigError(f"sequence is {sequence}; {model.name} accepts 2 to {model.spec.context}")
    if samples < 1:
        raise ConfigError(f"samples is {samples}; at least 1 is needed")
    tokenizer = model.text_tokenizer()
    draw = random.Random(seed)
    order = list(range(len(corpus.documents)))
    draw.shuffle(order)
    chosen: list[tuple[int, ...]] = []
    later: list[tuple[int, ...]] = []
    short: list[tuple[int, ...]] = []
    for index in order:
        ids = tokenizer.encode(corpus.documents[index], add_special_tokens=False)
        ids = ids if tokenizer.start_id is None else [tokenizer.start_id, *ids]
        windows = [tuple(ids[begin : begin + sequence]) for begin in range(0, len(ids), sequence)]
        draw.shuffle(windows)
        short += [window for window in windows if len(window) < max(2, sequence // 4)]
        whole = [window for window in windows if len(window) >= max(2, sequence // 4)]
        chosen += whole[:FROM_ONE]
        later += whole[FROM_ONE:]
        if len(chosen) >= samples:
            break
    taken = (chosen + later + [window for window in short if len(window) > 1])[:samples]
    if not taken:
        raise UserError(f"{corpus.name} is too short to calibrate on; name more text")
    return text_of(corpus.name, taken)


def usual_length(spec: Spec, before: Spec) -> int:
    """Tokens of a window of text that shows what ``spec`` is: 512, or twice the widest window that attention has and had not ``before``,
    and no more than the context."""
    known = set(map(_visible, before.blocks))
    new = [visible.size for visible in map(_visible, spec.blocks) if isinstance(visible, SlidingWindow) and visible not in known]
    return min(spec.context, max(512, 2 * max(new, default=0)))


def _visible(block: Block) -> Visibility | None:
    return block.mixer.visible if isinstance(block.mixer, Attention) else None


def text_of(name: str, windows: Sequence[Sequence[int]]) -> Text:
    """Windows of token ids under a name."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray([len(window), *window], np.int64).tobytes())
    return Text(name, tuple(map(tuple, windows)), digest.hexdigest())


def _held_out_documents() -> tuple[str, ...]:
    try:
        return held_out().documents
    except UserError:  # no standard library, no held-out set
        return ()


def _jsonl(path: Path) -> Corpus:
    digest, documents = hashlib.sha256(), []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(iter(functools.partial(file.readline, LONGEST_LINE + 1), b""), 1):
                if raw.strip():
                    digest.update(raw)
                    documents.append(_text_of(parse_line(raw, f"{path}: line {number}"), f"{path}: line {number}"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; name text that can be") from None
    if not documents:
        raise UserError(f"{path} has no lines; each line is an object with a text")
    return Corpus(str(path), tuple(documents), digest.hexdigest())


def _text_of(record: object, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where}: {one_line(record)}; an object such as {{"text": "…"}} is needed')
    text: str = record["text"]
    return text
