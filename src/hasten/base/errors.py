"""The errors hasten raises on purpose.

Every one of them is a user's to mend, so its text is one line that names the value, what is accepted, and the remedy.
The command line prints that line and exits with code 2; anything else that escapes is a bug and keeps its traceback.
"""

from collections.abc import Iterator


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
    """``repr`` of a foreign value, cut to ``limit`` characters and kept on one line, fit for an error message.

    Costs no more than what is shown, however large or deep the value is."""
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit:
            break
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pieces(value: object, limit: int) -> Iterator[str]:
    """``repr`` piece by piece; every level of nesting begins with a character of its own, so the reader's limit bounds the depth."""
    if isinstance(value, str | bytes):
        yield repr(value[: limit + 1])
    elif isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write thousands of digits
        yield f"an integer of {value.bit_length()} bits"
    elif type(value) in {list, tuple}:
        opening, closing = "[]" if isinstance(value, list) else "()"
        yield opening
        for index, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
            yield ", " if index else ""
            yield from _pieces(item, limit)
        yield f",{closing}" if closing == ")" and len(value) == 1 else closing  # type: ignore[arg-type]
    elif type(value) is dict:
        yield "{"
        for index, (key, item) in enumerate(value.items()):
            yield ", " if index else ""
            yield from _pieces(key, limit)
            yield ": "
            yield from _pieces(item, limit)
        yield "}"
    else:
        yield repr(value)
