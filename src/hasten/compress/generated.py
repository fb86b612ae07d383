"""Text to learn from that a model writes itself: drawn from its own distribution, each document from nothing."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from hasten.base.errors import ConfigError, UserError
from hasten.compress.students import weights_digest
from hasten.engine import LLM, SamplingParams
from hasten.engine.jsonl import Line, answer_lines, done_lines
from hasten.model import Model

TOGETHER = 32
"""Documents that are written at once; which ones changes none of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Generated:
    """About ``tokens`` tokens that ``by`` writes, told by ``seed``: documents that begin with its start token, drawn at ``temperature``."""

    by: Model
    tokens: int
    seed: int = 0
    temperature: float = 1.0
    report: Callable[[int, int], None] = lambda done, documents: None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"{self.tokens} tokens of generated text teach nothing; ask for 1 or more")

    @property
    def name(self) -> str:
        """What the text is called."""
        return f"{self.tokens:,} tokens that {self.by.name} writes at temperature {self.temperature:g}, seed {self.seed}"


def generate_text(asked: Generated, folder: Path, length: int) -> Path:
    """A JSONL file in ``folder`` of documents of up to ``length`` tokens, written once: what a kill left is gone on with, to the same text.

    Raises UserError for a model without a tokenizer, or one that writes nothing."""
    asked.by.text_tokenizer()
    documents = -(-asked.tokens // length)
    said = json.dumps([weights_digest(asked.by), documents, length, asked.seed, asked.temperature])
    stem = f"generated-{hashlib.sha256(said.encode()).hexdigest()[:16]}"
    whole, unfinished = folder / f"{stem}.jsonl", folder / f"{stem}.part"
    if whole.is_file():
        return whole
    folder.mkdir(parents=True, exist_ok=True)
    done = done_lines(unfinished)
    asked.report(len(done), documents)
    context = min(length + 1, asked.by.spec.context)
    llm = LLM(asked.by, context=context, max_sequences=min(TOGETHER, documents))
    lines = [
        Line(number, None, "", SamplingParams(max_tokens=context - 1, temperature=asked.temperature, seed=(asked.seed << 32) + number))
        for number in range(documents)
        if number not in done
    ]
    for count, answer in enumerate(answer_lines(llm, lines, unfinished), len(done) + 1):
        if "error" in answer:
            raise UserError(f"{asked.by.name} cannot write text to learn from: {answer['error']}")
        asked.report(count, documents)
    answers = sorted((json.loads(line) for line in unfinished.read_text("utf-8").splitlines()), key=lambda answer: int(answer["line"]))
    texts = [answer["text"] for answer in answers if answer["text"]]
    if not texts:
        raise UserError(f"{asked.by.name} writes nothing but the end of text; name text to learn from")
    staged = folder / f"{stem}.staged"
    staged.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    os.replace(staged, whole)
    unfinished.unlink()
    return whole
