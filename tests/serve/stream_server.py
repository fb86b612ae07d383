"""A small server that streams what a request asks for, at times it asks for. Stands in for any OpenAI-compatible server."""

import asyncio
import json
import sys
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


class StreamServer:
    """``script`` of the body says what happens: ``first`` and ``gap`` are seconds, ``per_chunk`` tokens of a chunk, ``fault`` what goes
    wrong. Every request's path, headers and body are in ``seen``; ``most`` is how many were under way at a time."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most = self.now = self.connections = 0

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in lines)}
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                self.now += 1
                self.most = max(self.most, self.now)
                try:
                    if not await self._answer(line.split(" ")[1], headers, json.loads(raw or b"{}"), writer):
                        return
                finally:
                    self.now -= 1
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass  # the client went away, or the test is over
        finally:
            writer.close()

    async def _answer(self, path: str, headers: dict[str, str], body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection may be used again."""
        if path == "/v1/models":
            listed = json.dumps({"object": "list", "data": [{"id": "stream", "object": "model"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(listed) + listed)
            return True
        self.seen.append((path, headers, body))
        script, chat = body.get("script", {}), "messages" in body
        fault = script.get("fault")
        tokens = body.get("max_completion_tokens" if chat else "max_tokens", 1)
        if fault == "refused":
            said = json.dumps({"error": {"message": "the queue is full", "type": "overloaded"}}).encode()
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\nRetry-After: 1\r\n\r\n" % len(said) + said)
            return True
        if fault == "not http":
            writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            return True
        if fault == "no stream":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>")
            return True
        if fault == "hang":
            await asyncio.sleep(60)
        writer.write(HEAD + (b"X-Hasten-Response-Cache: exact\r\n" if script.get("cached") else b"") + b"\r\n")
        if chat:
            writer.write(chunk(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})))
        await asyncio.sleep(script.get("first", 0))
        for begin in range(0, tokens, per_chunk := script.get("per_chunk", 1)):
            if begin:
                await asyncio.sleep(script.get("gap", 0))
            if fault == "cut" and begin:
                return False
            if fault == "error" and begin:
                writer.write(chunk(event({"error": {"message": "the engine died", "code": 500}})) + chunk(event(b"[DONE]")) + chunk(b""))
                return True
            if fault == "garbage" and begin:
                writer.write(chunk(event(b"{nonsense")))
            text = "x " * min(per_chunk, tokens - begin)
            said = {"delta": {"content": text}} if chat else {"text": text}
            whole = chunk(event({"choices": [{"index": 0, **said, "finish_reason": None}], "usage": None}))
            for at in range(0, len(whole), step := script.get("bytes", len(whole))):  # cut anywhere
                writer.write(whole[at : at + step])
                if step < len(whole):
                    await asyncio.sleep(0)
        writer.write(chunk(event({"choices": [{"index": 0, **({"delta": {}} if chat else {"text": ""}), "finish_reason": "length"}]})))
        if body.get("stream_options", {}).get("include_usage") and not script.get("no_usage"):
            writer.write(chunk(event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}})))
        writer.write(chunk(event(b"[DONE]")) + b"0\r\n\r\n")
        return not script.get("close")


async def flood(chunks: int, gap: float) -> None:
    """As a process: answers every request with that many chunks, each sent by itself, ``gap`` seconds after the last."""
    piece = chunk(event({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m",
                         "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}], "usage": None}))  # fmt: skip
    last = (
        chunk(event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": chunks}})) + chunk(event(b"[DONE]")) + b"0\r\n\r\n"
    )

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
                writer.write(HEAD + b"\r\n")
                for _ in range(chunks):
                    writer.write(piece)
                    await asyncio.sleep(gap)
                writer.write(last)
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(flood(int(sys.argv[1]), float(sys.argv[2])))
