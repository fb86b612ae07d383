"""Regular expressions of a checkpoint: foreign input that is matched in bounded time, or not at all."""

import re

from hasten.base.errors import ConfigError, UnsupportedError, one_line

MOST_REPEATS = 4
"""Of one expression: what more can take a name is no pattern of module names."""
LONGEST = 500
MOST_PATTERNS = 256
"""Of one config."""


def pattern(text: str, where: str) -> re.Pattern[str]:
    """The compiled expression. Raises a UserError for a malformed one, and for what might take long: repeated groups, many repetitions."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", text))
    if len(text) > LONGEST or repeats > MOST_REPEATS or re.search(r"\)[*+{]|\(\?[^:]|\\[1-9]", text):
        raise UnsupportedError(
            f"{where}: the pattern {one_line(text)} is not understood; accepted: up to {MOST_REPEATS} repetitions, none of a group"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: the pattern {one_line(text)} is malformed: {one_line(str(error))}") from None
