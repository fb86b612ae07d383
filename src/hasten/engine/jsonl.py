"""Many prompts from a JSON Lines file to another, in the order in which they end; a run that was killed goes on where it stopped.

A line in is ``{"prompt": text}`` or ``{"token_ids": [...]}``, with an ``id`` if you like, and any field of SamplingParams for that line
alone; a ``grammar`` is ``{"json_schema": …}``, ``{"regex": …}`` or ``{"lark": …}``, a ``beam`` is ``{"width": …}`` and so on. A line out
has the ``line`` it answers, its ``id``, ``text``, ``token_ids`` and ``finish_reason``, ``error`` where that is "error", and
log-probabilities where asked for; several outputs of one line are its ``outputs``, best first where they were compared."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.engine.answer import Completion
from hasten.engine.grammar import Grammar
from hasten.engine.llm import LLM
from hasten.engine.prepare import Prepared, Prompt
from hasten.engine.sampling import BeamSearch, SamplingParams

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


def parse_line(raw: bytes, where: str) -> Any:
    """What a line of a file says. Raises UserError, naming ``where``, for one that is too long or no JSON."""
    if len(raw) > LONGEST_LINE:
        raise UserError(f"{where} has {len(raw):,} bytes; at most {LONGEST_LINE:,} are read")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {one_line(str(error))}") from None


def _line(path: Path, number: int, raw: bytes, params: SamplingParams) -> Line:
    where = f"{path}: line {number + 1}"
    fields = parse_line(raw, where)
    if not isinstance(fields, dict):
        raise UserError(f"{where} is not an object with a prompt")
    given, id = {name: fields.pop(name) for name in ("prompt", "token_ids") if name in fields}, fields.pop("id", None)
    if len(given) != 1 or not isinstance(prompt := next(iter(given.values())), str if "prompt" in given else list):
        raise UserError(f'{where} needs "prompt", a text, or "token_ids", a list; one of them')
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := sorted(fields.keys() - known):
        raise UserError(f"{where} has {one_line(unknown[0])}; accepted beside the prompt are id, {', '.join(sorted(known))}")
    try:
        return Line(number, id, prompt, dataclasses.replace(params, **_plain(fields)))
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams from what JSON has. Raises ConfigError for a grammar or a beam search that is none."""
    if (grammar := fields.get("grammar")) is not None:
        kinds: dict[str, Callable[[Any], Grammar]] = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "lark": Grammar.lark}
        if not isinstance(grammar, dict) or len(grammar) != 1 or next(iter(grammar)) not in kinds:
            raise ConfigError(f"grammar is {one_line(grammar)}; accepted: an object of one of {', '.join(kinds)}")
        ((kind, given),) = grammar.items()
        fields = {**fields, "grammar": kinds[kind](given)}
    if (beam := fields.get("beam")) is not None:
        known = {field.name for field in dataclasses.fields(BeamSearch)}
        if not isinstance(beam, dict) or "width" not in beam or beam.keys() - known:
            raise ConfigError(f"beam is {one_line(beam)}; accepted: an object with a width, and any of {', '.join(sorted(known))}")
        fields = {**fields, "beam": BeamSearch(**beam)}
    if isinstance(bias := fields.get("logit_bias"), dict):  # names in JSON are texts
        fields = {**fields, "logit_bias": {int(token) if token.isdecimal() else token: value for token, value in bias.items()}}
    return fields


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
        requests: list[Prepared] = []
        for line in lines:
            try:
                requests.append(llm.prepare(line.prompt, line.params))
                ready.append(line)
            except UserError as error:
                yield written({**_head(line), "text": "", "token_ids": [], "finish_reason": "error", "error": str(error)})
        for index, outputs in llm.answered(requests):
            each = [_output(one) for one in outputs]
            yield written({**_head(ready[index]), **(each[0] if len(each) == 1 else {"outputs": each})})


def _head(line: Line) -> dict[str, Any]:
    return {"line": line.number, "id": line.id}


def _output(one: Completion) -> dict[str, Any]:
    said: dict[str, Any] = {"text": one.text, "token_ids": list(one.token_ids), "finish_reason": one.finish_reason}
    for name, entries in (("logprobs", one.logprobs), ("prompt_logprobs", one.prompt_logprobs)):
        if entries is not None:
            said[name] = [entry.plain() for entry in entries]
    return said if one.error is None else {**said, "error": one.error}
