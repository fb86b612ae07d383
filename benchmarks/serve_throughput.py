"""Throughput of the server over that of the engine called directly, the same requests in both, in turns. Prints one JSON object.

Both have a process of their own, loaded before the first turn; the one whose turn it is not sleeps."""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving import Server, serving

DIRECT = """
import json, sys, time
from hasten import LLM, SamplingParams
from hasten.program import Formats
model, weights, context, streams = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
llm = LLM(model, formats=Formats(weights), context=context, max_sequences=streams)
for _ in llm.stream([[0]], SamplingParams(max_tokens=1)):
    pass
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    params = [SamplingParams(max_tokens=most, ignore_eos=True) for most in asked["max_tokens"]]
    began, tokens = time.perf_counter(), 0
    for chunk in llm.stream(asked["prompts"], params):
        tokens += len(chunk.token_ids)
    print(tokens / (time.perf_counter() - began), flush=True)
"""


@contextlib.contextmanager
def direct(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """The engine, without a server, ready."""
    with subprocess.Popen(
        [sys.executable, "-c", DIRECT, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit("the engine does not start")
        try:
            yield process
        finally:
            process.kill()


def directly(process: "subprocess.Popen[str]", asked: dict[str, Any]) -> float:
    """Tokens a second."""
    if process.stdin is None or process.stdout is None:
        raise SystemExit("no pipes")
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def served(server: Server, asked: dict[str, Any]) -> float:
    """Tokens a second, all requests sent at once, each on a connection of its own, streaming."""

    async def all_of_them() -> None:
        await asyncio.gather(*(
            server.stream({"prompt": prompt, "max_tokens": most, "ignore_eos": True, "temperature": 0})
            for prompt, most in zip(asked["prompts"], asked["max_tokens"])
        ))  # fmt: skip

    began = time.perf_counter()
    asyncio.run(all_of_them())
    return sum(asked["max_tokens"]) / (time.perf_counter() - began)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="what hasten serve takes")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--least", type=int, default=48, help="new tokens of the shortest output")
    parser.add_argument("--most", type=int, default=64, help="new tokens of the longest")
    parser.add_argument("--rounds", type=int, default=3, help="after a short one that is not counted")
    parser.add_argument("--response-cache", default="off")
    given = parser.parse_args()
    context, streams = "1024", given.streams

    def requests(turn: int) -> dict[str, Any]:
        lengths = [given.least + (7 * i) % (given.most - given.least + 1) for i in range(streams)]
        prompts = [[turn + 1, *((11 * i + j) % 4000 for j in range(given.prompt - 1))] for i in range(streams)]
        return {"prompts": prompts, "max_tokens": lengths}

    settings = [
        "--weights",
        given.weights,
        "--max-model-len",
        context,
        "--max-sequences",
        str(streams),
        "--response-cache",
        given.response_cache,
    ]
    with direct(given.model, given.weights, context, str(streams)) as process, serving(given.model, *settings) as server:
        warming = {**requests(0), "max_tokens": [8] * streams}
        directly(process, warming)
        served(server, warming)
        before, began = cpu_seconds(server.process.pid), time.perf_counter()
        of_direct, of_server = [], []
        in_server = 0.0
        for turn in range(1, 1 + given.rounds):
            of_direct.append(directly(process, requests(turn)))
            started = time.perf_counter()
            of_server.append(served(server, requests(turn)))
            in_server += time.perf_counter() - started
            print(f"round {turn}: {of_direct[-1]:.2f}, served {of_server[-1]:.2f} tokens/s", file=sys.stderr, flush=True)
        used = cpu_seconds(server.process.pid) - before
    print(json.dumps({
        "model": given.model, "weights": given.weights, "streams": streams, "direct_tokens_per_s": statistics.median(of_direct),
        "served_tokens_per_s": statistics.median(of_server),
        "served_over_direct": statistics.median(one / other for one, other in zip(of_server, of_direct)),
        "rounds": [[round(one, 2), round(other, 2)] for one, other in zip(of_direct, of_server)],
        "server_process_share_of_a_core": used / in_server, "seconds": time.perf_counter() - began,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
