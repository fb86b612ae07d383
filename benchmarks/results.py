"""Whether results can be used: each checkpoint inspected, served, and loaded by transformers where that can express it.

    python -m benchmarks.results [CHECKPOINT …]

Of all that `python -m benchmarks.smaller` made with what runs now, unless some are named. One JSON object a checkpoint. ``provenance`` is
what was done to make it, as `hasten inspect` tells; ``served`` says whether a server gave the very tokens that the engine called directly
gives; ``elsewhere`` is the root mean square of the difference between transformers' logits and the reference backend's, both in float32,
over that of the reference's, or why transformers cannot express it; ``exported`` says whether `hasten export` wrote first what
transformers loads. Exits with 1 where a result has no provenance, was served otherwise, or differs by more than 1e-3."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ledger import ROOT, source_digest
from benchmarks.serving import serving
from hasten.base.errors import UnsupportedError
from hasten.checkpoint import exported, load, save, unread_elsewhere
from hasten.model import Model

PROMPT = "class Point:\n    def __init__(self, x, y):\n"
TOKENS = 24
SAME = 1e-3


def command(*arguments: str) -> Any:
    """What a command of hasten's prints with --json."""
    done = subprocess.run([sys.executable, "-m", "hasten.cli", *arguments, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def served(directory: Path) -> str:
    """The text that a server of the checkpoint gives."""
    with serving(str(directory)) as server:
        answer = server.ask({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0})
    text: str = answer["choices"][0]["text"]
    return text


def elsewhere(directory: Path, model: Model, work: Path) -> float | str:
    """How far transformers' logits are from the reference backend's, or why there are none. ``work`` is a folder for what is exported."""
    if unread_elsewhere(model):
        try:
            save(exported(model), work / "exported")
        except UnsupportedError as error:
            return str(error)
        directory = work / "exported"
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    ids = np.random.default_rng(0).integers(0, model.spec.vocab, 200)
    judge = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = judge(torch.tensor([ids.tolist()])).logits[0].numpy()
    own = np.asarray(model.logits(ids))
    return float(np.sqrt(np.mean((own - theirs) ** 2) / np.mean(own**2)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    made = sorted(path.parent for path in (ROOT / ".evidence" / "smaller").glob(f"[!.]*-{source_digest()}/config.json"))
    checkpoints = parser.parse_args().checkpoints or made
    if not checkpoints:
        parser.error("nothing was made yet by python -m benchmarks.smaller; name checkpoints")
    wrong = 0
    for directory in checkpoints:
        model, name = load(str(directory)), str(directory)
        provenance = [entry["transform"] for entry in command("inspect", name)["provenance"]]
        direct = command("generate", name, "--prompt", PROMPT, "--max-tokens", str(TOKENS), "--temperature", "0")
        with tempfile.TemporaryDirectory() as work:
            apart = elsewhere(directory, model, Path(work))
        row = {
            "checkpoint": directory.name, "provenance": provenance, "served": served(directory) == direct["text"],
            "exported": bool(unread_elsewhere(model)) and not isinstance(apart, str), "elsewhere": apart,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        wrong += not provenance or not row["served"] or (not isinstance(row["elsewhere"], str) and row["elsewhere"] > SAME)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
