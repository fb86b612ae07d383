"""Hub ids, against a server on loopback that speaks the Hub's protocol: download once, then the cache is enough."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hasten.checkpoint import bundled_directory

COMMIT = "a" * 40
FILES = {path.name: path.read_bytes() for path in bundled_directory("code-8m").iterdir()} | {
    "modeling_evil.py": b"open('canary', 'w')",
    "pytorch_model.bin": b"\x80\x04 a pickle nobody should fetch",
}


@pytest.fixture
def hub():
    """The endpoint, and the list of paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            asked.append(self.path)
            path = self.path.split("?")[0]
            if path.startswith("/api/models/org/code"):
                siblings = [{"rfilename": name} for name in FILES]
                tree = [{"type": "file", "path": name, "oid": COMMIT, "size": len(data)} for name, data in FILES.items()]
                answer = tree if "/tree/" in path else {"id": "org/code", "modelId": "org/code", "sha": COMMIT, "siblings": siblings}
                self.send(json.dumps(answer).encode(), body, "application/json")
            elif path.startswith("/org/code/resolve/") and path.rsplit("/", 1)[1] in FILES:
                self.send(FILES[path.rsplit("/", 1)[1]], body, "application/octet-stream")
            else:
                self.send(b"{}", body, "application/json", 404)

        def send(self, data, body, kind, status=200):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def inspect(model, cache, **environment):
    """`hasten inspect` in a process of its own, with an empty Hub cache and no proxies."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "hasten.cli", "inspect", model, "--json"], capture_output=True, text=True, timeout=60, cwd=cache,
        env={**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment},
    )  # fmt: skip


@pytest.mark.row("model files", "no pickles")
def test_a_hub_id_is_downloaded_once_without_code_or_pickles(hub, tmp_path):
    endpoint, asked = hub
    first = inspect("org/code", tmp_path, HF_ENDPOINT=endpoint)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["parameters"] == 8_392_960
    fetched = {path.split("?")[0].rsplit("/", 1)[1] for path in asked if "/resolve/" in path}
    assert "model.safetensors" in fetched
    assert not fetched & {"modeling_evil.py", "pytorch_model.bin"}
    offline = inspect("org/code", tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_a_hub_id_that_is_not_there(hub, tmp_path):
    endpoint, _ = hub
    result = inspect("org/absent", tmp_path, HF_ENDPOINT=endpoint)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "org/absent" in result.stderr
