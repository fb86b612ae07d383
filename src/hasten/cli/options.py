"""Options that several commands share, written once."""

import re
from typing import Annotated, NoReturn

import typer

from hasten.base.errors import ConfigError, one_line

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
