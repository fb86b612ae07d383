"""The semantic cache behind HTTP: asked for, it answers like prompts alike and says so; not asked for, never."""

import json
import os
import re
import signal

from tests.cli import assert_refused, main
from tests.serve.scrape import scrape
from tests.serve.server import serving
from tests.serve.test_recall import GREEDY, ask, is_open, until_hit

PATH = "/v1/completions"
WORDS = "def add(first, second):\n    return first + second\n\n\ndef subtract(first, second):\n    "


def choices(answer: bytes) -> object:
    return json.loads(answer.replace(b",,", b",").replace(b"{,", b"{"))["choices"]


def test_likeness_is_opt_in_and_says_so():
    body, like, other = ({**GREEDY, "prompt": prompt} for prompt in (WORDS, WORDS + "#", "{} [] 77 ; ; ; --- $$$"))
    with serving("code-8m", "--response-cache", "memory", "--semantic-cache", "0.98") as server:
        is_open(server)
        assert ask(server, PATH, body)[0] is None
        assert (kept := until_hit(server, PATH, body))[0] == "exact"
        header, answer = until_hit(server, PATH, like)
        assert re.fullmatch(r"semantic; similarity=0\.9[89]\d\d", header)
        assert choices(answer) == choices(kept[1])
        assert answer != kept[1]  # usage counts the prompt that was asked
        assert ask(server, PATH, other)[0] is None
        assert ask(server, PATH, {**like, "max_tokens": 15})[0] is None
        assert ask(server, PATH, {"prompt": like["prompt"], "max_tokens": 2})[0] is None
        assert ask(server, PATH, {**like, "echo": True})[0] is None
        found = scrape(server.url)
        assert found.of("hasten_response_cache_hits_total", kind="exact") >= 1
        assert found.of("hasten_response_cache_hits_total", kind="semantic") == 1
        assert found.of("hasten_response_cache_misses_total", kind="semantic") >= 3
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.until(lambda: not server.ready())
        assert server.post(PATH, {**GREEDY, "prompt": WORDS + "##"}).status_code == 503
        assert ask(server, PATH, body) == kept
        server.until(server.ready)
        assert server.stop() == 0


def test_bad_settings(monkeypatch, capsys):
    alone = main(monkeypatch, capsys, "serve", "code-8m", "--semantic-cache", "0.9")
    assert_refused(alone, "--semantic-cache", "--response-cache")
    for value in ("1.5", "0", "nan"):
        refused = main(monkeypatch, capsys, "serve", "code-8m", "--response-cache", "memory", "--semantic-cache", value)
        assert_refused(refused, f"threshold is {float(value)}")
