"""Options that several commands share, written once."""

from typing import Annotated

import typer

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
