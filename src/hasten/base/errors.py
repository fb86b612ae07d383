"""The errors hasten raises on purpose.

Every one of them is a user's to mend, so its text is one line that names the value, what is accepted, and the remedy.
The command line prints that line and exits with code 2; anything else that escapes is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """Something the user gave cannot be used; ``str(error)`` is one line for them."""


class CheckpointError(UserError):
    """A file of a checkpoint is damaged, incomplete, or not what its header says."""


class ConfigError(UserError):
    """A configuration value is missing, malformed, or out of range."""


class UnsupportedError(UserError):
    """The value is well formed, but names something hasten does not do."""


class TokenizerError(UserError):
    """Text was asked of a model that has no usable tokenizer."""


class MissingExtraError(UserError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the optional dependency group '{extra}': pip install 'hasten[{extra}]'")


def one_line(value: object, limit: int = 120) -> str:
    """``repr`` of a foreign value, cut to ``limit`` characters and kept on one line, fit for an error message."""
    text = repr(value).replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"
