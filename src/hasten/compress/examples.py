"""Text as examples to learn from: documents cut into windows, or prompts with answers, of which the answers are learned."""

import functools
from pathlib import Path

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.compress.data import read_documents
from hasten.engine.jsonl import LONGEST_LINE, parse_line
from hasten.model import Model
from hasten.train import Example, examples_of


def read_examples(model: Model, path: Path | None, sequence: int) -> tuple[str, tuple[Example, ...]]:
    """What the text is called, and its examples, which learn up to ``sequence`` tokens each.

    ``path`` is what read_documents takes, or a JSONL file of objects with ``prompt`` and ``answer``. Raises UserError for text that
    cannot be read or teaches nothing, ConfigError for a sequence that the model's context cannot hold."""
    if not 1 <= sequence <= model.spec.context:
        raise ConfigError(f"sequence is {sequence}; {model.name} accepts 1 to {model.spec.context}")
    if path is not None and path.suffix == ".jsonl" and (pairs := _pairs(path)):
        return str(path), _answers(model, path, pairs, sequence)
    corpus = read_documents(path)
    tokenizer = model.text_tokenizer()
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    documents = ([*start, *tokenizer.encode(document, add_special_tokens=False)] for document in corpus.documents)
    made = examples_of(documents, sequence)
    if not made:
        raise UserError(f"{corpus.name} is too short to learn from; name more text")
    return corpus.name, made


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Prompts and answers of a file whose first line has them; none where it has a text."""
    made: list[tuple[str, str]] = []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(iter(functools.partial(file.readline, LONGEST_LINE + 1), b""), 1):
                if not raw.strip():
                    continue
                where = f"{path}: line {number}"
                record = parse_line(raw, where)
                prompt, answer = (record.get("prompt"), record.get("answer")) if isinstance(record, dict) else (None, None)
                if not made and not isinstance(prompt, str):
                    return []
                if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
                    raise UserError(f'{where}: {one_line(record)}; an object such as {{"prompt": "…", "answer": "…"}} is needed')
                made.append((prompt, answer))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; name text that can be") from None
    return made


def _answers(model: Model, path: Path, pairs: list[tuple[str, str]], sequence: int) -> tuple[Example, ...]:
    """Each prompt with its answer and the token that ends it. Prompts lose their beginning where both do not fit."""
    tokenizer, ends = model.text_tokenizer(), model.eos_token_ids[:1]
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    made = []
    for prompt, answer in pairs:
        before = [*start, *tokenizer.encode(prompt, add_special_tokens=False)]
        after = [*tokenizer.encode(answer, add_special_tokens=False), *ends][:sequence]
        before = before[-max(1, sequence + 1 - len(after)) :]
        if before and after:
            made.append(Example((*before, *after), len(before)))
    if not made:
        raise UserError(f"{path} has no answer to learn; each line needs a prompt and an answer")
    return tuple(made)
