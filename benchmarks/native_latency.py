"""Prefill and batch-1 decode of the native backend, beside the machine's limits measured in the same run. Prints one JSON object a format.

Decode is interleaved with streaming reads of as many bytes as a step reads; ratios are medians over pairs."""

import argparse
import json
import statistics
import time

import numpy as np

from hasten import _native
from hasten.backends.cpu import CpuBackend
from hasten.checkpoint import load
from hasten.program import Batch, Formats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="random:tinyllama-1.1b")
    parser.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=128, help="tokens before the decode that is timed")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    model = load(arguments.model)
    for weights in arguments.weights:
        backend = CpuBackend()
        began = time.perf_counter()
        session = backend.session(model, 2048, Formats(weights))
        pack_s = time.perf_counter() - began
        ids = np.random.default_rng(0).integers(0, model.spec.vocab, 2048).tolist()
        read_bytes = session.compiled.weight_bytes
        prefill, decode, limits = [], [], []
        for _ in range(arguments.runs):
            state = session.start(1)
            began = time.perf_counter()
            session.step(Batch.of([ids[: arguments.prompt]], rows="last"), state)
            prefill.append(arguments.prompt / (time.perf_counter() - began))
            state = session.start(1)
            session.step(Batch.of([ids[: arguments.context]], rows="last"), state)
            began = time.perf_counter()
            for position in range(arguments.context, arguments.context + arguments.new):
                session.step(Batch.of([ids[position : position + 1]], [position], rows="last"), state)
            decode.append((time.perf_counter() - began) / arguments.new)
            limits.append(_native.streaming_read(read_bytes, backend.threads, 3)[0])
        print(
            json.dumps(
                {
                    "model": arguments.model, "weights": weights, "activations": "bf16" if weights == "bf16" else "int8",
                    "threads": backend.threads, "isa": _native.isa_level(), "pack_s": round(pack_s, 2),
                    "prefill_tokens_per_s": round(statistics.median(prefill), 1),
                    "decode_tokens_per_s": round(1 / statistics.median(decode), 2), "weight_bytes_per_step": read_bytes,
                    "decode_gb_per_s": round(read_bytes / statistics.median(decode) / 1e9, 2),
                    "streaming_read_gb_per_s": round(statistics.median(limits), 2),
                    "mbu": round(statistics.median(read_bytes / d / 1e9 / limit for d, limit in zip(decode, limits)), 3),
                }
            ),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
