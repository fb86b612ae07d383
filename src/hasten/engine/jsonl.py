"""Many prompts from a JSON Lines file to another, in the order in which they end; a run that was killed goes on where it stopped.

A line in is ``{"prompt": text}`` or ``{"token_ids": [...]}``, with an ``id`` if you like, and any field of SamplingParams for that line
alone. A line out has the ``line`` it answers, its ``id``, ``text``, ``token_ids`` and ``finish_reason``, and ``error`` where that is
"error"."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.engine.llm import LLM, Prompt
from hasten.engine.sampling import SamplingParams

LONGEST_LINE = 16 << 20
"""Bytes of a line that are read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A prompt of line ``number``, from 0 on; ``id`` is the user's own."""

    number: int
    id: Any
    prompt: Prompt
    params: SamplingParams


def read_lines(path: Path, params: SamplingParams) -> list[Line]:
    """The prompts of a file; blank lines have none. Raises UserError naming the line that is none of what is accepted."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return [_line(path, number, raw, params) for number, raw in enumerate(lines) if raw.strip()]


def _line(path: Path, number: int, raw: bytes, params: SamplingParams) -> Line:
    where = f"{path}: line {number + 1}"
    if len(raw) > LONGEST_LINE:
        raise UserError(f"{where} has {len(raw):,} bytes; at most {LONGEST_LINE:,} are read")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {one_line(str(error))}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where} is not an object with a prompt")
    given, id = {name: fields.pop(name) for name in ("prompt", "token_ids") if name in fields}, fields.pop("id", None)
    if len(given) != 1 or not isinstance(prompt := next(iter(given.values())), str if "prompt" in given else list):
        raise UserError(f'{where} needs "prompt", a text, or "token_ids", a list; one of them')
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := sorted(fields.keys() - known):
        raise UserError(f"{where} has {one_line(unknown[0])}; accepted beside the prompt are id, {', '.join(sorted(known))}")
    try:
        return Line(number, id, prompt, dataclasses.replace(params, **fields))
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None


def done_lines(path: Path) -> set[int]:
    """Which lines an earlier run answered. A last line that was cut off is taken off the file."""
    try:
        kept = path.read_bytes()
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    whole = kept[: kept.rfind(b"\n") + 1]
    numbers = set()
    for at, raw in enumerate(whole.splitlines()):
        try:
            numbers.add(int(json.loads(raw)["line"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}: line {at + 1} is not an answer of an earlier run; give --output another name") from None
    if len(whole) < len(kept):
        os.truncate(path, len(whole))
    return numbers


def answer_lines(llm: LLM, lines: Sequence[Line], output: Path) -> Iterator[dict[str, Any]]:
    """Answer ``lines``, and append each answer to ``output`` as soon as it is there; yields what was written.

    A line that is refused is answered with its error: one line's failure is its own."""
    with output.open("a", encoding="utf-8") as file:

        def written(answer: dict[str, Any]) -> dict[str, Any]:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()
            return answer

        ready: list[Line] = []
        ids: list[list[int]] = []
        for line in lines:
            try:
                ids.append(llm.prompt_ids(line.prompt))
                ready.append(line)
            except UserError as error:
                yield written(_answer(line, "", (), "error", str(error)))
        if not ready:
            return
        texts, tokens = [""] * len(ready), [list[int]() for _ in ready]
        for chunk in llm.stream(ids, [line.params for line in ready]):
            texts[chunk.index] += chunk.text
            tokens[chunk.index] += chunk.token_ids
            if chunk.finish_reason is not None:
                yield written(_answer(ready[chunk.index], texts[chunk.index], tokens[chunk.index], chunk.finish_reason, chunk.error))


def _answer(line: Line, text: str, tokens: Sequence[int], finish_reason: str, error: str | None) -> dict[str, Any]:
    answer = {"line": line.number, "id": line.id, "text": text, "token_ids": list(tokens), "finish_reason": finish_reason}
    return answer if error is None else {**answer, "error": error}
