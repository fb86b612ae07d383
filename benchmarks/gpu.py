"""`make gpu`: everything that only a GPU can show, as one table, written to docs/gpu.md with the date, the device and the versions.

    python -m benchmarks.gpu [--only NAME,…] [--seconds 520]

A line that did not run, for want of time or because something failed, says so: nothing is carried over from another day or device."""

import argparse
import datetime
import functools
import importlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ledger import ROOT

REPORT = ROOT / "docs" / "gpu.md"
CONTEXT = 131_072  # tokens of the longest sequence


@dataclass(frozen=True)
class Outcome:
    """What was measured, in words, and whether it is what was asked for (None: it only has to run)."""

    figure: str
    holds: bool | None


@dataclass(frozen=True)
class Line:
    """One line of the table: ``measure`` takes seconds to minutes and raises where something is wrong."""

    name: str
    check: str
    asked: str
    measure: Callable[[], Outcome]


# --- what is measured


def passing(*selected: str) -> Outcome:
    command = [sys.executable, "-m", "pytest", "-n", "8", "-o", "addopts=", "-q", *selected]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return Outcome(ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr[-200:], ran.returncode == 0)


@functools.cache
def eight_b() -> Any:
    """The 8B shape in bf16, open once for all lines that are about it, for one sequence of its whole context."""
    from hasten.checkpoint import load
    from hasten.measure.latency import Case, open_runner

    return open_runner(load("random:llama-3.1-8b"), [Case(1, CONTEXT - 5, 1)], backend="cuda")


def latency(runner: Any, batch: int, prompt: int, new: int, repeats: int = 3) -> Any:
    """Of one case on the device: hasten's own `bench latency`, limits between the runs."""
    from hasten.measure.latency import Case, Latency, repetitions

    case = Case(batch, prompt, new)
    return Latency.of(runner, case, [each for (each,) in repetitions([runner], case, repeats)])


def decode(runner: Any, asked: float) -> Outcome:
    found = latency(runner, 1, 512, 64)
    kind = f"{found.weights} × {found.activations}"
    told = f"{found.mbu:.2f} of {found.read_gb_per_s:,.0f} GB/s; {found.decode_tokens_per_s:.0f} tokens/s, {kind}"
    return Outcome(told, found.mbu >= asked)


def decode_w4a16() -> Outcome:
    from hasten.checkpoint import load
    from hasten.measure.latency import Case, open_runner

    model, case = load("random:llama-3.1-8b"), Case(1, 512, 64)
    return decode(open_runner(model, [case], backend="cuda", weights="int4", activations="bf16"), 0.75)


def prefill() -> Outcome:
    found = latency(eight_b(), 1, 4096, 8)
    told = f"{found.mfu:.2f} of {found.peak_tops:.0f} TFLOP/s; {found.prefill_tokens_per_s:,.0f} tokens/s"
    return Outcome(told, found.mfu >= 0.6)


def against_transformers(batch: int = 64, prompt: int = 128, new: int = 64) -> Outcome:
    """The same random weights, saved once, in bfloat16 by both. Raises ValueError where theirs gave fewer tokens than asked for."""
    import torch

    from hasten.checkpoint import load, save

    transformers: Any = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as directory:
        save(load("random:tinyllama-1.1b"), Path(directory))
        ours = batch * new / timed_generation(directory, batch, prompt, new)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).cuda().eval()
        ids = torch.randint(0, 1000, (batch, prompt), device="cuda")
        forced: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        plain = batch * new / seconds_of(lambda: theirs.generate(ids, **forced))
        lists, config = [row.tolist() for row in ids], transformers.GenerationConfig(**forced, eos_token_id=-1)

        def batched() -> None:
            made = theirs.generate_batch(inputs=lists, generation_config=config, persistent_manager=True)
            counts = [len(each.generated_tokens) for each in made.values()]
            if counts != [new] * batch:
                raise ValueError(f"generate_batch gave {sum(counts)} tokens of {batch * new}")

        together = batch * new / seconds_of(batched)
    told = f"{ours / together:.1f} × generate_batch, {ours / plain:.1f} × generate; {ours:,.0f}, {together:,.0f}, {plain:,.0f} tokens/s"
    return Outcome(told, ours >= 2 * together and ours >= 10 * plain)


