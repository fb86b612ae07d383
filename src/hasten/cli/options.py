"""Options that several commands share, written once."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from hasten.base.errors import ConfigError, one_line

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, a Hub id (org/name), a bundled model (code-8m), or random:SHAPE.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
BackendOption = Annotated[str, typer.Option("--backend", help="What plays the model: cpu (native), reference (torch), or auto.")]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", help="How linear layers are stored: bf16, int8, int4, int3, int2, fp8, f16, f32, or a variant: int4-g64."),
]
ActivationsOption = Annotated[
    str | None,
    typer.Option("--activations", help="What linear layers are fed: bf16, or int8 per token; int8 for weights of integers unless given."),
]
CacheOption = Annotated[
    str | None, typer.Option("--cache", help="How keys and values are kept: bf16, int8 or fp8. [default: bf16 natively]")
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Most memory for weights, cache and arena together: 8GB, 500MiB or bytes.")
]
ContextOption = Annotated[
    int | None,
    typer.Option("--max-model-len", min=2, help="Most tokens of a prompt and its output; the model's own unless given."),
]

MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token, 1 the model's own distribution.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from the K likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that together have this probability.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens less likely than this share of the likeliest one's probability.")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 discourages tokens seen in prompt or output.")]
PresencePenalty = Annotated[float, typer.Option("--presence-penalty", help="Subtracted from the logit of tokens in the output.")]
FrequencyPenalty = Annotated[float, typer.Option("--frequency-penalty", help="Subtracted once per occurrence in the output.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable; a fresh seed unless given.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")]
MinTokens = Annotated[int, typer.Option("--min-tokens", help="Fewest tokens before the output may end, by end of text or by --stop.")]
LogitBias = Annotated[
    list[str] | None, typer.Option("--logit-bias", help="ID=NUMBER: added to the logit of a token id, -100 to 100; repeatable.")
]
Choices = Annotated[int, typer.Option("--choices", help="Outputs to make; with a seed, each is repeatable.")]
BestOf = Annotated[int | None, typer.Option("--best-of", help="Outputs to draw, of which the likeliest per token are kept.")]
Beams = Annotated[int | None, typer.Option("--beams", help="Search with so many beams instead of drawing.")]
LengthPenalty = Annotated[float, typer.Option("--length-penalty", help="With --beams: above 0 favours long outputs.")]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", help="With --json: each token's log-probability and those of so many likeliest; 0 for none of them."),
]
PromptLogprobs = Annotated[int | None, typer.Option("--prompt-logprobs", help="The same for the prompt.")]
JsonSchema = Annotated[str | None, typer.Option("--json-schema", help="The output is JSON of this schema: a file, or the schema itself.")]
Regex = Annotated[str | None, typer.Option("--regex", help="The output matches this regular expression whole.")]
GrammarFile = Annotated[str | None, typer.Option("--grammar", help="The output is of this grammar in Lark's syntax: a file, or the text.")]


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


def refuse(name: str, value: object, accepted: str) -> NoReturn:
    """Raise ConfigError for the value of an option."""
    raise ConfigError(f"{name} is {one_line(value)}; accepted: {accepted}")
