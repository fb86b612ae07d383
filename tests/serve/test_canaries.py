"""What must not happen whatever is sent: nothing is unpickled from any socket, nobody else is listened to or called, nothing is kept on
disk, and no line of the log is forged."""

import base64
import contextlib
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import urlsplit

import httpx
import pytest

from hasten.checkpoint import bundled_directory
from hasten.engine import grammar_worker
from hasten.serve.heart import read_beats
from hasten.serve.messages import Begin, Frames, Ready, Report, frame
from hasten.serve.supervisor import _Process
from tests.serve.server import serving
from tests.serve.test_boundaries import CHAT, GOOD

BEGIN = Begin(
    model="code-8m", backend="auto", weights=None, activations=None, cache=None, context=64, max_sequences=1, memory=None, swap_bytes=0,
    prefixes=True, read_bytes_s=1e9,
)  # fmt: skip


class Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self._place = str(place)

    def __reduce__(self):
        return os.mkdir, (self._place,)


@pytest.fixture
def cage(tmp_path):
    """Canaries of every protocol, and the place where none of them may ever have sung."""
    place = tmp_path / "sang"
    canaries = [pickle.dumps(Canary(place), protocol) for protocol in range(6)]
    pickle.loads(canaries[2])
    assert place.exists()  # they do sing
    place.rmdir()
    yield canaries
    assert not place.exists()


@pytest.mark.row("pickles on sockets", "a canary at every socket")
def test_http_unpickles_nothing(cage, server):
    place = urlsplit(server.url)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for canary in cage:
            with contextlib.suppress(OSError), socket.create_connection((place.hostname, place.port), timeout=5) as raw:
                raw.sendall(canary + b"\r\n\r\n")
                assert b" 200 " not in raw.recv(65536)[:20]
            spelt = base64.b64encode(canary).decode()
            for path in GOOD:
                for kind in ("application/json", "application/octet-stream", "application/x-pickle", "application/msgpack"):
                    answer = client.post(path, content=canary, headers={"content-type": kind})
                    assert answer.status_code == (400 if kind == "application/json" else 415), (path, kind)
                headers = {"x-request-id": spelt, "authorization": f"Bearer {spelt}", "x-pickle": spelt}
                assert client.post(path, json=GOOD[path], headers=headers).status_code == 200
                assert client.post(path, json={**GOOD[path], "prompt_embeds": spelt}).status_code == 400
        upgrade = {
            "connection": "Upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "eHh4eHh4eHh4eHh4eHg=",
        }
        for path in ("/", "/v1/completions", "/ws", "/v1/realtime"):
            assert client.get(path, headers=upgrade).status_code in {404, 405}


@pytest.mark.row("pickles on sockets", "a canary at every socket")
@pytest.mark.parametrize("begun", [False, True])
def test_the_engine_unpickles_nothing(cage, begun):
    """Before its first order, and in the place of a request; it ends, which its supervisor mends."""
    for canary in cage[-1:] if begun else cage:
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "hasten.serve.engine_process", str(theirs.fileno()), str(writer), str(os.getpid())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno(), writer], stderr=subprocess.PIPE)
        theirs.close()
        os.close(writer)
        ours.settimeout(60)
        if begun:
            ours.sendall(frame(BEGIN))
            frames: Frames[Report] = Frames(Report)
            while not any(isinstance(one, Ready) for one in frames.feed(ours.recv(65536))):
                pass
        ours.sendall(struct.pack("<I", len(canary)) + canary)
        assert process.wait(60) == 1
        assert b"msgspec" in process.stderr.read()
        process.stderr.close()
        ours.close()
        os.close(reader)


@pytest.mark.row("pickles on sockets", "a canary at every socket")
def test_the_server_unpickles_nothing_of_its_engines(cage):
    for canary in cage:
        owner, child = Mock(), Mock()
        process = _Process(owner, child, 0)
        process.data_received(struct.pack("<I", len(canary)) + canary)
        child.send_signal.assert_called_once()  # SIGKILL: what talks like that is no engine
        owner.take.assert_not_called()
        with contextlib.suppress(struct.error):
            assert all(isinstance(beat.turns, int) for beat in read_beats(canary))


@pytest.mark.row("pickles on sockets", "a canary at every socket")
def test_the_grammars_process_unpickles_nothing(cage):
    settings = {
        "tokenizer": str(bundled_directory("code-8m") / "tokenizer.json"), "words": 256, "end_ids": [0], "bytes": 1 << 30,
        "compile_seconds": 1.0, "step_seconds": 0.3, "answer_seconds": 1.6, "start_seconds": 30.0, "tastes": False,
    }  # fmt: skip
    for canary in cage[:1] + cage[-1:]:
        command = [sys.executable, grammar_worker.__file__, json.dumps(settings)]
        done = subprocess.run(command, input=struct.pack("<I", len(canary)) + canary, capture_output=True, check=False, timeout=60)
        assert done.returncode != 0
        assert b"Error" in done.stderr


def tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def listening(pid: int) -> list[tuple[str, str]]:
    """Protocol and address of every socket of a process that waits for strangers; TCP in hexadecimal, as the kernel writes it."""
    inodes = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(one))
    found = []
    for protocol, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in inodes and fields[3] == state:
                found.append((protocol, fields[1]))
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if f"socket:[{fields[6]}]" in inodes and int(fields[3], 16) & 0x10000:
            found.append(("unix", fields[-1]))
    return found