def timed_generation(model: str, batch: int, prompt: int, new: int) -> float:
    """Seconds in which the engine completes ``batch`` prompts, once warm."""
    from hasten.engine.llm import LLM
    from hasten.engine.sampling import SamplingParams

    llm = LLM(model, backend="cuda", max_sequences=batch, prefixes=False)
    prompts = np.random.default_rng(0).integers(0, 1000, (batch, prompt)).tolist()
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    for _ in range(2):  # whatever sizes of steps the first time did not meet
        llm.generate(prompts, params)
        llm.engine().session.settle()
    began = time.perf_counter()
    llm.generate(prompts, params)  # tokens are there when it returns
    taken = time.perf_counter() - began
    llm.engine().session.settle()  # before others wait for the device
    return taken


def over_one_at_a_time(new: int = 32) -> Outcome:
    """Llama-2-7B's shape: transformers in float32, one sequence, over hasten at the best of some batches."""
    import torch

    from hasten.checkpoint import load
    from hasten.measure.latency import Case, open_runner

    alone = transformers_alone(new)
    torch.cuda.empty_cache()
    cases = [Case(batch, 128, new) for batch in (64, 128, 256)]
    runner = open_runner(load("random:llama-2-7b"), cases, backend="cuda")
    rates = {case.batch: latency(runner, case.batch, case.prompt, case.new, 1).decode_tokens_per_s for case in cases}
    best = max(rates, key=rates.__getitem__)
    told = f"{rates[best] / alone:.0f} ×: {alone:.0f} → {rates[best]:,.0f} tokens/s at batch {best}"
    return Outcome(told, rates[best] >= 60 * alone)


def transformers_alone(new: int) -> float:
    """Tokens a second of one sequence, greedy, in float32."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    with on_device(torch):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig()).eval()
    ids = torch.randint(0, 1000, (1, 128), device="cuda")
    return new / seconds_of(lambda: theirs.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False))


def idle(steps: int = 50) -> Outcome:
    """The share of time between the first and the last kernel of ``steps`` decoding steps in which neither a kernel nor a copy ran:
    within steps too, so no less than between them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from hasten.engine.stepper import Stepper
    from hasten.program import Batch

    stepper = Stepper(eight_b().session)
    _, state = stepper.step(Batch.of([[7] * 512], rows="last"), stepper.start(1))
    for position in range(512, 516):
        _, state = stepper.step(Batch.of([[7]], [position]), state)
    stepper.session.settle()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for position in range(516, 516 + steps):
            _, state = stepper.step(Batch.of([[7]], [position]), state)
        torch.cuda.synchronize()
    spans = sorted((each.time_range.start, each.time_range.end) for each in profiler.events() if each.device_type.name == "CUDA")
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    share = 1 - busy / (until - spans[0][0])
    return Outcome(f"{100 * share:.1f} % idle", share < 0.05)


def long_sequence() -> Outcome:
    from hasten.engine.stepper import Stepper
    from hasten.program import Batch

    stepper, tokens = Stepper(eight_b().session), CONTEXT - 1
    began = time.perf_counter()
    logits, _ = stepper.step(Batch.of([[7] * tokens], rows="last"), stepper.start(1))
    taken = time.perf_counter() - began
    stepper.session.settle()  # before others wait for the device
    return Outcome(f"{tokens:,} tokens in {taken:.1f} s", bool(np.isfinite(logits).all()))


def loading() -> Outcome:
    """From a checkpoint on disk to the first token, in a process of its own."""
    from hasten.checkpoint import load, save

    with tempfile.TemporaryDirectory() as directory:
        save(load("random:llama-3.1-8b"), Path(directory))
        command = [sys.executable, "-m", "hasten.cli", "generate", directory, "--token-ids", "7", "-n", "1", "--backend", "cuda"]
        began = time.perf_counter()
        subprocess.run([*command, "--max-model-len", "4096"], check=True, capture_output=True)
        taken = time.perf_counter() - began
    return Outcome(f"{taken:.1f} s, the interpreter's start among them", taken <= 25)


def determinism(model: str = "random:tinyllama-1.1b", prompts: int = 200, longest: int = 200, new: int = 24) -> Outcome:
    """The same tokens alone and in batches of 2 to 64, some greedy and some drawn."""
    from hasten.checkpoint import load
    from hasten.engine.llm import LLM
    from hasten.engine.sampling import SamplingParams

    random, vocab = np.random.default_rng(0), load(model).spec.vocab
    given = [random.integers(0, min(1000, vocab), int(length)).tolist() for length in random.integers(4, longest, prompts)]
    params = [SamplingParams(max_tokens=new, temperature=float(number % 2), seed=number, ignore_eos=True) for number in range(prompts)]
    alone = [one.token_ids for one in LLM(model, backend="cuda", max_sequences=1, prefixes=False).generate(given, params)]
    differing = 0
    for slots in (2, 8, 64):
        found = LLM(model, backend="cuda", max_sequences=slots, prefixes=False).generate(given, params)
        differing += sum(a != b for one, other in zip(alone, found, strict=True) for a, b in zip(one, other.token_ids, strict=True))
    return Outcome(f"{differing} tokens of {3 * prompts * new:,} differ", differing == 0)


