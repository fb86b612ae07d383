"""What broke other servers, row by row, and the tests that hold this one against it.

A row is in two parts: bad input, under the names of public advisories, and failures that users of servers met. Tests name theirs by
`@pytest.mark.row(ROW, PART…)`; a part without a test fails here, and so does a name that is not in this table."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src" / "hasten"

BAD_INPUT: dict[str, tuple[str, ...]] = {
    "pickles on sockets": ("no import", "a canary at every socket", "loopback alone"),
    "model files": ("damaged headers", "fuzzed headers", "many entries", "no pickles", "damaged checkpoints"),
    "remote code": ("canaries, under -O too", "no switch", "no assert", "guards hold under -O"),
    "chat templates": ("sandbox and caps", "none of the request's", "fuzzed"),
    "eval": ("none in the source", "hostile calls"),
    "regex and grammars": (
        "compiled apart, with a deadline", "depth and size", "refused in time on every route", "caches are bounded", "nothing on disk",
        "fuzzed",
    ),
    "numbers and lists": ("boundary table", "answers too large to hold"),
    "foreign token ids": ("at the tokenizer's length and the logits' width", "no lists of allowed ids"),
    "request ids and state": ("server-made ids", "canaries beside"),
    "prompt embeddings": ("refused",),
    "media": ("refused, and nothing fetched",),
    "prefix cache": ("no hit across tenants", "other tenants' prompts by their timing", "keys of typed fields", "no salt"),
    "http and keys": ("every route, deny by default", "headers are bounded", "names of the host", "compared in constant time"),
    "memory safety": ("native code refuses what does not fit", "requests race a restart"),
    "payloads and cancels": ("compressed, deep and chunked", "cancelled at each stage", "no forged line"),
}  # fmt: skip
FAILURES: dict[str, tuple[str, ...]] = {
    "lying health": ("a stopped engine", "a step while work waits", "under a burst"),
    "exit code of a dead engine": ("never could live", "cannot live again", "replaced"),
    "one fault for all": ("the offender alone", "never reaches the loop", "everyone is told", "malformed requests"),
    "disconnects": ("within a second", "at every point", "late news of nobody"),
    "leaked pages": ("every page counted after every step", "after aborts", "after malformed requests"),
    "deadlock": ("what never fits is refused", "progress while there is work"),
    "hung collectives": (),
    "growing memory": ("slope over requests",),
    "borrowed tokenizer": ("one a thread",),
    "detokenizer": ("any split", "a failure is one output's"),
    "overload": ("bounded unless told otherwise", "counted before it is read"),
    "shutdown": ("drains unless told otherwise", "grace ends", "nothing is left"),
    "failing open": ("no grammar, no answer",),
    "nondeterminism": ("the same tokens however played",),
}
ROWS = BAD_INPUT | FAILURES
ABSENT = {
    "prompt embeddings": "no request brings embeddings, so what is tested is that none can",
    "media": "there is no input but text and token ids, so what is tested is that none is taken and no address is called",
    "hung collectives": "one process plays a model; there is nothing that waits for another machine",
}
"""What a row speaks of that is not in the product, and what of it is tested."""


def marks(tree: ast.Module) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Test, row and parts, of every mark in a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for one in node.decorator_list:
                if isinstance(one, ast.Call) and ast.unparse(one.func) == "pytest.mark.row":
                    row, *parts = (ast.literal_eval(argument) for argument in one.args)
                    yield node.name, row, tuple(parts)


def marked() -> dict[tuple[str, str], list[str]]:
    """Tests by row and part."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for test, row, parts in marks(ast.parse(path.read_text())):
            assert test.startswith("test_"), f"{path.name}: {test} is no test"
            assert parts, f"{path.name}: {test} names no part of {row}"
            for part in parts:
                found.setdefault((row, part), []).append(f"{path.relative_to(TESTS)}::{test}")
    return found


def missing(found: dict[tuple[str, str], list[str]]) -> list[str]:
    """Parts without a test, and tests of no part."""
    every = {(row, part) for row, parts in ROWS.items() for part in parts}
    return [f"no test of {row}: {part}" for row, part in sorted(every - found.keys())] + [
        f"{found[key][0]} names what is in no table: {key}" for key in sorted(found.keys() - every)
    ]


def test_every_row_has_its_tests():
    assert not missing(marked())
    assert (len(BAD_INPUT), len(FAILURES)) == (15, 14)
    assert len(ROWS) == 29


def test_what_is_absent_is_still_absent():
    """Else its row needs parts: a Program over several machines would wait for others."""
    assert ABSENT.keys() >= {row for row, parts in ROWS.items() if not parts}
    assert not (SOURCE / "distributed").exists()


def test_a_part_without_a_test_and_a_mark_of_nothing_are_found():
    found = marked()
    del found["media", "refused, and nothing fetched"]
    found["media", "nonsense"] = ["x::test_y"]
    assert missing(found) == [
        "no test of media: refused, and nothing fetched",
        "x::test_y names what is in no table: ('media', 'nonsense')",
    ]
    planted = "@pytest.mark.row('media', 'a', 'b')\n@pytest.mark.row('eval', 'c')\ndef test_x(): ...\n@pytest.mark.slow\ndef test_y(): ..."
    assert list(marks(ast.parse(planted))) == [("test_x", "media", ("a", "b")), ("test_x", "eval", ("c",))]


GUARDED = ("tests/serve/test_guard.py", "tests/engine/test_sampling.py", "tests/serve/test_heart.py")


@pytest.mark.row("remote code", "guards hold under -O")
def test_guards_hold_without_asserts(tmp_path):
    """The tests of what refuses, in an interpreter that drops asserts of the product: those of the tests stay, for pytest rewrites them."""
    command = [sys.executable, "-O", "-m", "pytest", "-p", "no:cacheprovider", "-k", "not whatever_its_path", *GUARDED]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    planted = tmp_path / "test_planted.py"
    planted.write_text("def test_fails():\n    assert not __debug__\n    assert 0\n")
    done = subprocess.run([*command[:6], str(planted)], cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "assert 0" in done.stdout
