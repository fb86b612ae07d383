"""A few seconds of what `python -m tests.soak fuzz` does for hours, without guidance: templates, grammars, schemas, text out of tokens,
checkpoints and calls, from bytes that nobody chose."""

import random
import time

import pytest

from benchmarks.ledger import ROOT
from tests.soak.targets import TARGETS, Broken, Target, constraints, mutated

COUNTS = {"template": 400, "grammar": 60, "schema": 90, "detokenizer": 600, "safetensors": 3000, "tools": 3000}


@pytest.fixture(scope="module", autouse=True)
def _processes_end():
    yield
    constraints().close()
    constraints.cache_clear()


@pytest.mark.row("chat templates", "fuzzed")
@pytest.mark.row("regex and grammars", "fuzzed")
@pytest.mark.row("model files", "fuzzed headers")
@pytest.mark.row("eval", "hostile calls")
@pytest.mark.row("detokenizer", "any split")
@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name):
    target, chance, slowest = TARGETS[name], random.Random(7), 0.0
    for data in [*target.seeds, b"", b"\0", b"\xff" * 9, *(mutated(target, chance) for _ in range(COUNTS[name]))]:
        began = time.thread_time()
        try:
            target.run(data)
        except Exception as error:
            raise AssertionError(f"{data!r}: {error}") from error
        slowest = max(slowest, time.thread_time() - began)
    assert slowest < 5


def test_every_target_has_a_count_and_its_inputs_do_what_they_should():
    assert COUNTS.keys() == TARGETS.keys()
    chance = random.Random(1)
    for target in TARGETS.values():
        assert target.of
        assert all((ROOT / "src" / "hasten" / f"{module.replace('.', '/')}.py").is_file() for module in target.of)
        assert len({mutated(target, chance) for _ in range(300)}) > 150


def test_a_fault_is_found():
    """One that a byte in the right place sets off."""

    def run(data: bytes) -> None:
        if b"</tool_call>" in data and b"[" in data and len(data) % 3 == 0:
            raise Broken("planted")

    target, chance = Target(run, (), TARGETS["tools"].seeds, TARGETS["tools"].words), random.Random(2)
    with pytest.raises(Broken, match="planted"):
        [run(mutated(target, chance)) for _ in range(3000)]
