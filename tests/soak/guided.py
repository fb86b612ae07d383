"""One slice of one target of `tests.soak.fuzz`, as a process that libFuzzer ends: TARGET CORPUS OPTION…. It imports nothing of hasten
before that can be instrumented."""

import sys
from pathlib import Path

import atheris


def main() -> None:
    """Until libFuzzer's own limits are reached, or an input breaks something."""
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
