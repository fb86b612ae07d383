"""Answers on their way out: to clients that go, that do not read, and through an error."""

import asyncio
import json

import pytest

from hasten.serve import reply
from hasten.serve.errors import FAILED, ApiError
from hasten.serve.log import Note
from hasten.serve.reply import Reply, Sender


def answered(
    work, *, gone_after: float | None = None, stuck_at: int | None = None, path: str = "/v1/completions"
) -> tuple[list[dict], Note]:  # fmt: skip
    """What ``work`` sent to a client that goes after so many seconds, or reads no further than so many messages."""
    sent, note = [], Note("1", "POST", "/", 0.0)

    async def receive() -> dict:
        await asyncio.sleep(3600 if gone_after is None else gone_after)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if stuck_at is not None and len(sent) >= stuck_at:
            await asyncio.sleep(3600)
        sent.append(message)

    async def run() -> None:
        async with asyncio.timeout(20):
            await Reply(work, note)({"type": "http", "path": path}, receive, send)

    asyncio.run(run())
    return sent, note


@pytest.mark.parametrize("begun", [False, True])
def test_an_error_is_the_answer_or_the_last_event(begun):
    async def work(sender: Sender) -> None:
        if begun:
            await sender.events(b"data: 1\n\n")
        raise ApiError(429, "too much", param="n", code="c", retry_s=7)

    sent, note = answered(work)
    assert sent[0]["status"] == (200 if begun else 429)
    assert ((b"retry-after", b"7") in sent[0]["headers"]) is not begun
    body = b"".join(one["body"] for one in sent[1:])
    told = json.loads(body.removeprefix(b"data: 1\n\ndata: "))
    assert told == {"error": {"message": "too much", "type": "rate_limit_error", "param": "n", "code": "c"}}
    assert not sent[-1].get("more_body")
    assert note.said == "too much"


@pytest.mark.row("disconnects", "at every point")
def test_work_ends_when_the_client_goes_or_does_not_read(monkeypatch):
    monkeypatch.setattr(reply, "STALLED_S", 0.2)
    ended = []

    async def work(sender: Sender) -> None:
        try:
            while True:
                await sender.events(b"data: 1\n\n")
                await asyncio.sleep(0.01)
        finally:
            ended.append(True)

    sent, note = answered(work, gone_after=0.5)
    assert len(sent) > 10  # one that reads slowly is no one who does not
    assert note.said == "the client went away"
    sent, note = answered(work, stuck_at=3)
    assert len(sent) == 3
    assert note.said == "the client does not read"
    assert ended == [True, True]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("path", "kind"), [("/v1/completions", "server_error"), ("/v1/messages", "api_error")])
def test_what_fails_inside_is_the_answer_or_the_last_event(begun, path, kind, capfd):
    async def work(sender: Sender) -> None:
        if begun:
            await sender.events(b"data: 1\n\n")
        raise RuntimeError("planted")

    sent, note = answered(work, path=path)
    assert [one["status"] for one in sent if one["type"] == "http.response.start"] == [200 if begun else 500]
    told = json.loads(b"".join(one.get("body", b"") for one in sent).rpartition(b"data: ")[2])["error"]
    assert (told["type"], told["message"]) == (kind, FAILED)
    assert not sent[-1].get("more_body")
    assert note.said == "RuntimeError: 'planted'"
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("streams", [False, True])
def test_what_fails_after_the_end_comes_out(streams):
    async def work(sender: Sender) -> None:
        await (sender.end(b"data: 1\n\n") if streams else sender.body(200, {}))
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        answered(work)
