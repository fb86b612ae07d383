"""`hasten warm`: requests of a file to a running server, failures counted and left out."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.base.errors import UserError
from hasten.serve.responses.warm import Warmed, WarmRequest, read_requests, warm
from tests.cli import run

# Answers every request by its prompt, keeping what it answered.
SERVER = """
import asyncio, json
async def connected(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).decode().lower()
            body = json.loads(await reader.readexactly(int(head.partition("content-length: ")[2].split("\\r\\n")[0])))
            asked = json.dumps([head.split()[1], body], sort_keys=True)
            bad = "bad" in asked or body["stream"] or ("/chat/" in head.split()[1]) != ("messages" in body)
            there = asked in kept
            kept.add(asked)
            said = b'{"error": {"message": "no"}}' if bad else b'{"choices": []}'
            extra = b"x-hasten-response-cache: exact\\r\\n" if there else b""
            line = b"HTTP/1.1 400 Bad" if bad else b"HTTP/1.1 200 OK"
            writer.write(line + b"\\r\\n" + extra + b"content-length: %d\\r\\n\\r\\n" % len(said) + said)
    except (asyncio.IncompleteReadError, OSError):
        writer.close()
kept = set()
async def main():
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.fixture
def url():
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def lines(path: Path, *values: object) -> Path:
    path.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in values))
    return path


def test_lines_of_each_kind(tmp_path):
    chat, text = {"messages": [{"role": "user", "content": "a"}], "temperature": 0}, {"prompt": "a", "seed": 3}
    batch = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
    found = read_requests(lines(tmp_path / "f", chat, "", text, batch, {"body": {"prompt": [1, 2]}}))
    assert [(one.number, one.route, one.may_be_kept) for one in found] == [
        (1, "/v1/chat/completions", True), (3, "/v1/completions", True), (4, "/v1/chat/completions", False), (5, "/v1/completions", False),
    ]  # fmt: skip
    assert found[0].body == chat
    for wrong in (
        "{",
        "[]",
        "{}",
        {"prompt": "a", "messages": []},
        {**batch, "url": "/v1/embeddings"},
        {"body": 3},
        {**batch, "body": {}},
        {**batch, "url": []},
    ):
        with pytest.raises(UserError, match="line 2"):
            read_requests(lines(tmp_path / "f", chat, wrong))
    with pytest.raises(UserError, match="cannot read"):
        read_requests(tmp_path / "nowhere")


def test_failures_are_counted_and_the_rest_is_asked():
    now = most = 0
    requests = [WarmRequest(number, "/v1/completions", {"prompt": str(number), "stream": True}) for number in range(1, 41)]
    asked, told = [], []

    async def ask(route: str, body: dict) -> bool:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.001)
        now -= 1
        asked.append(body)
        number = int(body["prompt"])
        if number % 10 == 5:
            raise (UserError("refused"), OSError("gone"), TimeoutError())[number % 3]
        return number % 2 == 0

    done = asyncio.run(warm(requests, ask, 7, told.append))
    assert (done.computed, done.there, done.failed) == (16, 20, 4)
    assert done.error == "line 5: TimeoutError"
    assert most == 7
    assert sorted(int(body["prompt"]) for body in asked) == list(range(1, 41))
    assert not any(body["stream"] for body in asked)
    assert len(told) == 40
    assert told[-1] == done
    assert asyncio.run(warm([], ask, 7, told.append)) == Warmed()


def test_the_command_fills_and_goes_on(url, tmp_path):
    good = [{"prompt": f"p{number}", "temperature": 0} for number in range(20)] + [{"messages": [{"content": "x"}], "temperature": 0}]
    first = run("warm", lines(tmp_path / "first", *good[:12]), "--url", url)
    assert first.code == 0, first.err
    assert "12 answers computed, 0 there already, 0 failed" in first.err
    second = run("warm", lines(tmp_path / "second", *good, {"prompt": "bad"}), "--url", url, "--concurrency", 3)
    assert second.code == 2
    assert "9 answers computed, 12 there already, 1 failed" in second.err
    assert "1 of 22 requests have neither temperature 0 nor a seed" in second.err
    assert "1 of 22 requests failed; the first: line 22: status 400:" in second.err


def test_no_server(tmp_path):
    done = run("warm", lines(tmp_path / "f", {"prompt": "a", "temperature": 0}), "--url", "http://127.0.0.1:9")
    assert done.code == 2
    assert "0 answers computed, 0 there already, 1 failed" in done.err
