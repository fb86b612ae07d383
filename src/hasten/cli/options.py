"""Options that several commands share, written once."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hasten.base.errors import ConfigError, one_line
from hasten.cli.terminal import notify

if TYPE_CHECKING:
    from hasten.engine import LLM, Grammar, SamplingParams

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, a .gguf file, a Hub id (org/name), a bundled model (code-8m), or random:SHAPE.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
BackendOption = Annotated[
    str, typer.Option("--backend", help="What plays the model: cpu (native), cuda (NVIDIA GPUs), reference (torch), or auto.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="How linear layers are stored: bf16, int8, int4, int3, int2, lut4, fp8, f16, f32, or a variant: int4-g64. "
        "[default: as in the checkpoint; bf16 where that is in plain numbers]",
    ),
]
ActivationsOption = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="What linear layers are fed: bf16, int8 per token, or fp8 per token (only with fp8 weights, on cuda and reference). "
        "[default: as the checkpoint says; int8 for --weights of integers]",
    ),
]
CacheOption = Annotated[
    str | None, typer.Option("--cache", help="How keys and values are kept: bf16, int8 or fp8. [default: bf16 natively]")
]


@dataclasses.dataclass(frozen=True, slots=True)
class Placing:
    """How a model is run, and in how much memory: options of each command that makes text."""

    backend: BackendOption = "auto"
    weights: WeightsOption = None
    activations: ActivationsOption = None
    cache: CacheOption = None
    memory: Annotated[
        str | None, typer.Option("--memory", help="Most memory for weights, cache and arena together: 8GB, 500MiB or bytes.")
    ] = None
    context: Annotated[
        int | None, typer.Option("--max-model-len", help="Most tokens of a prompt and its output; the model's own unless given.")
    ] = None

    def open(self, model: str, max_sequences: int) -> "LLM":
        """The LLM of a command. What it will take is said where its size was bounded."""
        from hasten.engine import LLM
        from hasten.program import Formats

        given, formats = parse_bytes("--memory", self.memory), Formats(self.weights, self.activations, self.cache)
        llm = LLM(model, backend=self.backend, formats=formats, context=self.context, memory=given, max_sequences=max_sequences)
        notify(llm.notice)
        if given is not None or self.context is not None:
            notify(str(llm.memory_plan()))
        return llm


@dataclasses.dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are chosen and when an output ends: options of each command that makes text."""

    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")] = 128
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token, 1 the model's own distribution.")
    ] = 0.0
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from the K likeliest tokens; 0 is off.")] = 0
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that together have this probability.")] = 1.0
    min_p: Annotated[float, typer.Option("--min-p", help="Drop tokens less likely than this share of the likeliest one's probability.")] = (
        0.0
    )
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1 discourages tokens seen in prompt or output.")
    ] = 1.0
    presence_penalty: Annotated[float, typer.Option("--presence-penalty", help="Subtracted from the logit of tokens in the output.")] = 0.0
    frequency_penalty: Annotated[float, typer.Option("--frequency-penalty", help="Subtracted once per occurrence in the output.")] = 0.0
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable; a fresh seed unless given.")] = None
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False
    min_tokens: Annotated[
        int, typer.Option("--min-tokens", help="Fewest tokens before the output may end, by end of text or by --stop.")
    ] = 0
    logit_bias: Annotated[
        list[str] | None, typer.Option("--logit-bias", help="ID=NUMBER: added to the logit of a token id, -100 to 100; repeatable.")
    ] = None
    json_schema: Annotated[
        str | None, typer.Option("--json-schema", help="The output is JSON of this schema: a file, or the schema itself.")
    ] = None
    regex: Annotated[str | None, typer.Option("--regex", help="The output matches this regular expression whole.")] = None
    grammar: Annotated[
        str | None, typer.Option("--grammar", help="The output is of this grammar in Lark's syntax: a file, or the text.")
    ] = None

    def params(self) -> "SamplingParams":
        """The same, checked. Raises ConfigError for what is out of range or does not go together."""
        from hasten.engine import SamplingParams

        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, seed=self.seed, stop=tuple(self.stop or ()), ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens, logit_bias=biases_of(self.logit_bias),
            grammar=grammar_of(self.json_schema, self.regex, self.grammar),
        )  # fmt: skip


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each field of every group that is the default of one of its parameters; the group gives their
    defaults, and has their values when the command is called."""
    own = inspect.signature(command).parameters.values()
    groups = {one.name: one.default for one in own if dataclasses.is_dataclass(one.default) and not isinstance(one.default, type)}
    parameters: list[inspect.Parameter] = []
    for one in own:
        if (group := groups.get(one.name)) is None:
            parameters.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        for field in dataclasses.fields(group):
            default, kind = getattr(group, field.name), inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=field.type))

    @functools.wraps(command)
    def spread_command(**given: Any) -> None:
        made = {
            name: dataclasses.replace(group, **{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    spread_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread_command.__annotations__ = {}
    return spread_command


def grammar_of(json_schema: str | None, regex: str | None, lark: str | None) -> "Grammar | None":
    """The one grammar that was asked for, if any. Raises ConfigError for several, and for a file that cannot be read."""
    from hasten.engine.grammar import Grammar

    if sum(given is not None for given in (json_schema, regex, lark)) > 1:
        raise ConfigError("give one of --json-schema, --regex and --grammar: an output follows one grammar")
    if json_schema is not None:
        return Grammar.json_schema(_read("--json-schema", json_schema, inline=json_schema.lstrip()[:1] in {"{", "t", "f"}))
    if lark is not None:
        return Grammar.lark(_read("--grammar", lark, inline=":" in lark and "\n" in lark or lark.startswith("start:")))
    return None if regex is None else Grammar.regex(regex)


def _read(name: str, given: str, *, inline: bool) -> str:
    """The text itself, or that of the file it names."""
    if inline and not Path(given[:4096]).is_file():
        return given
    try:
        with open(given, encoding="utf-8") as file:
            return file.read(MAX_GRAMMAR + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{name} {one_line(given)} cannot be read ({reason}); give a file or the text itself") from None


MAX_GRAMMAR = 1 << 20
"""Characters of a grammar that are read; what is longer than a grammar may be is refused by its length."""


def biases_of(pairs: list[str] | None) -> dict[int, float]:
    """--logit-bias ID=NUMBER, each. Raises ConfigError naming the piece that is none."""
    biases = {}
    for pair in pairs or []:
        token, _, number = pair.partition("=")
        try:
            biases[int(token)] = float(number)
        except ValueError:
            raise ConfigError(f"--logit-bias is {one_line(pair)}; an id and a number are needed, as in 198=-100") from None
    return biases


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(name: str, text: str | None) -> int | None:
    """Bytes as a user writes them, None for None."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]*)", text.strip())
    if found is None or found.group(2).lower() not in _UNITS:
        refuse(name, text, "a number of bytes, or of kB, MB, GB, KiB, MiB or GiB, as in 8GB")
    return int(float(found.group(1)) * _UNITS[found.group(2).lower()])


def counts(name: str, text: str) -> list[int]:
    """Whole numbers of 1 or more, separated by commas."""
    found = [int(each) if each.strip().isascii() and each.strip().isdigit() else 0 for each in text.split(",")]
    if min(found) < 1 or max(found) > 1 << 24:
        refuse(name, text, "whole numbers of 1 or more, separated by commas")
    return found


def refuse(name: str, value: object, accepted: str) -> NoReturn:
    """Raise ConfigError for the value of an option."""
    raise ConfigError(f"{name} is {one_line(value)}; accepted: {accepted}")
