"""A repeated prompt with the response cache: computed, and answered from it; seen by a client, and by the server itself. Prints one JSON
object."""

import argparse
import http.client
import json
import statistics
import time

from benchmarks.serving import Server, serving


def timed(connection: http.client.HTTPConnection, server: Server, body: bytes, cached: bool) -> tuple[float, float, bytes]:
    """Seconds of a request to its client, and to the server; the text and how it ended."""
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    seconds = time.perf_counter() - began
    if answer.status != 200 or (answer.headers.get("x-hasten-response-cache") is not None) != cached:
        raise SystemExit(f"status {answer.status}, {'not ' if cached else ''}from the cache: {found}")
    return seconds, server.request()["seconds"], json.dumps(found["choices"]).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="what hasten serve takes")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--prompts", type=int, default=3, help="how many are computed")
    parser.add_argument("--hits", type=int, default=200)
    parser.add_argument("--store", default="memory", help="what --response-cache takes")
    given = parser.parse_args()
    bodies = [
        json.dumps({"prompt": [(7 * i + j) % 4000 for j in range(given.prompt)], "max_tokens": given.new, "ignore_eos": True,
                    "temperature": 0}).encode()
        for i in range(given.prompts)
    ]  # fmt: skip
    with serving(given.model, "--weights", given.weights, "--response-cache", given.store, "--max-model-len", "1024") as server:
        server.event("response cache is open")
        connection = http.client.HTTPConnection(str(server.place.hostname), server.place.port, timeout=300)
        computed = [timed(connection, server, body, False) for body in bodies]
        time.sleep(0.5)  # until they are kept
        hits = [timed(connection, server, bodies[i % given.prompts], True) for i in range(given.hits)]
    if any(hit[2] != computed[i % given.prompts][2] for i, hit in enumerate(hits)):
        raise SystemExit("a hit differs from what was computed")
    computed_s, hit_s = (statistics.median(one[0] for one in runs) for runs in (computed, hits))
    at_server = sorted(1e3 * one[1] for one in hits)
    print(json.dumps({
        "model": given.model, "weights": given.weights, "prompt": given.prompt, "new": given.new, "computed_s": computed_s,
        "computed_over_hit": computed_s / hit_s, "hit_client_ms": 1e3 * hit_s, "hit_server_ms": statistics.median(at_server),
        "hit_server_p99_ms": at_server[len(at_server) * 99 // 100],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
