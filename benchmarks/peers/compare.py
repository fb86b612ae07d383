"""hasten beside its peers on the same weights: interleaved rounds, one table of ratios.

    python benchmarks/peers/compare.py --environments DIR --work DIR --shape tinyllama-1.1b

makes each peer's environment below --environments at the first call (one after another), writes the checkpoint and its conversions below
--work, and starts a process a runner, which is stopped (SIGSTOP) while another one runs, so that no idle threads of it spin. Prefill is the
time to the first token; decoding goes by slope: the times to --short and to --long new tokens, subtracted. A runner that cannot run, or
that ends midway, says why and is left out. Speeds are medians over rounds; a ratio is hasten's speed over the peer's within a round,
then the median."""

import argparse
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import environment
import with_hasten
import with_llama_cpp
import with_openvino
import with_transformers
import with_vllm

PEERS = (with_transformers, with_llama_cpp, with_openvino, with_vllm)
BITS = {"bf16": "bf16", "int8": "int8", "q8_0": "int8", "int4": "int4", "q4_0": "int4", "q4_k_m": "int4"}
"""hasten's format that holds as many bits as each format of a peer."""


@dataclasses.dataclass
class Runner:
    """A process that times what it is asked for; stopped in between."""

    name: str
    form: str
    process: subprocess.Popen
    log: Path
    version: str = ""

    @classmethod
    def start(cls, name: str, form: str, python: Path, given: argparse.Namespace, checkpoint: Path, context: int, log: Path) -> "Runner":
        script = Path(__file__).with_name(f"with_{name}.py")
        work = given.work / f"{name}-{given.shape}"
        work.mkdir(parents=True, exist_ok=True)
        command = [
            python, script, checkpoint, work, "--format", form, "--threads", given.threads, "--context", context,
            "--batch", max(given.batch),
        ]  # fmt: skip
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given.threads), "TOKENIZERS_PARALLELISM": "false"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            list(map(str, command)), stdin=pipe, stdout=pipe, stderr=log.open("w"), text=True, env=settings, start_new_session=True
        )
        runner = cls(name, form, process, log)
        try:
            answer = runner.answer()
        except BaseException:
            runner.end()
            raise
        runner.version = answer["version"]
        print(f"{runner.label} {runner.version}: loaded in {answer['load_s']:.1f} s", file=sys.stderr, flush=True)
        runner.signal(signal.SIGSTOP)
        return runner

    @property
    def label(self) -> str:
        return f"{self.name} {self.form}"

    def signal(self, which: signal.Signals) -> None:
        """To the process and those it made."""
        os.killpg(self.process.pid, which)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise RuntimeError(f"{self.label} ended: {said[-1] if said else 'without a word'} (see {self.log})")
        return json.loads(line)

    def time(self, batch: int, prompt: int, new: int, seed: str) -> tuple[float, list[int]]:
        """Seconds, and the first token of each sequence. A prompt follows from its length and ``seed``."""
        self.signal(signal.SIGCONT)
        print(json.dumps({"batch": batch, "prompt": prompt, "new": new, "seed": seed}), file=self.process.stdin, flush=True)
        answer = self.answer()
        self.signal(signal.SIGSTOP)
        return answer["seconds"], answer["first"]

    def end(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()


def write_checkpoint(shape: str, directory: Path) -> Path:
    """The random weights of ``shape``, with a tokenizer for peers that will not start without one."""
    from hasten.checkpoint import load, random_model, save

    if not (directory / "config.json").is_file():
        save(dataclasses.replace(random_model(shape), tokenizer=load("code-8m").tokenizer), directory)
    return directory


def interpreter(peer, environments: Path) -> Path:
    """Raises RuntimeError where the environment cannot be made."""
    try:
        return environment.make(environments, peer.NAME, peer.INSTALL)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{peer.NAME} cannot be installed: {error}") from error


def start_all(given: argparse.Namespace, checkpoint: Path, context: int, runners: list[Runner]) -> None:
    """Add to ``runners`` hasten in every format, then the peers that can run."""
    wanted = [(name, form) for name, _, form in (each.partition(":") for each in given.runners)] if given.runners else None
    for peer in (None, *PEERS):
        name = "hasten" if peer is None else peer.NAME
        for form in (with_hasten if peer is None else peer).FORMATS:
            if wanted is not None and (name, form) not in wanted and (name, "") not in wanted:
                continue
            try:
                python = Path(sys.executable) if peer is None else interpreter(peer, given.environments)
                log = given.work / f"{name}-{form}.log"
                runners.append(Runner.start(name, form, python, given, checkpoint, context, log))
            except RuntimeError as error:
                print(f"left out: {error}", file=sys.stderr, flush=True)


def measure(runner: Runner, given: argparse.Namespace, number: int) -> dict[str, float]:
    """Tokens a second: round ``number`` of everything. What others pushed out of memory while it was stopped is read back before."""
    runner.time(1, 16, 2, f"awake {number}")
    speeds = {"prefill": given.prompt / runner.time(1, given.prompt, 1, f"prefill {number}")[0]}
    for batch in given.batch:
        short, long = (runner.time(batch, given.context, new, f"{new} {number}")[0] for new in (given.short, given.long))
        slope = (long - short) / (given.long - given.short)
        speeds[f"batch {batch}"] = batch / slope if slope > 0 else math.nan  # a disturbed pair says nothing
    return speeds


def median(values: list[float]) -> float | None:
    """None where every round was disturbed."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else None


def shown(value: float | None, form: str) -> str:
    return f"{'–' if value is None else format(value, form):>10}"


def table(runners: list[Runner], rounds: dict[str, list[dict[str, float]]]) -> list[dict]:
    """A row a runner: speeds, and for a peer hasten's speed over its at the same bits."""
    rows = []
    for runner in runners:
        mine = rounds[runner.label]
        base = None if runner.name == "hasten" else rounds.get(f"hasten {BITS[runner.form]}")
        rows.append({
            "runner": runner.label,
            "bits": BITS[runner.form],
            "version": runner.version,
            "tokens_per_s": {what: median([each[what] for each in mine]) for what in mine[0]},
            "hasten_over_it": None if base is None else {what: median([h[what] / p[what] for h, p in zip(base, mine)]) for what in mine[0]},
        })
    return rows


def print_table(rows: list[dict]) -> None:
    columns = list(rows[0]["tokens_per_s"])
    width = max(len(f"{row['runner']} {row['version']}") for row in rows)
    print(f"{'tokens a second'.ljust(width)}  " + "  ".join(f"{what:>10}" for what in columns))
    for row in rows:
        print(f"{row['runner'] + ' ' + row['version']:{width}}  " + "  ".join(shown(row["tokens_per_s"][what], ",.1f") for what in columns))
    print(f"\n{'hasten over it, same bits'.ljust(width)}  " + "  ".join(f"{what:>10}" for what in columns))
    for row in rows:
        if (ratios := row["hasten_over_it"]) is not None:
            print(f"{row['runner'] + ' ' + row['version']:{width}}  " + "  ".join(shown(ratios[what], ".2f") for what in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="where peers are installed")
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint and its conversions are written")
    parser.add_argument("--shape", default="tinyllama-1.1b", help="of random:SHAPE")
    parser.add_argument("--runners", nargs="+", help="NAME or NAME:FORMAT, as in hasten:int8 transformers llama_cpp:q4_0; all unless given")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--context", type=int, default=128, help="tokens before those that are decoded")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--short", type=int, default=4)
    parser.add_argument("--long", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    given = parser.parse_args()
    if not (0 < given.short < given.long and min(given.batch) > 0 and given.rounds > 0):
        parser.error("--short must be below --long, and counts above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped runners are ended, too
    given.work.mkdir(parents=True, exist_ok=True)
    checkpoint = write_checkpoint(given.shape, given.work / given.shape)
    context = max(given.prompt + 1, given.context + given.long, 16 + 2) + 8
    runners: list[Runner] = []
    try:
        start_all(given, checkpoint, context, runners)
        if not runners:
            raise SystemExit("no runner is left")
        firsts = {
            runner.label: runner.time(max(given.batch), 16, 2, "first")[1] for runner in runners
        }  # warms up, and shows whether all play one model
        reference = firsts[runners[0].label]
        for label, first in firsts.items():
            same = sum(a == b for a, b in zip(first, reference))
            print(f"{label}: first token as {runners[0].label} in {same} of {len(first)}", file=sys.stderr)
        rounds: dict[str, list[dict[str, float]]] = {runner.label: [] for runner in runners}
        for number in range(given.rounds):
            for runner in list(runners if number % 2 == 0 else reversed(runners)):
                print(f"round {number + 1} of {given.rounds}: {runner.label}", file=sys.stderr, flush=True)
                try:
                    rounds[runner.label].append(measure(runner, given, number))
                except RuntimeError as error:
                    if runner.name == "hasten":
                        raise
                    print(f"left out: {error}", file=sys.stderr, flush=True)
                    runner.end()
                    runners.remove(runner)
                else:
                    print(f"  {json.dumps(rounds[runner.label][-1])}", file=sys.stderr, flush=True)
        rows = table(runners, rounds)
    finally:
        for runner in runners:
            runner.end()
    print(f"random:{given.shape}, {given.threads} threads, prompt {given.prompt}, decoding after {given.context}, {given.rounds} rounds")
    print_table(rows)
    if given.json:
        given.json.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(given).items()}, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
