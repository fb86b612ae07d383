"""One slice of one target of `tests.soak.fuzz`, as a process that libFuzzer ends: TARGET CORPUS OPTION…. It imports nothing of hasten
before that can be instrumented."""

import ctypes
import os
import sys
from pathlib import Path

import atheris

PR_SET_CHILD_SUBREAPER = 36
"""prctl(2)"""


def reaped() -> None:
    """Go on in a child; this process waits for it and for whatever it leaves behind, whose processor time is then counted, and ends as it
    does. libFuzzer ends a process without asking it."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if (fuzzing := os.fork()) == 0:
        return
    ended = 1
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            sys.exit(ended)
        except KeyboardInterrupt:
            continue  # the child has it too
        if pid == fuzzing:
            ended = os.waitstatus_to_exitcode(status) & 0xFF


def as_plain_files() -> None:
    """Have hasten imported from its folder. What an editable installation's own loader loads is instrumented, says atheris, and counts
    nothing: then any input looks like any other."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))


def main() -> None:
    """Until libFuzzer's own limits are reached, or an input breaks something."""
    reaped()
    as_plain_files()
    with atheris.instrument_imports(include=["hasten", "jinja2", "tests.soak.targets"]):
        from tests.soak.targets import TARGETS
    name, corpus, *options = sys.argv[1:]
    target = TARGETS[name]
    for place, seed in enumerate(target.seeds):
        (Path(corpus) / f"seed-{place}").write_bytes(seed)
    words = Path(corpus).parent / f"{name}.words"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
    atheris.Setup([sys.argv[0], corpus, f"-dict={words}", *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