@pytest.mark.row("pickles on sockets", "loopback alone")
def test_nothing_listens_but_the_api_on_loopback(server):
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 3, "regex": "[ab]{2}"})
    assert answer.status_code == 200  # so that the grammars' processes are there too
    processes = list(tree(server.process.pid))
    assert len(processes) >= 4
    found = [one for pid in processes for one in listening(pid)]
    assert found == [("tcp", f"0100007F:{urlsplit(server.url).port:04X}")]


PARTS = [
    {"type": "image_url", "image_url": {"url": "URL"}}, {"type": "image_url", "image_url": "URL"}, {"type": "input_audio",
    "input_audio": "URL"},
    {"type": "video_url", "video_url": {"url": "URL"}}, {"type": "file", "file": {"file_data": "URL"}}, {"type": "image", "source": "URL"},
    {"type": "image", "source": {"type": "url", "url": "URL"}}, {"type": "document", "source": {"type": "url", "url": "URL"}},
    {"type": "input_image", "image_url": "URL"}, {"type": "input_file", "file_url": "URL"}, {"image": "URL"},
    {"type": "image_embeds", "image_embeds": "URL"}, {"type": "text", "text": "x", "image_url": "URL"},
]  # fmt: skip


def media(url: str) -> Iterator[tuple[str, dict]]:
    """Bodies, by path."""
    for part in PARTS:
        spelt = {name: _put(value, url) for name, value in part.items()}
        turn = [{"role": "user", "content": [{"type": "text", "text": "x"}, spelt]}]
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/tokenize"):
            yield path, {**GOOD[path], "messages": turn}
        yield "/v1/responses", {"input": turn}
        yield "/v1/embeddings", {"input": [spelt]}
        yield "/v1/completions", {**GOOD["/v1/completions"], "prompt": [spelt]}


def _put(value, url):
    return {name: _put(inner, url) for name, inner in value.items()} if isinstance(value, dict) else url if value == "URL" else value


@pytest.mark.row("media", "refused, and nothing fetched")
def test_media_are_refused_and_nobody_is_called(server):
    with socket.create_server(("127.0.0.1", 0)) as bait, httpx.Client(base_url=server.url, timeout=30) as client:
        bait.settimeout(0.2)
        asked = list(media(f"http://127.0.0.1:{bait.getsockname()[1]}/x.png"))
        for path, body in asked:
            answer = client.post(path, json=body)
            assert answer.status_code == 400, (path, body, answer.text)
        assert len(asked) > 80
        with pytest.raises(TimeoutError):
            bait.accept()


@pytest.mark.row("payloads and cancels", "no forged line")
def test_no_line_of_the_log_is_forged(server):
    place, forged = urlsplit(server.url), "\r\nhasten 00:00:00  forged"
    before = len(server.lines)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for path in GOOD:
            client.post(path, json={**GOOD[path], "model": f"x{forged}"})
            client.post(path, json={**GOOD[path], f"a{forged}\x1b[2J": 1})
            client.post(f"{path}%0d%0ahasten 00:00:00  forged%1b[2J", json={})
        client.get("/v1/models/x%0ahasten%2000:00:00%20%20forged")
    with socket.create_connection((place.hostname, place.port), timeout=5) as raw:
        raw.sendall(b"FORGED\x0b\x0c GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n")
        raw.recv(4096)
    server.until(lambda: len(server.lines) >= before + 3 * len(GOOD), 5)
    time.sleep(0.2)
    for line in server.lines:
        assert line.startswith("hasten "), line
        assert line.isprintable(), line
        assert not line.startswith("hasten 00:00:00  forged"), line


def files(*roots: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for root in roots for path in root.rglob("*") if path.is_file()}


@pytest.mark.row("regex and grammars", "nothing on disk")
def test_requests_leave_nothing_on_disk(tmp_path):
    places = {name: tmp_path / name.lower() for name in ("HOME", "TMPDIR", "HASTEN_CACHE", "XDG_CACHE_HOME")}
    for place in places.values():
        place.mkdir()
    with serving("code-8m", "--response-cache", "memory", env={name: str(place) for name, place in places.items()}) as server:
        ask(server)
        time.sleep(1.0)  # what a start writes is written by then
        watched = files(*places.values())
        descriptors = {pid: written(pid) for pid in tree(server.process.pid)}
        for number in range(8):
            ask(server, number)
        assert files(*places.values()) == watched
        assert {pid: written(pid) for pid in descriptors} == descriptors
        assert server.stop() == 0


def ask(server, number: int = 0) -> None:
    schema = {"type": "object", "properties": {f"a{number}": {"enum": [number]}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    for path, more in (
        ("/v1/chat/completions", {"messages": CHAT, "response_format": form}), ("/v1/completions", {"prompt": "x",
        "regex": f"[a-c]{{{number + 1}}}"}),
        ("/v1/embeddings", {"input": f"x{number}"}), ("/v1/responses", {"input": f"y{number}", "max_output_tokens": 3}),
    ):  # fmt: skip
        more = more if path in {"/v1/embeddings", "/v1/responses"} else {**more, "max_tokens": 30, "temperature": 0}
        assert server.post(path, more).status_code == 200


def written(pid: int) -> set[str]:
    """Files that a process has open to write."""
    found = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            name, flags = os.readlink(one), int(Path(f"/proc/{pid}/fdinfo/{one.name}").read_text().split("flags:")[1].split()[0], 8)
            if name.startswith("/") and not name.startswith(("/dev/", "/memfd:")) and flags & (os.O_WRONLY | os.O_RDWR):
                found.add(name)
    return found
