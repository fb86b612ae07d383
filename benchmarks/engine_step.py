"""What the engine itself takes of a step: plan, commit and detokenize with 64 running sequences, nothing computed and nothing drawn.

    python benchmarks/engine_step.py

Prints one JSON object: the median of 25 steps in the best of 12 runs, and how many times 64 decodings of 20 tokens that is, timed by turns,
which hangs less on what else the machine does."""

import json
import statistics
import time

import numpy as np

from hasten import SamplingParams, load
from hasten.backends.cpu import CpuBackend
from hasten.engine.batching import Continuous
from hasten.engine.detokenize import Detokenizer, byte_token_ids
from hasten.engine.drawing import Drawing
from hasten.engine.engine import Engine
from hasten.engine.forward import Rows
from hasten.engine.plan import Settings
from hasten.engine.request import Request
from hasten.program import HostLogits

SEQUENCES, CONTEXT = 64, 2048
TEXT = "for name, value in sorted(settings.items()):\n    print(f'{name}: {value!r}')\n" * 40


class Nothing:
    """A session that computes nothing."""

    threads = drawer = None

    def __init__(self, session):
        self.program, self.page, self.pages = session.program, session.page, session.pages

    def carry_out(self, moves):
        pass

    def run(self, batch, pages):
        return HostLogits(np.zeros((len(batch.rows), 1), np.float32))


class Told(Engine):
    """An engine that is told its tokens, and knows how long it took to tell them."""

    def __init__(self, session, settings, text):
        super().__init__(session, settings)
        self.text, self.telling_s = text, 0.0

    def _begin(self, entries, step):
        began = time.perf_counter()
        rows = Rows(None, [(entry.sequence, 0) for entry in entries if entry.draws])
        self.telling_s += time.perf_counter() - began
        return Drawing(rows, (), None)

    def _draw(self, drawing, step):
        began, text = time.perf_counter(), self.text
        draws = {sequence: [(sequence, text[(sequence * 11 + self.counters.steps) % len(text)])] for sequence, _ in drawing.rows.at}
        self.telling_s += time.perf_counter() - began
        return draws


def measure() -> dict[str, float]:
    """Milliseconds of a step, and how many times the yardstick."""
    model = load("code-8m")
    tokenizer, params = model.text_tokenizer(), SamplingParams(max_tokens=1000, ignore_eos=True)
    text = tokenizer.encode(TEXT)
    engine = Told(Nothing(CpuBackend().session(model, CONTEXT)), Settings(512, Continuous(SEQUENCES)), text)
    for index in range(SEQUENCES + 36):  # the others wait
        one = Request(
            index, text[index : index + 100], params, limit=CONTEXT, end_ids=frozenset(), program_context=CONTEXT,
            detokenizer=Detokenizer(tokenizer.decode, skipped_ids=tokenizer.special_ids, byte_ids=byte_token_ids(tokenizer.vocabulary)),
        )  # fmt: skip
        engine.submit([one], key="all")
    for _ in range(30):
        engine.step()
    runs, ratios, decode, window = [], [], tokenizer._rust.decode, text[:20]
    for _ in range(12):
        times, yardstick = [], []
        for _ in range(25):
            began = time.perf_counter()
            for _ in range(SEQUENCES):
                decode(window)
            yardstick.append(time.perf_counter() - began)
            engine.telling_s, began = 0.0, time.perf_counter()
            if len(engine.step()) != SEQUENCES:
                raise SystemExit("a step without all of them")
            times.append(time.perf_counter() - began - engine.telling_s)
        runs.append(statistics.median(times))
        ratios.append(runs[-1] / statistics.median(yardstick))
    return {"sequences": SEQUENCES, "step_ms": 1e3 * min(runs), "worst_run_ms": 1e3 * max(runs), "over_decodings": min(ratios)}


if __name__ == "__main__":
    print(json.dumps(measure()))
