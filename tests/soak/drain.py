"""A server that is told to stop under many streams: each comes to its end, new work is sent away meanwhile, and no process stays."""

import asyncio
import os
import signal
import time
from pathlib import Path

from tests.serve.server import Server
from tests.soak.watch import require
from tests.soak.wire import Asked, Wire, request

STREAMS = 64
ARGUMENTS = ("code-8m", "--max-sequences", str(STREAMS))
AGAIN_S = 0.03
NEW = {
    "/v1/completions": {"prompt": "x"}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "model": "code-8m"},
    "/v1/responses": {"input": "x"}, "/v1/embeddings": {"input": "x"},
}  # fmt: skip


def run(server: Server, tokens: int) -> dict:
    """Stop it once under STREAMS streams of so many tokens. Raises Difference."""
    return asyncio.run(_run(server, tokens))


async def _run(server: Server, tokens: int) -> dict:
    wire = Wire(server.url)
    await wire.ask(request("/v1/completions", {"prompt": "x", "max_tokens": 4, "regex": "[a-z]{1,3}"}))  # begins a process for grammars
    family = descendants(server.process.pid)
    require(len(family) >= 2, f"{len(family)} processes beside the server; an engine and one for grammars should be there")
    bodies = [{"prompt": [5 + place], "max_tokens": tokens, "ignore_eos": True, "stream": True} for place in range(STREAMS)]
    streams = await asyncio.gather(*(wire.begin(request("/v1/completions", body)) for body in bodies))
    await asyncio.gather(*(one.begun for one in streams))
    require(not any(one.done.done() for one in streams), "a stream was over before the server was told to stop; ask for more tokens")
    server.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    refused = await _refused(wire, streams)
    require(len(refused) >= len(NEW), f"{len(refused)} requests were sent away while streams went on; the server stopped too soon to tell")
    for one in streams:
        finished = one.data.count(b'"finish_reason":"length"')
        require(finished == 1 and one.data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), f"a stream was cut: {bytes(one.data[-300:])!r}")
    code = await asyncio.to_thread(server.process.wait, 20)
    require(code == 0, f"exit code {code}")
    end = time.monotonic() + 2.0
    while left := [pid for pid in family if os.path.exists(f"/proc/{pid}")]:
        require(time.monotonic() < end, f"processes that stayed: {left}")
        await asyncio.sleep(0.02)
    return {"streams": len(streams), "refused": len(refused), "stopped_s": round(time.monotonic() - told, 2), "processes": len(family)}


async def _refused(wire: Wire, streams: list[Asked]) -> list[int]:
    """New work on one route after the other until the streams are over; all of it must be sent away. From a tenth of a second on: the
    signal is on its way."""
    await asyncio.sleep(0.1)
    statuses = list[int]()
    routes = list(NEW.items())
    while not all(one.done.done() for one in streams):
        path, body = routes[len(statuses) % len(routes)]
        try:
            answer = await wire.ask(request(path, body))
        except OSError:
            require(all(one.done.done() for one in streams), "nobody listened while streams went on")
            break
        if answer.status == 0 and all(one.done.done() for one in streams):
            break  # the server was gone before it was asked
        require(answer.status == 503, f"{path}: status {answer.status} after the server was told to stop")
        require(int(answer.header("retry-after") or 0) >= 1, f"{path}: a 503 without Retry-After")
        statuses.append(answer.status)
        await asyncio.sleep(AGAIN_S)
    return statuses


def descendants(pid: int) -> list[int]:
    """Processes that it began, and those began, while it lives."""
    found = list[int]()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def told(found: dict) -> str:
    """The figures of one round, for people."""
    return (
        f"drain, {found['streams']} streams: none cut, {found['refused']} new requests sent away with 503, {found['stopped_s']} s to the "
        f"exit with code 0, {found['processes']} processes of its own gone"
    )
