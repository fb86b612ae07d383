"""Log-probabilities of one request: how many its answer may hold, for each takes room in the server until the answer is out."""

from collections.abc import Sequence

from hasten.base.errors import ConfigError
from hasten.engine import SamplingParams

MOST = 2_000_000
"""Of prompts, and as many of outputs; some 100 bytes each."""


def check_entries(prompts: Sequence[Sequence[int]], params: SamplingParams, context: int, *, of_prompts: str, of_outputs: str) -> None:
    """Raises ConfigError for more than MOST: of ``prompts``, which the field ``of_prompts`` asks for, or of outputs, which ``of_outputs``
    does. Each token counts as itself and the likeliest at its place; an output as long as it may become within ``context``."""
    if params.prompt_logprobs is not None:
        tokens, each = sum(map(len, prompts)) * params.n, params.prompt_logprobs + 1
        if tokens * each > MOST:
            raise ConfigError(
                f"{of_prompts} asks for {tokens * each:,} log-probabilities, {each} for each of {tokens:,} prompt tokens, told with every "
                f"choice; at most {MOST:,} are accepted in one request: ask for fewer, or send the prompts one by one"
            )
    if params.logprobs is not None:
        tokens, each = sum(min(params.max_tokens, context - len(prompt)) for prompt in prompts) * params.choices, params.logprobs + 1
        if tokens * each > MOST:
            raise ConfigError(
                f"{of_outputs} asks for up to {tokens * each:,} log-probabilities, {each} for each of {tokens:,} tokens that outputs may "
                f"have; at most {MOST:,} are accepted in one request: ask for fewer, or for fewer or shorter outputs"
            )
