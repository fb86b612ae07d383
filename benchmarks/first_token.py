"""From the start of a process to its first token: the first start packs weights, the later ones find them. Prints one JSON object."""

import argparse
import json
import statistics
import subprocess
import sys
import time

CHILD = """
import sys
from hasten import LLM, SamplingParams
from hasten.program import Formats
model, weights, context = sys.argv[1], sys.argv[2], int(sys.argv[3])
llm = LLM(model, backend="cpu", formats=Formats(weights), context=context)
chunk = next(iter(llm.stream([list(range(1, 17))], SamplingParams(max_tokens=2, ignore_eos=True))))
print(chunk.token_ids[0], flush=True)
"""


def start(model: str, weights: str, context: int) -> tuple[float, str]:
    """Seconds until a fresh process printed its first token, and the token; the process then ends in its own time."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", CHILD, model, weights, str(context)], stdout=subprocess.PIPE, text=True) as process:
        token = process.stdout.readline().strip()
        seconds = time.perf_counter() - began
    if process.returncode or not token:
        raise SystemExit(f"the process ended with {process.returncode}")
    return seconds, token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="what hasten.load takes")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--starts", type=int, default=7, help="after the first")
    given = parser.parse_args()
    runs = [start(given.model, given.weights, given.context) for _ in range(1 + given.starts)]
    if len({token for _, token in runs}) != 1:
        raise SystemExit("starts disagree about the first token")
    later = [seconds for seconds, _ in runs[1:]]
    print(json.dumps({
        "model": given.model, "weights": given.weights, "first_start_s": runs[0][0], "second_start_s": statistics.median(later),
        "best_s": min(later), "worst_s": max(later), "starts": given.starts,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
