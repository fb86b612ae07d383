"""hasten's quantization beside another's: the bundled model, the same windows of token ids, the held-out loss of both, played by hasten.

    python -m benchmarks.compression.compare --environments DIR --work DIR

makes the peer's environment below --environments at the first call. Checkpoints and what was measured lie below --work; what is there is
not made again, so a run that was stopped goes on. `recovered` is the share of the loss that plain round-to-nearest adds and a method does
not. Seconds are of the calibration and the rounding for the peer, of the whole command for hasten, its gates and its reading back among
them."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.compression import with_llm_compressor as peer
from benchmarks.ledger import Ledger, source_digest
from benchmarks.peers import environment

MODEL = "code-8m"
GROUP = 64
METHODS = ("gptq", "awq", "best")


def hasten(*words: object) -> dict:
    """What a command of hasten prints as JSON."""
    command = [sys.executable, "-m", "hasten.cli", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def write_inputs(work: Path, samples: int, sequence: int) -> tuple[Path, Path, str]:
    """The checkpoint in Hugging Face's layout, the windows that `hasten quantize` calibrates on, and their digest."""
    from hasten.checkpoint import load, save
    from hasten.compress.data import cut_text, read_documents

    model, checkpoint = load(MODEL), work / MODEL
    if not (checkpoint / "config.json").is_file():
        save(model, checkpoint)
    text = cut_text(model, read_documents(None), samples=samples, sequence=sequence)
    windows = work / f"windows-{text.sha256[:8]}.json"
    windows.write_text(json.dumps(text.windows))
    return checkpoint, windows, text.sha256


def by_peer(given: argparse.Namespace, method: str, checkpoint: Path, out: Path, windows: Path) -> dict:
    """Seconds and version of one run of the peer, which writes ``out``."""
    python = environment.make(given.environments, peer.NAME, peer.install(environment.TORCH))
    threads = {
        "OMP_NUM_THREADS": str(given.threads),
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = out.with_suffix(".log")
    command = [python, peer.__file__, checkpoint, out, windows, "--method", method, "--group", GROUP]
    done = subprocess.run(
        list(map(str, command)), cwd=given.work, env={**os.environ, **threads}, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{peer.NAME} {method} ended with {done.returncode}; see {log}")
    return json.loads(done.stdout.splitlines()[-1])


def by_hasten(given: argparse.Namespace, method: str, checkpoint: Path, out: Path, sha256: str) -> dict:
    """Seconds of one run of hasten, which writes ``out``. Raises SystemExit where it looked at other windows."""
    from hasten import __version__

    began = time.perf_counter()
    hasten(
        "quantize", checkpoint, out, "--method", method, "--weights", f"int4-g{GROUP}", "--samples", given.samples, "--sequence",
        given.sequence, "--even-if-worse", "--overwrite", "--gate-tokens", 4096,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    steps = json.loads((out / "hasten.json").read_text())["provenance"]
    seen = {step["evidence"]["sha256"] for step in steps if "sha256" in step["evidence"]}
    if method != "rtn" and seen != {sha256}:
        raise SystemExit(f"hasten {method} was calibrated on other windows than the peer: {seen}, not {sha256}")
    return {"version": __version__, "seconds": seconds}


def rows_of(given: argparse.Namespace) -> list[dict]:
    """A row a result: what made it, its held-out loss, its bytes, its seconds."""
    checkpoint, windows, sha256 = write_inputs(given.work, given.samples, given.sequence)
    ledger = Ledger(given.work / "ledger.jsonl")
    base = kept(ledger, ("loss", MODEL, source_digest()), lambda: measured(checkpoint))
    rows = [{"by": "none", "method": "bf16", "version": "", "seconds": 0.0, **base}]
    for by, method in [("hasten", "rtn"), *(("hasten", each) for each in given.methods), *((peer.NAME, each) for each in beside(given))]:
        out = given.work / (f"{by}-{method}" if method == "rtn" else f"{by}-{method}-{sha256[:8]}")
        key = ("made", out.name, "" if by == peer.NAME else source_digest())
        made = ledger.get(*key) if (out / "config.json").is_file() else None
        if made is None:
            print(f"{out.name} …", file=sys.stderr, flush=True)
            if by == peer.NAME:
                made = by_peer(given, method, checkpoint, out, windows)
            else:
                made = by_hasten(given, method, checkpoint, out, sha256)
            ledger.note(*key, value=made)
        found = kept(ledger, ("loss", out.name, source_digest(), made["seconds"]), lambda out=out: measured(out))
        rows.append({"by": by, "method": method, **made, **found})
    plain = next(row["loss"] for row in rows if row["method"] == "rtn")
    for row in rows:
        row["recovered"] = (plain - row["loss"]) / (plain - base["loss"])
    return rows


def beside(given: argparse.Namespace) -> list[str]:
    """The methods that the peer has, too."""
    return [each for each in given.methods if each in peer.METHODS]


def kept(ledger: Ledger, key: tuple, make) -> dict:
    """What was noted under ``key``, else what ``make`` gives now."""
    found = ledger.get(*key)
    if found is None:
        found = make()
        ledger.note(*key, value=found)
    return found


def measured(directory: Path) -> dict:
    """Loss over the whole held-out set, and bytes of the weights' files."""
    found = hasten("eval", directory)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return {"loss": found["loss"], "tokens": found["tokens"], "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="where the peer is installed")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and measurements are kept")
    parser.add_argument("--samples", type=int, default=256, help="windows of the interpreter's library to calibrate on")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a window at most")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the peer; hasten takes all cores")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = rows_of(given)
    losses = {(row["by"], row["method"]): row["loss"] for row in rows}
    over = {f"{method}_over_peer": losses["hasten", method] / losses[peer.NAME, method] for method in beside(given)}
    versions = ", ".join(dict.fromkeys(f"{row['by']} {row['version']}" for row in rows[1:]))
    print(f"{MODEL}, W4A16, groups of {GROUP}, {given.samples} windows of up to {given.sequence} tokens; {versions}")
    print(f"{'by':16}{'method':>8}{'loss':>9}{'recovered':>11}{'bytes':>13}{'seconds':>9}")
    for row in rows:
        print(f"{row['by']:16}{row['method']:>8}{row['loss']:>9.4f}{row['recovered']:>11.1%}{row['bytes']:>13,}{row['seconds']:>9.1f}")
    if given.json:
        given.json.write_text(json.dumps({**over, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
