"""Text from elsewhere on its way to a terminal."""

import re
import sys
from collections.abc import Callable
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with what a terminal would obey (control characters but newline and tab, and changes of direction) spelt out."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def visible_line(text: str) -> str:
    """The same, kept on one line."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def write(text: str) -> None:
    """Text to standard output at once: spelt out for a terminal, as it is for a file or another program."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def notify(message: str) -> None:
    """One line of news on standard error; nothing where there is none."""
    if message:
        print(f"hasten: {visible_line(message)}", file=sys.stderr)


def fail(message: object) -> None:
    """A message for the user, as one line on standard error."""
    print(f"hasten: {visible_line(str(message))}", file=sys.stderr)


def reporter(progress: Any) -> Callable[[str, int, int], None]:
    """What is told (doing, done, of), and keeps a bar of ``progress`` for each length."""
    tasks: dict[int, Any] = {}

    def report(doing: str, done: int, of: int) -> None:
        if of not in tasks:
            tasks[of] = progress.add_task(doing, total=of)
        progress.update(tasks[of], description=doing, completed=done)

    return report