def seconds_of(work: Callable[[], object]) -> float:
    """Of ``work``, which has been done once before."""
    import torch

    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def on_device(torch: Any) -> Iterator[None]:
    """What is made within is made on the device."""
    torch.set_default_device("cuda")
    try:
        yield
    finally:
        torch.set_default_device("cpu")


FAMILIES = "tests/gpu/test_backend.py::test_logits"
LINES = (
    Line("kernels", "every kernel, against the reference, on the device", "all pass", lambda: passing("tests/gpu", "--deselect", FAMILIES)),
    Line("decode", "decode, batch 1, context 512, 8B in bf16: bytes read over a copy", "≥ 0.85", lambda: decode(eight_b(), 0.85)),
    Line("prefill", "prefill of 4,096 over a bf16 product", "≥ 0.60", prefill),
    Line("idle", "device idle while decoding, batch 1, within steps and between", "< 5 %", idle),
    Line("long", "one sequence of 128k tokens", "runs", long_sequence),
    Line("determinism", "200 prompts alone and in batches of 2 to 64", "0 differing", determinism),
    Line("families", "every family but Transformer-XL against the reference in float32", "all pass", lambda: passing(FAMILIES)),
    Line("transformers", "batch 64 over transformers' generate_batch and generate, 1.1B", "≥ 2 ×, ≥ 10 ×", against_transformers),
    Line("one-at-a-time", "7B: transformers in float32, one at a time → hasten's best batch", "≥ 60 ×", over_one_at_a_time),
    Line("decode-w4a16", "decode as above in W4A16 (int4, groups of 128)", "≥ 0.75", decode_w4a16),
    Line("loading", "8B loaded from disk to first token", "≤ 25 s", loading),
)
"""What was asked for first comes first: what no time is left for is at the end."""


# --- the table


def table(found: Mapping[str, Outcome | str], told: str) -> str:
    """The report; what is not in ``found`` was not measured."""
    rows = []
    for line in LINES:
        outcome = found.get(line.name, "not measured")
        figure = outcome if isinstance(outcome, str) else outcome.figure
        holds = "" if isinstance(outcome, str) or outcome.holds is None else "holds" if outcome.holds else "**does not hold**"
        rows.append(f"| {line.check} | {line.asked} | {figure} | {holds} | `python -m benchmarks.gpu --only {line.name}` |")
    head = ["# On a GPU", "", told, "", "| check | asked | measured | | command |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def device_text() -> str:
    """Date, device, driver and versions."""
    import torch
    import triton

    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    name, today = torch.cuda.get_device_name(0), datetime.datetime.now(tz=datetime.UTC).date()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    return f"{today}, {name}, driver {driver}, {versions}. Written by `make gpu`."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [line.name for line in LINES]
    parser.add_argument("--only", help=f"lines to run, with commas between: {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=520.0, help="after which no further line begins")
    given = parser.parse_args()
    wanted = names if given.only is None else given.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no line {unknown[0]!r}; there are {', '.join(names)}")
    from hasten.base.errors import UserError
    from hasten.model import load_backend

    try:
        load_backend("cuda").described()
    except (UserError, ModuleNotFoundError) as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    began, found = time.monotonic(), dict[str, Outcome | str]()
    for line in (line for line in LINES if line.name in wanted):
        if time.monotonic() - began > given.seconds:
            found[line.name] = "not measured: no time was left"
            continue
        started = time.monotonic()
        try:
            found[line.name] = line.measure()
        except Exception as error:  # one line's failure is told, and is no other's
            found[line.name] = f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        outcome = found[line.name]
        print(f"{line.name:14} {time.monotonic() - started:6.1f} s  {outcome if isinstance(outcome, str) else outcome.figure}", flush=True)
    report = table(found, device_text())
    print(report)
    if wanted == names:
        REPORT.write_text(report, "utf-8")
    return 0 if all(isinstance(each, Outcome) and each.holds is not False for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
